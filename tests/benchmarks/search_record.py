#!/usr/bin/env python3
"""Learning curves of optuna_mnist.py's search space on real MNIST: the table of search.py.

    python tests/benchmarks/search_record.py                      goes on with the table
    python tests/benchmarks/search_record.py --configurations 10  a first look

One line per curve in tests/benchmarks/search-mnist.csv, written when the curve is done: so it can
be stopped at any time, and goes on where it was.  Configuration n is drawn at random, from n alone;
one of twenty is trained with three seeds, which tells noise from merit.  One core; about as long as
the table is (seconds) columns add up to.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUNDLE = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(BUNDLE / "code_and_slurm-scripts"))

import numpy as np  # noqa: E402
import optuna  # noqa: E402
import torch  # noqa: E402

import optuna_mnist  # noqa: E402
from hpo.train import mnist  # noqa: E402
from hpo.train.training import Trainer, evaluate, fused_adam, pick_device  # noqa: E402

TABLE = Path(__file__).with_name("search-mnist.csv")
IMAGES = 300  # to train on, and as many to be judged by
EPOCHS = 5
SEEDED = 20  # one of so many configurations has three seeds
NAMES = ("lr", "batch_size", "conv1_channels", "conv2_channels", "kernel1", "kernel2", "fc_dim")
HEADER = ("configuration", "seed", *NAMES, *(f"loss{n + 1}" for n in range(EPOCHS)), "seconds")


def configuration(number: int) -> dict[str, Any]:
    """Return the configuration of one number, the same on any machine."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=number))
    return optuna_mnist.search_space(study.ask())


def curves(configurations: int) -> Iterator[tuple[int, int]]:
    """Yield the number and the seed of every curve that the table shall have."""
    for number in range(configurations):
        for seed in range(3 if number % SEEDED == 0 else 1):
            yield number, seed


def train(config: dict[str, Any], seed: int) -> list[float]:
    """Return the validation losses after each of EPOCHS epochs, as train_model's."""
    device = pick_device()
    torch.manual_seed(seed)
    images, _ = mnist.load_training(device, IMAGES)
    _, judged = mnist.load_training(device)
    model = optuna_mnist.CNN(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    trainer = Trainer(model, fused_adam(model, config["lr"]), images, config["batch_size"])
    judges = mnist.Images(judged.images[:IMAGES], judged.labels[:IMAGES])
    losses = []
    for _ in range(EPOCHS):
        trainer.train_epoch()
        losses.append(evaluate(model, judges)[0])
    return losses


def done() -> set[tuple[int, int]]:
    """Return the number and the seed of every curve that is in the table."""
    if not TABLE.exists():
        TABLE.write_text(",".join(HEADER) + "\n")
    rows = [line.split(",") for line in TABLE.read_text().splitlines()[1:]]
    return {(int(row[0]), int(row[1])) for row in rows if len(row) == len(HEADER)}


def main() -> None:
    """Train what is missing, one line after another."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configurations", type=int, default=300)
    wanted = parser.parse_args().configurations
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    os.nice(10)
    for number, seed in curves(wanted):
        if (number, seed) in done():
            continue
        config, begin = configuration(number), time.process_time()
        losses = train(config, seed)
        values = [*(config[name] for name in NAMES), *(np.float32(loss) for loss in losses)]
        words = [f"{value:.4g}" for value in (*values, time.process_time() - begin)]
        with TABLE.open("a") as table:
            table.write(",".join((str(number), str(seed), *words)) + "\n")
        print(number, seed, *words, flush=True)


if __name__ == "__main__":
    main()
