"""Does the fast way change the result?  Against eager float32, with the same seeds.

    python tests/benchmarks/training_result.py        about ten minutes on two cores

Two comparisons, each on a part of the images so that a CPU can do it; validation always has all of
its 10 000:

    seeds            one net, 30 seeds, 5 000 images, 2 epochs: the mean difference in accuracy
                     and its standard error, in percentage points (wanted: within 0.05)
    configurations   32 drawn from the search space, 1 000 images, 1 epoch: the rank correlation
                     (Spearman) of their validation losses (wanted: 0.95 or more)

"eager" is the guide's net and optimiser on resident images (training_arms.py): the same initial
weights and the same order of the images.
"""

from __future__ import annotations

import os
import statistics
import sys
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts"), str(ROOT / "tests" / "helpers")]

from training import machine  # noqa: E402
from training_arms import GuideNet, eager, our_trainer  # noqa: E402

from hpo.train import mnist  # noqa: E402
from hpo.train.training import evaluate, pick_device  # noqa: E402
from optuna_mnist import search_space  # noqa: E402

SEEDS, CONFIGURATIONS = 30, 32
MIDDLE = {
    "lr": 1e-3,
    "batch_size": 64,
    "conv1_channels": 16,
    "conv2_channels": 32,
    "kernel1": 3,
    "kernel2": 3,
    "fc_dim": 128,
}


def train_both(
    config: dict[str, Any], seed: int, images: int, epochs: int
) -> list[tuple[float, float]]:
    """Return the validation loss and accuracy of eager float32 and of ours."""
    device = pick_device()
    validation = mnist.load_training(device)[1]
    torch.manual_seed(seed)
    net: nn.Module = GuideNet(config).to(device)
    run = eager(config, images, device, net)
    for _ in range(epochs):
        run()
    torch.manual_seed(seed)
    trainer = our_trainer(config, images, device)
    for _ in range(epochs):
        trainer.train_epoch()
    return [evaluate(model, validation) for model in (net, trainer.model)]


def rank_correlation(first: list[float], second: list[float]) -> float:
    """Return Spearman's coefficient; the values of a list are distinct."""
    ranks = [[sorted(values).index(value) for value in values] for values in (first, second)]
    return statistics.correlation(*ranks)


def main() -> None:
    """Run both comparisons."""
    torch.set_num_threads(1)
    print(f"{machine()[0]}; load {os.getloadavg()[0]:.1f}", flush=True)
    pairs = [train_both(MIDDLE, seed, 5_000, 2) for seed in range(SEEDS)]
    differences = [100 * (ours[1] - reference[1]) for reference, ours in pairs]
    error = statistics.stdev(differences) / SEEDS**0.5
    print(
        f"{SEEDS} seeds: accuracy {100 * statistics.mean(p[0][1] for p in pairs):.3f} % eager, "
        f"{100 * statistics.mean(p[1][1] for p in pairs):.3f} % ours; difference "
        f"{statistics.mean(differences):+.4f} ± {error:.4f} points",
        flush=True,
    )
    sampler = optuna.samplers.RandomSampler(seed=0)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler)
    configs = [search_space(study.ask()) for _ in range(CONFIGURATIONS)]
    pairs = [train_both(config, 0, 1_000, 1) for config in configs]
    losses = [[pair[way][0] for pair in pairs] for way in range(2)]
    print(f"{CONFIGURATIONS} configurations: rank correlation {rank_correlation(*losses):.4f}")


if __name__ == "__main__":
    main()
