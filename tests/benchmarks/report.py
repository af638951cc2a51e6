"""What a report costs: CPU seconds and megabytes, for studies of every size.

    python tests/benchmarks/report.py        three minutes, or ten where the disk is slow

You should see a row for each study, with what check_best_model.py --report took from its start to
its end, the largest memory of its process, and the size of report.html.  A report may take 20 s of
CPU and 10 MB, whatever the number of trials.  The studies are made up, as the tests' are.
"""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "code_and_slurm-scripts"
sys.path[:0] = [str(SCRIPTS), str(ROOT / "tests" / "helpers")]

import optuna  # noqa: E402
from optuna.distributions import BaseDistribution, FloatDistribution  # noqa: E402

from fake_study import fill  # noqa: E402
from hpo.settings import Settings  # noqa: E402
from hpo.study.opening import create_or_open_study  # noqa: E402

# name → trials, workers, objectives, parameters (0: those of the examples)
STUDIES = {
    "empty": (0, 1, 1, 0),
    "4 trials": (4, 4, 1, 0),
    "500 trials": (500, 4, 1, 0),
    "500 trials, two objectives": (500, 4, 2, 0),
    "500 trials of 60 parameters": (500, 4, 1, 60),
    "5 000 trials, 64 workers": (5_000, 64, 1, 0),
    "10 000 trials": (10_000, 16, 1, 0),
    "10 000 trials, two objectives": (10_000, 16, 2, 0),
}
LIMITS = 20.0, 10.0  # seconds, megabytes


def with_parameters(study: optuna.Study, trials: int, parameters: int) -> None:
    """Add complete trials of so many parameters, each of which matters less than the one before."""
    rng = random.Random(1)
    space: dict[str, BaseDistribution] = {
        f"parameter_{index}": FloatDistribution(1e-5, 1, log=True) for index in range(parameters)
    }
    for _ in range(trials):
        params = {name: math.exp(rng.uniform(math.log(1e-5), 0)) for name in space}
        value = sum(-math.log(x) / (i + 1) for i, x in enumerate(params.values()))
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=value))


def make(settings: Settings, trials: int, workers: int, objectives: int, parameters: int) -> None:
    """Write a study of that kind into study.db."""
    given = create_or_open_study(settings)
    made = optuna.create_study(directions=["minimize"] * objectives)
    if parameters:
        with_parameters(made, trials, parameters)
    else:
        fill(made, trials, workers)
    given.add_trials(made.get_trials(deepcopy=False))


def cost(environment: dict[str, str], folder: Path) -> tuple[float, float, float]:
    """Return CPU seconds, megabytes of memory, and megabytes of the page of one report.

    Raises:
        RuntimeError: there is no report.
    """
    log = folder / "log.txt"
    command = [sys.executable, "check_best_model.py", "--report", str(folder / "report")]
    child = os.posix_spawnp(
        "sh",
        ["sh", "-c", 'cd "$0" && exec "$@"', str(SCRIPTS), *command],
        environment,
        file_actions=[(os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT, 0o644)],
    )
    _, status, used = os.wait4(child, 0)
    if status:
        raise RuntimeError(f"status {status}: {log.read_text()}")
    size = (folder / "report" / "report.html").stat().st_size / 1e6
    return used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, size


def main() -> None:
    """Print the table."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"{'study':32} {'CPU s':>6} {'memory MB':>10} {'page MB':>8}")
    for name, kind in STUDIES.items():
        with tempfile.TemporaryDirectory() as place:
            given = {"STUDY_DB": f"sqlite:///{place}/study.db", "TOTAL_TRIALS": str(kind[0] or 500)}
            several = {"OBJECTIVES": "loss,parameters", "DIRECTION": "minimize,minimize"}
            given |= several if kind[2] > 1 else {}
            make(Settings.from_env(**given), *kind)
            seconds, memory, size = cost({**os.environ, **given}, Path(place))
        over = "   over the limit" if seconds > LIMITS[0] or size > LIMITS[1] else ""
        print(f"{name:32} {seconds:6.1f} {memory:10.0f} {size:8.1f}{over}", flush=True)


if __name__ == "__main__":
    main()
