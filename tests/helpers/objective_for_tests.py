"""A worker with an objective that needs no torch: what BEHAVIOUR says.  Run by test_worker.py."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import optuna

from hpo.settings import run_script
from hpo.worker import run_worker


def objective(trial: optuna.Trial) -> float:
    """Behave as the test asks; by default return x² after one report."""
    x = trial.suggest_float("x", -1, 1)
    behaviour = os.environ.get("BEHAVIOUR", "")
    if behaviour == "raise" or (behaviour == "raise once" and trial.number == 0):
        raise ValueError("no such layer\nsecond line")
    if behaviour == "memory" and trial.number == 0:
        raise MemoryError("8 GiB asked for")
    if behaviour == "nan" and trial.number == 0:
        return float("nan")
    if behaviour == "usr1" and trial.number == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    if behaviour == "die of SIGTERM":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if behaviour in ("sleep", "die of SIGTERM"):
        print("asleep", flush=True)
        time.sleep(600)
    if behaviour == "image gone":
        try:
            print("asleep", flush=True)
            time.sleep(600)
        finally:
            raise OSError("Transport endpoint is not connected")
    if behaviour == "leave once" and not os.path.exists(os.environ["LEFT"]):
        open(os.environ["LEFT"], "x").close()
        os._exit(0)  # as some libraries do
    if gates := os.environ.get("GATES"):
        wait_at(Path(gates), trial.number)
    if behaviour == "slow":
        time.sleep(0.2)
    for epoch in range(1000 if behaviour == "epochs" else 1):
        trial.report(x * x, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
        if behaviour == "epochs":
            pass_time(10.0)
    return "nothing" if behaviour == "text" else x * x  # type: ignore[return-value]


def wait_at(gates: Path, number: int) -> None:
    """Say that this process has come to a trial, and wait until the test opens its gate."""
    (gates / f"process {os.getpid()}").touch()
    while not (gates / f"{number}").exists():
        time.sleep(0.05)


def pass_time(seconds: float) -> None:
    """Let this process believe that an epoch has taken so long."""
    now = time.time
    time.time = lambda: now() + seconds


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
