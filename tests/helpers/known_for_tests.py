"""A worker whose study begins with what is known, and needs no torch.  test_known, test_finals."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from hpo.settings import forget, run_script
from hpo.worker import run_worker
from storage_helpers import fork

LAYERS: Any = [(8, 8), (4,)]  # tuples: JSON has lists alone


def search_space(trial: optuna.Trial) -> dict[str, Any]:
    """Return one of infinitely many configurations; with SPACE=finite, of 3 × 4."""
    if os.environ.get("SPACE") == "finite":
        return {"a": trial.suggest_categorical("a", [1, 2, 4]), "b": trial.suggest_int("b", 0, 3)}
    return {
        "x": trial.suggest_float("x", -1, 1),
        "layers": trial.suggest_categorical("layers", LAYERS),
    }


def known_good() -> list[dict[str, Any]]:
    """Return two configurations, of which one is named twice."""
    if os.environ.get("SPACE") == "finite":
        return [{"a": 4, "b": 2}, {"a": 2}, {"b": 2, "a": 4}]
    return [{"x": 0.25, "layers": (4,)}, {"x": 0.5}, {"layers": [4], "x": 0.25}]


def objective(trial: optuna.Trial) -> float:
    """Return a number that depends on the configuration, and a little on the seed."""
    value = sum(v**2 for v in search_space(trial).values() if not isinstance(v, tuple))
    for epoch in range(2):
        time.sleep(float(os.environ.get("EPOCH", "0")))
        trial.report(value, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return float(value + trial.number * 1e-6)


def other_study(path: Path, xs: list[float], name: str = "old", **more: float) -> str:
    """Make a study whose trials have these values of x, the best in the middle of [-1, 1]."""
    study = optuna.create_study(storage=f"sqlite:///{path}", study_name=name)
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(-9, 9)}
    space |= {key: FloatDistribution(0, 1) for key in more}
    for x in xs:
        study.add_trial(
            optuna.create_trial(value=x * x, params={"x": x, **more}, distributions=space)
        )
    return f"{path}:{name}"


def start(rank: int) -> int:
    """Start a worker in a forked process, which has Optuna already; return its id."""

    def work() -> None:
        sys.argv, sys.stdout = ["known_for_tests.py"], sys.stderr
        os.environ["WORKER_RANK"] = str(rank)
        forget()
        assert run_worker(objective) == 0

    return fork(work)


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
