"""One step, eager or captured; the data path; what a worker imports; memory that is kept."""

from __future__ import annotations

import math
import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import optuna_mnist
from common import SCRIPTS, SMALL
from hpo.train import mnist, training
from hpo.train.training import Trainer, evaluate, fused_adam, normalise

CONFIG = {**SMALL, "num_classes": 10}
CPU = torch.device("cpu")


def make_trainer(images: int = 640, lr: float = 1e-3, seed: int = 0) -> Trainer:
    """Return a trainer of the smallest net, ten steps an epoch, on the CPU: to the last bit."""
    torch.manual_seed(seed)
    model = optuna_mnist.CNN(CONFIG).to(memory_format=torch.channels_last)
    data, _ = mnist.load_training(CPU, images)
    return Trainer(model, fused_adam(model, lr), data, batch_size=64)


def weights(trainer: Trainer) -> Tensor:
    """Return all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def test_normalise_is_torchvisions() -> None:
    from torchvision import transforms

    steps = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((training.MEAN,), (training.STD,))]
    )
    pixels = torch.arange(256, dtype=torch.uint8).repeat(7)[: 2 * 784].view(2, 1, 28, 28)
    expected = torch.stack([steps(image[0].numpy()) for image in pixels])
    assert normalise(pixels).dtype == torch.float32
    torch.testing.assert_close(normalise(pixels), expected, rtol=1e-5, atol=1e-5)


def test_an_epoch_is_the_plain_loop() -> None:
    trainer = make_trainer(images=700)  # 60 images fill no batch
    plain = make_trainer(images=700)
    torch.manual_seed(1)
    loss = trainer.train_epoch()
    torch.manual_seed(1)
    order = torch.randperm(700)
    losses = []
    for begin in range(0, 640, 64):
        batch = order[begin : begin + 64]
        logits = plain.model(normalise(plain.data.images[batch]))
        losses.append(nn.functional.cross_entropy(logits, plain.data.labels[batch]))
        plain.optimizer.zero_grad()
        losses[-1].backward()  # type: ignore[no-untyped-call]
        plain.optimizer.step()
    assert torch.equal(weights(trainer), weights(plain))
    torch.testing.assert_close(loss, torch.stack(losses).mean().detach())


def test_pooling_before_relu_is_the_same_function() -> None:
    x = torch.randn(4, 3, 28, 28)
    relu, pool = nn.functional.relu, nn.functional.max_pool2d
    assert torch.equal(relu(pool(x, 2)), pool(relu(x), 2))


@pytest.mark.parametrize("lr", [float("nan"), 1e30])
def test_a_loss_that_is_no_number_surfaces(lr: float) -> None:
    trainer = make_trainer()
    for group in trainer.optimizer.param_groups:
        group["lr"] = lr
    trainer.train_epoch()
    loss = float(trainer.train_epoch())
    assert not math.isfinite(loss)
    assert not math.isfinite(evaluate(trainer.model, trainer.data)[0])


def test_forward_flop_is_what_torch_counts_and_leaves_the_model_alone() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = optuna_mnist.CNN(CONFIG)
    images = torch.zeros(3, 1, 28, 28)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    assert training.forward_flop(model, images) == counter.get_total_flops()
    assert model.training
    assert not any(layer._forward_hooks for layer in model.modules())


@pytest.mark.parametrize("cpu_has_it", [True, False])
def test_bf16_for_large_nets_alone_where_the_cpu_has_it(
    cpu_has_it: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "has_bf16", lambda: cpu_has_it)
    data, validation = mnist.load_training(CPU, 1000)
    for channels, is_large in ((8, False), (64, True)):
        ends = []
        for _ in range(2):
            torch.manual_seed(0)
            model = optuna_mnist.CNN({**CONFIG, "conv1_channels": channels})
            trainer = Trainer(model, fused_adam(model, 1e-3), data, 64)
            assert trainer.bf16 == (is_large and cpu_has_it)
            seen = []
            model.conv2.register_forward_hook(lambda *call: seen.append(call[2].dtype))  # noqa: B023
            trainer.train_epoch()
            assert set(seen) == {torch.bfloat16 if trainer.bf16 else torch.float32}
            evaluate(model, validation)
            assert seen[-1] == torch.float32
            ends.append(weights(trainer))
        assert torch.equal(*ends)  # the same seed, the same bits
        assert ends[0].dtype == torch.float32


def test_freed_memory_is_used_again() -> None:
    training.keep_freed_memory()
    trainer = make_trainer()
    trainer.train_epoch()
    trainer.train_epoch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.train_epoch()
    # 10 steps; without keep_freed_memory each has thousands of page faults.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 2000


def test_a_worker_imports_no_torchvision() -> None:
    code = (
        "import sys, optuna_mnist as o; from hpo.train import mnist\n"
        "mnist.load_training(o.pick_device(), 1000); sys.exit('torchvision' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, timeout=600).returncode == 0
