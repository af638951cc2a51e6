"""The same 16 short trials, two at a time, through Ray Tune and through this bundle.

    python tests/benchmarks/peers.py                 three rounds, about ten minutes
    python tests/benchmarks/peers.py --rounds 1

Ray Tune is installed into a temporary environment of its own, which uses this one's torch; that is
not part of the time.  Both train the same function on the same configurations: 2 000 images, two
epochs.  The time is that of the whole command, with the start of its processes: `ray.init` and the
trials on one side, init_optuna_db.py and two workers on the other.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "code_and_slurm-scripts"
RAY = "ray[tune]==2.60.0"
TRIALS = 16
CONFIG = {
    "batch_size": 64,
    "conv1_channels": 8,
    "conv2_channels": 16,
    "kernel1": 3,
    "kernel2": 3,
    "fc_dim": 64,
    "epochs": 2,
}
RATES = [1e-4 * 50 ** (number / (TRIALS - 1)) for number in range(TRIALS)]
ENQUEUE = """
from hpo.settings import Settings; from hpo.storage import create_or_open_study
from peers import CONFIG, RATES
study = create_or_open_study(Settings.from_env())
for lr in RATES: study.enqueue_trial({**CONFIG, "lr": lr})
"""


def make_ray(folder: Path) -> str:
    """Install Ray Tune beside this environment's packages; return its Python."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", RAY], check=True)
    packages = next((folder / "lib").glob("python*/site-packages"))
    (packages / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run_ray(python: str, folder: Path, env: dict[str, str]) -> float:
    """Return the seconds of the trials through Ray Tune."""
    begin = time.monotonic()
    command = [python, str(HERE / "peers_ray.py"), str(folder), *map(str, RATES)]
    env = {**env, "HOME": str(folder)}  # Ray leaves a token there
    log = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.monotonic() - begin
    assert f"{TRIALS} trials have a result" in log, log
    return seconds


def run_ours(folder: Path, env: dict[str, str]) -> float:
    """Return the seconds of the same trials through two workers."""
    env = {**env, "STUDY_DB": f"sqlite:///{folder}/study.db", "TOTAL_TRIALS": str(TRIALS)}
    env |= {"PRUNER": "none", "PYTHONPATH": f"{SCRIPTS}:{HERE}"}
    begin = time.monotonic()
    subprocess.run([sys.executable, "init_optuna_db.py"], cwd=SCRIPTS, env=env, check=True)
    subprocess.run([sys.executable, "-c", ENQUEUE], cwd=SCRIPTS, env=env, check=True)
    workers = [
        subprocess.Popen(
            [sys.executable, "optuna_mnist.py"],
            cwd=SCRIPTS,
            env={**env, "WORKER_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [worker.wait() for worker in workers] == [0, 0]
    seconds = time.monotonic() - begin
    report = subprocess.check_output(
        [sys.executable, "check_best_model.py"], cwd=SCRIPTS, env=env, text=True
    )
    assert f"{TRIALS} of {TRIALS} trials: {TRIALS} complete" in report, report
    return seconds


def main() -> None:
    """Run both in turn and print the times and the median of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TRAIN_IMAGES": "2000"}
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        top = Path(name)
        python = make_ray(top / "ray")
        for number in range(rounds):
            folder = top / str(number)
            folder.mkdir()
            peer, ours = run_ray(python, folder, env), run_ours(folder, env)
            again = run_ours(Path(tempfile.mkdtemp(dir=top)), env)
            ratios.append(peer / ours)
            print(
                f"Ray Tune {peer:.1f} s, this bundle {ours:.1f} s: {peer / ours:.1f} ×; "
                f"noise (this bundle again) {again / ours:.2f} ×",
                flush=True,
            )
    print(f"median {statistics.median(ratios):.1f} ×; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
