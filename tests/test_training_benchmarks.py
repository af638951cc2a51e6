"""The benchmarks run: a smoke test with the least work, which times nothing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from training_result import MIDDLE, rank_correlation, train_both

from common import BUNDLE

FOLDER = BUNDLE / "tests" / "benchmarks"


# What training.py measures by itself are minutes.
LESS = f"""
import sys; sys.path[0] = {str(FOLDER)!r}
import training
training.GOAL_FLOP = 1e8
training.main()
"""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-c", LESS, "--rounds", "1", "--configurations", "1"], "ours against the guide"),
        ([str(FOLDER / "study.py"), "--trials", "2"], "2 trials in"),
    ],
    ids=["training", "study"],
)
def test_benchmark_runs(arguments: list[str], says: str) -> None:
    command = [sys.executable, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=600)
    assert result.returncode == 0, result.stderr
    assert says in result.stdout


def test_ours_learns_what_eager_float32_learns() -> None:
    (loss, accuracy), (our_loss, our_accuracy) = train_both(MIDDLE, seed=0, images=1000, epochs=2)
    assert our_loss == pytest.approx(loss, rel=1e-2)
    assert our_accuracy == pytest.approx(accuracy, abs=5e-3)


def test_rank_correlation() -> None:
    assert rank_correlation([1.0, 2.0, 3.0], [5.0, 7.0, 9.0]) == 1
    assert rank_correlation([1.0, 2.0, 3.0], [9.0, 7.0, 5.0]) == -1
