"""Training and evaluation on images that are resident on the device.

    trainer = Trainer(model, optimizer, training_images, config["batch_size"])
    for epoch in range(config["epochs"]):
        trainer.train_epoch()
        loss, accuracy = evaluate(model, validation_images)

An ordinary loop over a DataLoader works just as well with everything else in this bundle; it is
only slower.  What makes this one fast:

    both   The images stay uint8 on the device; a step gathers and normalises its batch there.
           torchvision's transforms give 25 000 images/s on a core, this more than a million.
    GPU    One step is one CUDA graph: a replay starts its kernels all at once, which eager
           Python cannot do as fast as the GPU runs them.  The host waits once per epoch.
    CPU    One worker per core with one thread; channels last; freed memory is used again instead
           of being given back to the kernel, which has to clear every page of it anew.  Large
           nets multiply in bf16 where the processor has instructions for that; the weights, the
           optimiser and the evaluation stay float32.

There is no torch.compile: every trial has other shapes, so every trial would compile.
"""

from __future__ import annotations

import copy
import ctypes
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo import gpu
from hpo.train.capture import CapturedStep
from hpo.train.mnist import Images

MEAN, STD = 0.1307, 0.3081  # of MNIST's training images scaled to 0 … 1
EVALUATION_BATCH = 500  # images; bounds the memory of the largest net's activations
# Of a step's forward pass. On a CPU with AVX512_BF16, nets above this had up to 1.8 × their speed
# with bf16, and nets below down to 0.83 × (EPYC, torch 2.3 and 2.15, one thread): its conversions.
BF16_FLOP = 6e7
# glibc's mallopt(3), from malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@cache
def pick_device() -> torch.device:
    """Return this worker's GPU, or the CPU, and prepare the process for it, once.

    Slurm shows each task its own GPU as number 0.

    Raises:
        Unusable: a GPU was promised, and there is none.
    """
    gpu.check()
    if gpu.ending:
        raise gpu.ending
    if torch.cuda.is_available():
        # torch's advice to a captured step's optimiser, in the steps that warm it up.
        warnings.filterwarnings("ignore", message="This instance was constructed with capturable")
        # TF32 in linear layers; convolutions have it by default.
        torch.set_float32_matmul_precision("high")
        return torch.device("cuda")
    torch.set_flush_denormal(True)  # slow numbers: the Adam moments of units that have died
    keep_freed_memory()
    return torch.device("cpu")


def keep_freed_memory() -> None:
    """Let malloc keep what is freed; by default every large tensor of every step is new memory.

    The kernel clears new memory page by page, which takes up to a third of a small net's step.
    Does nothing where the C library is not glibc.
    """
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # large blocks from the heap, too
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes free at its end before it shrinks
        libc.mallopt(M_TOP_PAD, 64 * 2**20)  # bytes more than needed whenever it grows


def fused_adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Return Adam as one kernel for all parameters; on a CPU, torch has that from 2.4 on."""
    on_gpu = next(model.parameters()).is_cuda
    has_cpu_kernel = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 4)
    # capturable: the step count is on the GPU, where a graph's replay can advance it.
    return torch.optim.Adam(
        model.parameters(), lr=lr, fused=on_gpu or has_cpu_kernel, capturable=on_gpu
    )


def normalise(images: Tensor) -> Tensor:
    """uint8 (n, 1, 28, 28), 0 … 255 → float32 of mean 0 and deviation 1 in one operation."""
    shift = torch.full((), -MEAN / STD, device=images.device)
    return torch.add(shift, images, alpha=1 / (255 * STD))


@cache
def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 by instructions of its own; without, bf16 is slower."""
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def gpu_has_bf16(device: torch.device) -> bool:
    """Whether this is a GPU that computes in bf16."""
    # Not is_bf16_supported(): it says yes to GPUs that only emulate it, slowly.
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def forward_flop(model: nn.Module, images: Tensor) -> int:
    """Return the floating-point operations of a forward pass: those of the layers' weights.

    A copy of the model is tried with `images`, (n, 1, 28, 28) float32.  torch.utils.flop_counter
    says the same, but takes a second for its imports.
    """
    flop = 0

    def count(layer: nn.Module, inputs: object, output: object) -> None:
        nonlocal flop
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor) and isinstance(output, Tensor):
            flop += 2 * weight.numel() * output.numel() // len(weight)

    tried = copy.deepcopy(model).eval()
    for layer in tried.modules():
        layer.register_forward_hook(count)
    with torch.no_grad():
        tried(images)
    return flop


class Trainer:
    """Trains one model epoch by epoch; on a GPU, each step after the first is one CUDA graph.

    The graph and its memory go when the trainer does: keep it in a local variable.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, data: Images, batch_size: int
    ) -> None:
        """Prepare; nothing is captured before the first epoch, so load a checkpoint before that.

        Args:
            model: (n, 1, 28, 28) float32 → (n, classes) float32 logits, on the device of `data`.
            optimizer: of the model's parameters; on a GPU one that is `capturable`.
            data: the training images.
            batch_size: images per step.
        """
        self.model, self.optimizer, self.data = model, optimizer, data
        device = data.images.device
        self.steps = len(data.labels) // batch_size  # per epoch
        # What a replay reads and writes, at addresses that never change.
        self.batches = torch.zeros(self.steps, batch_size, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # row of `batches`
        self.total = torch.zeros((), device=device)  # training loss, summed over the steps
        self.bf16 = device.type == "cpu" and has_bf16()
        if self.bf16:
            one = normalise(data.images[:1])
            self.bf16 = batch_size * forward_flop(model, one) > BF16_FLOP
        self.captured = CapturedStep(self._step, model, optimizer)

    def train_epoch(self) -> Tensor:
        """Train on every image once, in random order, and return the mean training loss.

        The images that fill no whole batch are left out; another order next time brings them in.
        The loss is a tensor, () float32: whoever reads its value waits for the GPU.
        """
        self.model.train()
        order = torch.randperm(len(self.data.labels), device=self.position.device)
        self.batches.copy_(order[: self.batches.numel()].view_as(self.batches))
        self.position.zero_()
        self.total.zero_()
        self.captured.take(self.steps)
        return self.total / self.steps

    def _step(self) -> None:
        """One step on the batch at `position`: run eagerly, or recorded once and replayed."""
        images, labels = self._gather()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.model(images)
        loss = functional.cross_entropy(logits.float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        self.position += 1
        self.total += loss.detach()

    def _gather(self) -> tuple[Tensor, Tensor]:
        """Return the batch at `position`: images (n, 1, 28, 28) float32, labels (n,) int64."""
        batch = self.batches.index_select(0, self.position).squeeze(0)
        images = self.data.images.index_select(0, batch)
        return normalise(images), self.data.labels.index_select(0, batch)


@torch.inference_mode()
def evaluate(model: nn.Module, data: Images) -> tuple[float, float]:
    """Return the mean cross-entropy loss and the accuracy (0 … 1) over all of `data`."""
    model.eval()
    sums = torch.zeros(2, device=data.images.device)  # of the losses and of the right answers
    for start in range(0, len(data.labels), EVALUATION_BATCH):
        labels = data.labels[start : start + EVALUATION_BATCH]
        logits = model(normalise(data.images[start : start + EVALUATION_BATCH]))
        sums[0] += functional.cross_entropy(logits, labels, reduction="sum")
        sums[1] += (logits.argmax(1) == labels).sum()
    means = (sums / len(data.labels)).tolist()  # the one time in an epoch that the host waits
    return cast("tuple[float, float]", tuple(means))
