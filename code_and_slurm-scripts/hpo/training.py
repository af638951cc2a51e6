"""One epoch of training, and one evaluation, on images that are resident on the device.

    for epoch in range(config["epochs"]):
        train_epoch(model, optimizer, training_images, config["batch_size"])
        loss, accuracy = evaluate(model, validation_images)

The images stay uint8; a batch is gathered and normalised where it is used.  An ordinary loop over
a DataLoader works just as well with everything else in this bundle; it is only slower: torchvision
transforms give 25 000 images/s on one core, indexing a resident tensor about a million.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.mnist import Images

MEAN, STD = 0.1307, 0.3081  # of MNIST's training images scaled to 0 … 1
EVALUATION_BATCH = 1000  # images; bounds the memory of the largest net's activations


def pick_device() -> torch.device:
    """Return this worker's GPU, or the CPU.  Slurm shows each task its own GPU as number 0."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fused_adam(model: nn.Module, lr: float) -> torch.optim.Adam:
    """Return Adam as one kernel for all parameters; on a CPU, torch has that from 2.4 on."""
    on_gpu = next(model.parameters()).is_cuda
    has_cpu_kernel = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 4)
    return torch.optim.Adam(model.parameters(), lr=lr, fused=on_gpu or has_cpu_kernel)


def normalise(images: Tensor) -> Tensor:
    """uint8 (n, 1, 28, 28), 0 … 255 → float32 of mean 0 and deviation 1, channels last."""
    pixels = images.to(torch.float32).div_(255 * STD).sub_(MEAN / STD)
    return pixels.contiguous(memory_format=torch.channels_last)


def train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Images, batch_size: int
) -> float:
    """Train on every image once, in random order, and return the mean training loss.

    The images that fill no whole batch are left out; another order next time brings them in.

    Args:
        model: (n, 1, 28, 28) float32 → (n, classes) float32 logits, on the device of `data`.
        optimizer: of the model's parameters.
        data: the training images.
        batch_size: images per step.
    """
    model.train()
    device = data.images.device
    order = torch.randperm(len(data.labels), device=device)
    total = torch.zeros((), device=device)
    steps = len(order) // batch_size
    for step in range(steps):
        batch = order[step * batch_size : (step + 1) * batch_size]
        loss = functional.cross_entropy(model(normalise(data.images[batch])), data.labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach()
    return total.item() / steps  # the one value that the host reads in an epoch


@torch.inference_mode()
def evaluate(model: nn.Module, data: Images) -> tuple[float, float]:
    """Return the mean cross-entropy loss and the accuracy (0 … 1) over all of `data`."""
    model.eval()
    loss = torch.zeros((), device=data.images.device)
    correct = torch.zeros((), device=data.images.device)
    for start in range(0, len(data.labels), EVALUATION_BATCH):
        labels = data.labels[start : start + EVALUATION_BATCH]
        logits = model(normalise(data.images[start : start + EVALUATION_BATCH]))
        loss += functional.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / len(data.labels), correct.item() / len(data.labels)
