"""A whole study, from the first process to the last result: how many trials an hour?

    python tests/benchmarks/study.py                      500 trials: for a GPU
    python tests/benchmarks/study.py --trials 8           for a CPU
    WORKERS_PER_GPU=4 python tests/benchmarks/study.py    four workers on each GPU

The guide's search space, TPE and the median pruner, in a study of its own in a temporary folder;
one worker per GPU or core, as run-optuna-local.sh starts them.  The time includes the start of the
processes, the evaluation after each epoch, checkpoints, storage, and the best model's test score.
You should see the machine, the study's own report, and a line with the time.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "code_and_slurm-scripts"
sys.path[:0] = [str(SCRIPTS.parent / "tests" / "helpers")]

from training import machine  # noqa: E402

# Starts the daemon that several workers on a GPU share, runs this file's workers, ends the daemon.
WITH_MPS = "source hpo/job/mps.sh; start_mps; trap stop_mps EXIT; "


def launch(env: dict[str, str], gpus: int) -> int:
    """Run the study that `env` describes; return how many workers ended with a failure."""
    per_gpu = int(env.get("WORKERS_PER_GPU", "1"))
    workers = gpus * per_gpu or len(os.sched_getaffinity(0))
    shell = WITH_MPS if gpus and per_gpu > 1 else ""
    for rank in range(workers):
        device = rank % gpus if gpus else -1
        shell += f'WORKER_RANK={rank} CUDA_VISIBLE_DEVICES={device} "$0" optuna_mnist.py & '
    shell += "failed=0; for pid in $(jobs -p); do wait $pid || ((failed += 1)); done; exit $failed"
    subprocess.run([sys.executable, "init_optuna_db.py"], cwd=SCRIPTS, env=env, check=True)
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable], cwd=SCRIPTS, env=env, stdout=subprocess.PIPE
    )
    subprocess.run([sys.executable, "check_best_model.py"], cwd=SCRIPTS, env=env, check=True)
    return done.returncode


def main() -> None:
    """Run one study and print its time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=6)
    options = parser.parse_args()
    name, on_gpu = machine()
    gpus = 0
    if on_gpu:
        import torch

        gpus = torch.cuda.device_count()
    print(f"{name}, {gpus} GPUs; load {os.getloadavg()[0]:.1f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        env = {
            **os.environ,
            "STUDY_DB": f"sqlite:///{folder}/study.db",
            "TOTAL_TRIALS": str(options.trials),
            "SEED": str(options.seed),
        }
        if not gpus:
            env["OMP_NUM_THREADS"] = "1"
        begin = time.monotonic()
        failed = launch(env, gpus)
        seconds = time.monotonic() - begin
    print(
        f"{options.trials} trials in {seconds:.1f} s: "
        f"{3600 * options.trials / seconds:.0f} trials an hour; {failed} workers failed"
    )


if __name__ == "__main__":
    main()
