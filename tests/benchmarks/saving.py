"""What saving costs a trial: each state waited for, and written while the trial goes on.

    python tests/benchmarks/saving.py                  100 million parameters: about two minutes
    python tests/benchmarks/saving.py --million 10     a first look
    TMPDIR=/tmpdir/USER python tests/benchmarks/…      the same on another file system

A net trains with Adam on a GPU if there is one, in epochs of about --seconds; each is saved, as in
a study.  You should see the machine and one line per way: for how long checkpoint.save held an
epoch up, and how long the epoch was, with its share of the wait at the trial's end.  "none" saves
nothing.  The ways take turns, --rounds times; the medians over the rounds are shown.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts")]

import optuna  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from hpo import checkpoint  # noqa: E402
from hpo.saving import background, trial_files  # noqa: E402
from hpo.settings import Settings  # noqa: E402
from hpo.study.opening import create_or_open_study  # noqa: E402

WAYS = {"none": False, "waited for": False, "in the background": True}
EPOCHS = 3  # of each way in a round


class Training:
    """A net of one square layer, whose steps take what they take."""

    def __init__(self, million: int) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        width = int((1e6 * million) ** 0.5)
        self.model = nn.Linear(width, width, bias=False, device=self.device)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.images = torch.randn(64, width, device=self.device)

    def train(self, steps: int) -> float:
        """Take so many steps; return the seconds they took."""
        begin = time.perf_counter()
        for _ in range(steps):
            self.optimizer.zero_grad()
            loss = self.model(self.images).square().mean()
            loss.backward()
            self.optimizer.step()
        loss.item()  # a GPU has done them all
        return time.perf_counter() - begin


def epochs(training: Training, steps: int, trial: optuna.Trial, way: str) -> list[float]:
    """Return the seconds of an epoch in which saving held it up, and all its seconds: means."""
    worth_it: Callable[[], bool] = lambda: WAYS[way]  # noqa: E731
    background.worth_it = worth_it
    held, begin = 0.0, time.perf_counter()
    for _ in range(EPOCHS):
        training.train(steps)
        saving = time.perf_counter()
        if way != "none":
            checkpoint.save(trial, training.model, training.optimizer, [1.0])
        held += time.perf_counter() - saving
    checkpoint.wait()  # as at the end of a trial
    return [held / EPOCHS, (time.perf_counter() - begin) / EPOCHS]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--million", type=int, default=100, help="parameters")
    parser.add_argument("--seconds", type=float, default=5.0, help="of an epoch")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    training = Training(asked.million)
    training.train(2)
    steps = max(1, round(asked.seconds / training.train(2) * 2))
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["STUDY_DB"] = f"sqlite:///{folder}/study.db"
        trial = create_or_open_study(Settings.from_env()).ask()
        for _ in range(asked.rounds):
            for way, rounds in found.items():
                rounds.append(epochs(training, steps, trial, way))
        size = trial_files.state_path(trial.number).stat().st_size
    print(f"torch {torch.__version__}, {training.device}, {os.cpu_count()} cores: a state of")
    print(f"{size / 1e9:.2f} GB after each epoch of {steps} steps, {asked.rounds} rounds")
    print(f"{'':18}{'held up':>10}{'epoch':>10}")
    for way, rounds in found.items():
        held, whole = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"{way:18}{held:8.2f} s{whole:8.2f} s")


if __name__ == "__main__":
    main()
