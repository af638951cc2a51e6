#!/usr/bin/env python3
"""Every sampler, then every pruner, on real MNIST with several workers: the table of README.txt.

    python tests/benchmarks/samplers.py                       2 workers, 24 trials, 1 000 images
    TRIALS=100 TRAIN_IMAGES=50000 python tests/benchmarks/samplers.py     a GPU's size

Each row is a study of its own in a temporary folder, with real worker processes.  You should see
a row every half minute: trials, how many of them pruned, distinct configurations, epochs trained,
the best validation loss.  With so few trials the order of neighbours is chance.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BUNDLE = Path(__file__).resolve().parent.parent.parent
SCRIPTS = BUNDLE / "code_and_slurm-scripts"
sys.path.insert(0, str(SCRIPTS))

import optuna  # noqa: E402

from hpo import packages  # noqa: E402
from hpo.settings import PRUNERS, SAMPLERS, run_script  # noqa: E402

WORKERS = int(os.environ.get("WORKERS", "2"))
TRIALS = os.environ.get("TRIALS", "24")
IMAGES = os.environ.get("TRAIN_IMAGES", "1000")
ROW = "{:12} {:10} {:>6} {:>6} {:>8} {:>6} {:>11} {:>9}"


def main() -> None:
    """Print one row for each sampler, then for each pruner."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(ROW.format("sampler", "pruner", "trials", "pruned", "distinct", "epochs", "best", "time"))
    for sampler in SAMPLERS:
        print(row(sampler, "none"), flush=True)
    for pruner in PRUNERS:
        if pruner != "none":
            print(row("tpe", pruner), flush=True)


def row(sampler: str, pruner: str) -> str:
    """Run one study and return its row."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/study.db"
        settings = {"STUDY_DB": url, "SAMPLER": sampler, "PRUNER": pruner, "SEED": "1"}
        env = {**os.environ, **settings, "TOTAL_TRIALS": TRIALS, "TRAIN_IMAGES": IMAGES,
               "OMP_NUM_THREADS": "1"}  # fmt: skip
        workers = [
            subprocess.Popen([sys.executable, str(SCRIPTS / "optuna_mnist.py")],
                             env={**env, "WORKER_RANK": str(rank)}, stdout=subprocess.DEVNULL)
            for rank in range(WORKERS)
        ]  # fmt: skip
        if any(worker.wait() for worker in workers):
            return f"{sampler} {pruner}: a worker failed"
        study = optuna.load_study(study_name="mnist_hpo", storage=url)
        trials = study.get_trials()
        pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in trials)
        distinct = len({tuple(sorted(trial.params.items())) for trial in trials})
        epochs = sum(len(trial.intermediate_values) for trial in trials)
        seconds = f"{time.monotonic() - begin:.0f} s"
        best = f"{study.best_value:.4f}"
    return ROW.format(sampler, pruner, len(trials), pruned, distinct, epochs, best, seconds)


def checked() -> int:
    """Run the benchmark if all that it needs is there; return the exit status."""
    packages.need("This benchmark", "cmaes", "scipy", "torch")
    main()
    return 0


if __name__ == "__main__":
    run_script(checked)
