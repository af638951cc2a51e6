#!/usr/bin/env python3
"""Two ways to search on your own problem: real studies, real workers, the same number of epochs.

    python tests/benchmarks/samplers.py                     the old defaults and the new, on MNIST
    PY_SCRIPT=my_model.py TRIALS=50 SEEDS=5 python tests/benchmarks/samplers.py
    python tests/benchmarks/samplers.py "SAMPLER=random PRUNER=none" "SAMPLER=tpe PRUNER=halving"

Also from the environment: WORKERS (2), TRAIN_IMAGES (1000), DIRECTION and whatever else the script
needs.  Each study is in a temporary folder of its own.  You should see a row for each seed: the
epochs after which both are compared (the fewer that one of the two has trained), the best value of
each by then, and the trials that had ended; at the end the mean difference with its standard error.
A difference smaller than twice its error is chance.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

BUNDLE = Path(__file__).resolve().parent.parent.parent
SCRIPTS = BUNDLE / "code_and_slurm-scripts"
sys.path.insert(0, str(SCRIPTS))

import numpy as np  # noqa: E402
import optuna  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

from hpo.settings import UserError, run_script  # noqa: E402

WORKERS = int(os.environ.get("WORKERS", "2"))
TRIALS = os.environ.get("TRIALS", "24")
SEEDS = int(os.environ.get("SEEDS", "5"))
PY_SCRIPT = os.environ.get("PY_SCRIPT", "optuna_mnist.py")
DEFAULTS = ("SAMPLER=tpe:count_pruned=True PRUNER=median", "SAMPLER=tpe PRUNER=halving")
ROW = "{:>5}{:>8}   {:>12} ({:>4} trials)   {:>12} ({:>4} trials)"


def main() -> int:
    """Run the studies, print a row for each seed, then the difference; return the exit status."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    ways = tuple(sys.argv[1:]) or DEFAULTS
    if len(ways) != 2 or not all("=" in word for way in ways for word in way.split()):
        raise UserError('give two ways to search, such as "SAMPLER=random PRUNER=none"')
    maximize = os.environ.get("DIRECTION", "").lower() == "maximize"
    print(*(f"{letter}: {way}" for letter, way in zip("AB", ways, strict=True)), sep="\n")
    print(f"{'seed':>5}{'epochs':>8}   {'A':>12}{'':>17}{'B':>9}")
    differences = []
    for seed in range(SEEDS):
        pair = [ended(way, seed) for way in ways]
        epochs = min(sum(len(trial.intermediate_values) for trial in trials) for trials in pair)
        (a, n), (b, m) = (best_within(trials, epochs, maximize) for trials in pair)
        print(ROW.format(seed, epochs, f"{a:.4g}", n, f"{b:.4g}", m), flush=True)
        differences.append(b - a)
    error = np.std(differences, ddof=1) / np.sqrt(SEEDS) if SEEDS > 1 else float("nan")
    print(f"B - A: {np.mean(differences):+.4g} ± {error:.2g}")
    return 0


def ended(way: str, seed: int) -> list[FrozenTrial]:
    """Run one study and return its trials in the order in which they ended.

    Raises:
        UserError: a worker has failed; it has said why.
    """
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/study.db"
        given = dict(word.split("=", 1) for word in way.split())
        env = {"TRAIN_IMAGES": "1000", **os.environ, **given, "STUDY_DB": url, "STUDY_NAME": "try",
               "SEED": str(seed), "TOTAL_TRIALS": TRIALS, "OMP_NUM_THREADS": "1"}  # fmt: skip
        workers = [
            subprocess.Popen([sys.executable, str(SCRIPTS / PY_SCRIPT)], cwd=SCRIPTS,
                             env={**env, "WORKER_RANK": str(rank)}, stdout=subprocess.DEVNULL)
            for rank in range(WORKERS)
        ]  # fmt: skip
        statuses = [worker.wait() for worker in workers]
        if any(statuses):
            raise UserError(f"{way}: a worker has failed")
        trials = optuna.load_study(study_name="try", storage=url).get_trials()
    return sorted(trials, key=lambda trial: str(trial.datetime_complete))


def best_within(trials: list[FrozenTrial], epochs: int, maximize: bool) -> tuple[float, int]:
    """Return the best value of the trials that have ended within so many epochs, and how many."""
    best, spent, count = float("nan"), 0, 0
    for trial in trials:
        spent += len(trial.intermediate_values)
        if spent > epochs:
            break
        count += 1
        if trial.state == TrialState.COMPLETE and trial.value is not None:
            better = max(best, trial.value) if maximize else min(best, trial.value)
            best = trial.value if np.isnan(best) else better
    return best, count


if __name__ == "__main__":
    run_script(main)
