"""A worker with a finite space of 12 combinations and no torch.  Run by test_samplers.py.

With GATE, the name of a file, trial 4 and all later ones wait until that is there.
"""

from __future__ import annotations

import os
import time
from typing import Any

import optuna

from hpo.settings import run_script
from hpo.worker import run_worker


def search_space(trial: optuna.Trial) -> dict[str, Any]:
    """Return one of 3 × 4 combinations; with SPACE=branches, of 2 + 3; else as SPACE says."""
    kind = os.environ.get("SPACE", "")
    if kind == "branches":
        a = trial.suggest_categorical("a", ["left", "right"])
        if a == "left":
            return {"a": a, "b": trial.suggest_int("b", 1, 2)}
        return {"a": a, "c": trial.suggest_float("c", 0.0, 1.0, step=0.5)}
    if kind == "continuous":
        return {"lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True)}
    if kind == "huge":
        return {name: trial.suggest_int(name, 1, 100) for name in "abc"}
    return {"a": trial.suggest_categorical("a", [1, 2, 4]), "b": trial.suggest_int("b", 0, 3)}


def objective(trial: optuna.Trial) -> float:
    """Return a number that depends on the values."""
    config = search_space(trial)
    gate = os.environ.get("GATE")
    while gate and trial.number >= 4 and not os.path.exists(gate):
        time.sleep(0.05)
    time.sleep(0.05)
    return float(sum(value for value in config.values() if not isinstance(value, str)))


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
