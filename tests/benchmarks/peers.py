"""The same 16 short trials, two at a time, through Ray Tune and through this bundle.

    python tests/benchmarks/peers.py                 three rounds, about twenty minutes
    python tests/benchmarks/peers.py --rounds 1

You should see one line per round, and then the medians, for each of two lengths of a trial: the
shorter it is, the more the time is that of what stands around it.  Each time is that of whole
commands, with the start of their processes:

    Ray, guide   Ray Tune with the training loop of the published guide, as its user writes it
    Ray, ours    Ray Tune with the bundle's train_model
    bundle       init_optuna_db.py, and two workers with the bundle's train_model
    floor        the bundle's train_model in two bare processes: no study, nothing written

A trial is the same on all sides: two epochs of 500 images, and then of 2 000.  "Noise" is the
bundle against the bundle.  Ray Tune is installed into a temporary environment of its own, which
uses this one's torch; that is not part of the time.
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
from collections.abc import Callable, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "code_and_slurm-scripts"
RAY = "ray[tune]==2.60.0"
TRIALS = 16
IMAGES = 500, 2000
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
INIT = """
import init_optuna_db
from hpo.settings import Settings; from hpo.study.opening import open_study
from peers import CONFIG, RATES
init_optuna_db.main()
study = open_study(Settings.from_env())
for lr in RATES: study.enqueue_trial({**CONFIG, "lr": lr})
"""
FLOOR = """
import os, optuna_mnist
from peers import CONFIG, RATES
for lr in RATES[int(os.environ["WORKER_RANK"])::2]:
    optuna_mnist.train_model({**CONFIG, "num_classes": 10, "lr": lr})
"""


def make_beside(folder: Path, packages: Sequence[str]) -> str:
    """Install packages beside this environment's; return the Python that has both."""
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    place = next((folder / "lib").glob("python*/site-packages"))
    (place / "beside.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def run_ray(python: str, loop: str, folder: Path, env: dict[str, str]) -> float:
    """Return the seconds of the trials through Ray Tune."""
    begin = time.monotonic()
    command = [python, str(HERE / "peers_ray.py"), loop, str(folder), *map(str, RATES)]
    env = {**env, "HOME": str(folder)}  # Ray leaves a token there
    log = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = time.monotonic() - begin
    assert f"{TRIALS} trials have a result" in log, log
    return seconds


def run_bundle(folder: Path, env: dict[str, str]) -> float:
    """Return the seconds of the same trials through two workers."""
    env = {**env, "STUDY_DB": f"sqlite:///{folder}/study.db", "TOTAL_TRIALS": str(TRIALS)}
    env |= {"PRUNER": "none"}
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", INIT], cwd=SCRIPTS, env=env, check=True)
    run_both(["optuna_mnist.py"], env)
    seconds = time.monotonic() - begin
    report = subprocess.check_output(
        [sys.executable, "check_best_model.py"], cwd=SCRIPTS, env=env, text=True
    )
    assert f"{TRIALS} of {TRIALS} trials: {TRIALS} complete" in report, report
    return seconds


def run_both(arguments: list[str], env: dict[str, str]) -> float:
    """Return the seconds of two processes at once, whose WORKER_RANK is 0 and 1."""
    begin = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=SCRIPTS,
            env={**env, "WORKER_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    return time.monotonic() - begin


def compare(python: str, rounds: int, folder: Callable[[], Path], env: dict[str, str]) -> None:
    """Run all in turn and print the times and the medians of the ratios."""
    table = []
    for _ in range(rounds):
        times = {
            "Ray, guide": run_ray(python, "guide", folder(), env),
            "bundle": run_bundle(folder(), env),
            "Ray, ours": run_ray(python, "ours", folder(), env),
            "noise": run_bundle(folder(), env),
            "floor": run_both(["-c", FLOOR], env),
        }
        table.append({key: seconds / times["bundle"] for key, seconds in times.items()})
        print(*(f"{key} {seconds:.1f} s;" for key, seconds in times.items()), flush=True)
    print(f"trials of {env['TRAIN_IMAGES']} images, two epochs:")
    for key in table[0]:
        print(
            f"    {key:12}{statistics.median(row[key] for row in table):5.2f} × the bundle's time"
        )


def main() -> None:
    """Install Ray Tune and compare at each length of a trial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    # In a fresh clone the images are packed, and the guide's loop does not unpack them.
    subprocess.run(
        [sys.executable, "-c", "from hpo.train import mnist; mnist.prepare()"],
        cwd=SCRIPTS,
        check=True,
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{SCRIPTS}:{HERE}"}
    with tempfile.TemporaryDirectory() as name:
        python = make_beside(Path(name) / "ray", [RAY])
        for images in IMAGES:
            compare(
                python,
                rounds,
                lambda: Path(tempfile.mkdtemp(dir=name)),
                {**env, "TRAIN_IMAGES": str(images)},
            )
    print(f"load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
