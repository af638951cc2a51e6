"""What a worker of storage_kill_table.py runs: four epochs of 0.3 s, resumed after a report."""

from __future__ import annotations

import os
import time
from pathlib import Path

import optuna

from hpo.settings import run_script
from hpo.study.optuna_private import trial_id
from hpo.worker import run_worker

FOLDER = Path(os.environ["STORM"])
TRIALS, KILLS, WORKERS = (int(word) for word in os.environ["STORM_SIZE"].split())


def objective(trial: optuna.Trial) -> float:
    """Say that this process holds a trial, and train."""
    x = trial.suggest_float("x", -1, 1)
    holds = FOLDER / f"holds-{os.environ['WORKER_RANK']}"
    holds.write_text(str(os.getpid()))
    # As many trials as kills: on a slow machine the study would be complete before the last kill.
    while trial.number > WORKERS + TRIALS * (FOLDER / "kills").stat().st_size / KILLS:
        time.sleep(0.01)
    done = trial.storage.get_trial(trial_id(trial)).intermediate_values
    for epoch in range(len(done), 4):
        time.sleep(0.3)
        trial.report(x * x + epoch, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    holds.unlink()
    return x * x


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
