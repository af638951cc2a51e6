"""The ways to train one configuration that `training.py` compares, each in a process of its own.

    python training_arms.py guide|eager|ours THREADS      one JSON request per line, one answer

    guide   what the published guide does: torchvision's MNIST and transforms in a DataLoader, ReLU
            before pooling, float32, Adam as torch makes it, the loss read after every step
    eager   the same net and optimiser on images resident on the device: no DataLoader
    ours    the bundle's CNN and Trainer

The first two are the reference, so they use nothing of the bundle but the folder of the images.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts")]

from hpo.train import mnist  # noqa: E402

Epoch: TypeAlias = Callable[[], object]  # trains on `images` images, and waits until that is done
Config: TypeAlias = dict[str, Any]
MEAN, STD = 0.1307, 0.3081
PEAKS = {"f32": torch.float32, "bf16": torch.bfloat16}


class GuideNet(nn.Module):
    """The guide's net: convolution, ReLU, pooling, twice; (n, 1, 28, 28) → (n, 10) logits."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        conv1, conv2, fc_dim = config["conv1_channels"], config["conv2_channels"], config["fc_dim"]
        self.conv1 = nn.Conv2d(1, conv1, config["kernel1"], padding="same")
        self.conv2 = nn.Conv2d(conv1, conv2, config["kernel2"], padding="same")
        self.fc1 = nn.Linear(conv2 * 7 * 7, fc_dim)
        self.fc2 = nn.Linear(fc_dim, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = functional.max_pool2d(functional.relu(self.conv1(images)), 2)
        x = functional.max_pool2d(functional.relu(self.conv2(x)), 2)
        return self.fc2(functional.relu(self.fc1(x.flatten(1))))  # type: ignore[no-any-return]


def guide(config: Config, images: int, device: torch.device) -> Epoch:
    """Return an epoch of the guide's loop."""
    from torch.utils.data import DataLoader, Subset
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))]
    data = datasets.MNIST(mnist.DATA, train=True, transform=transforms.Compose(steps))
    # More loader processes were slower, on MNIST's small images.
    loader: Any = DataLoader(
        Subset(data, range(images)), config["batch_size"], shuffle=True, drop_last=True
    )
    net = GuideNet(config).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config["lr"])

    def epoch() -> float:
        total = 0.0
        for batch, labels in loader:
            loss = functional.cross_entropy(net(batch.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
        return total

    return epoch


def eager(config: Config, images: int, device: torch.device, net: nn.Module | None = None) -> Epoch:
    """Return an epoch of the guide's net, or of `net`, on resident images."""
    data, _ = mnist.load_training(device, images)
    net = net or GuideNet(config).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=config["lr"])
    size = config["batch_size"]

    def epoch() -> None:
        order = torch.randperm(images, device=device)
        total = torch.zeros((), device=device)
        for begin in range(0, images - size + 1, size):
            batch = order[begin : begin + size]
            pixels = data.images[batch].float().div_(255).sub_(MEAN).div_(STD)
            loss = functional.cross_entropy(net(pixels), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.detach()
        total.item()

    return epoch


def ours(config: Config, images: int, device: torch.device) -> Epoch:
    """Return an epoch of the bundle."""
    trainer = our_trainer(config, images, device)
    return lambda: float(trainer.train_epoch())


def our_trainer(config: Config, images: int, device: torch.device) -> Any:
    """Return the bundle's Trainer, as optuna_mnist.py makes it."""
    from hpo.train.training import Trainer, fused_adam
    from optuna_mnist import CNN

    data, _ = mnist.load_training(device, images)
    model = CNN({**config, "num_classes": 10})
    model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trainer(model, fused_adam(model, config["lr"]), data, config["batch_size"])


def seconds(epoch: Callable[[], Any], device: torch.device) -> float:
    """Return how long one call takes, the device's work included."""
    begin = time.perf_counter()
    epoch()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best of some matrix products, in FLOP/s: what a net can at most come near to."""
    size = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def step_parts(config: Config, images: int, device: torch.device) -> dict[str, float]:
    """Return seconds per step of our data path alone and, on a GPU, of bare graph replays."""
    trainer = our_trainer(config, images, device)
    trainer.train_epoch()

    def repeat(call: Callable[[], Any], number: int = 200) -> float:
        return seconds(lambda: [call() for _ in range(number)], device) / number

    if device.type == "cpu":
        trainer.position.zero_()
        return {"data": repeat(trainer._gather)}
    graph = torch.cuda.CUDAGraph()
    trainer.position.zero_()
    with torch.cuda.graph(graph):
        trainer._gather()
    parts = {"data": repeat(graph.replay)}
    trainer.position.zero_()  # a replay advances it; the epoch has more than 200 steps
    parts["replay"] = repeat(trainer.captured.graph.replay)
    return parts


def main() -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(int(sys.argv[2]))
    if sys.argv[1] == "ours":
        from hpo.train.training import pick_device

        device = pick_device()
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ways: dict[str, Callable[[Config, int, torch.device], Epoch]]
    ways = {"guide": guide, "eager": eager, "ours": ours}
    make = ways[sys.argv[1]]
    for line in sys.stdin:
        request = json.loads(line)
        torch.manual_seed(0)
        config, images = request["config"], request["images"]
        epoch = make(config, images, device)
        # The first epoch warms up; on a GPU ours captures there, too.
        answer = {"first": seconds(epoch, device), "epoch": seconds(epoch, device)}
        if request.get("parts"):
            answer |= {f"peak {name}": gemm_peak(device, dtype) for name, dtype in PEAKS.items()}
            answer |= step_parts(config, images, device)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
