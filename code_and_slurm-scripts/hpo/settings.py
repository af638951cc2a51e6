"""The environment variables of the bundle, read once and checked here, before a GPU is used.

Every script calls `Settings.from_env()`.  The names are those of the USER CONFIG block in
run-optuna-multinode_Turpan.sh and of README.txt:

    STUDY_DB       where the study is stored     sqlite:///study.db (in the scripts' folder)
    STUDY_NAME     its name in that database     mnist_hpo
    TOTAL_TRIALS   trials in the whole study     500
    PY_SCRIPT      the script with the objective optuna_mnist.py
    DIRECTION      minimize or maximize          minimize (or one for each of OBJECTIVES)
    OBJECTIVES     loss,parameters               none: the script's first, alone
    SAMPLER        see hpo/samplers.py           tpe
    PRUNER         see hpo/samplers.py           median
    SEED           of the samplers and models    none: every start is different
    TRAIN_IMAGES   images that a trial trains on 50000 (fewer for a quick try)
    WORKERS_PER_GPU workers that share one GPU   1
    GPUS_PER_TRIAL GPUs that share one trial     1
    DATA           pairs of texts for T5         none: French numbers
    SMALL          1: a search space for laptops 0
    KEEP_BEST      best trials whose weights stay on disk  3
    LEASE_GRACE    seconds without a sign of life after which a trial goes back to the queue  60

The launch scripts set WORKER_RANK or SLURM_PROCID, SLURM_JOB_ID, SLURM_JOB_END_TIME (Unix seconds),
DRAIN_FILE (hpo/drain.py) and ALIVE_JOBS (the user's jobs in Slurm's queue).

This module and hpo/gpu.py import nothing but the standard library, so that they start at once on a
login node.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from urllib.parse import urlsplit

from hpo import gpu

SCRIPTS = Path(__file__).resolve().parent.parent  # code_and_slurm-scripts/
SQLITE_PREFIX = "sqlite:///"
SERVER_URLS = ("postgresql", "mysql", "journal", "grpc")  # besides sqlite; see hpo/storage.py
SAMPLERS = ("tpe", "random", "grid", "cmaes", "bruteforce", "nsgaii", "gp", "qmc")
PRUNERS = ("median", "percentile", "halving", "hyperband", "wilcoxon", "none")
DIRECTIONS = ("minimize", "maximize")
TRAIN_IMAGES = 50_000  # of the 60 000; the other 10 000 are for validation


class UserError(Exception):
    """A mistake that the person at the keyboard can mend: one or two lines, exit status 2."""


@dataclass(frozen=True)
class Settings:
    """One checked value for every environment variable of the table above."""

    study_db: str  # a URL; for SQLite always with an absolute path
    study_name: str
    total_trials: int
    py_script: str  # file name of the script with the objective
    direction: str  # of the first objective
    directions: tuple[str, ...]  # of all
    objectives: tuple[str, ...]  # names; () for the one of the script
    sampler: str
    pruner: str
    seed: int | None
    train_images: int
    workers_per_gpu: int  # the launch scripts start them
    gpus_per_trial: int  # hpo/ddp.py
    data: Path | None  # a file of the user's own; None for the data of the script
    small: bool  # the script's search space for a laptop
    keep_best: int  # trials whose weights are kept
    lease_grace: float  # seconds
    rank: int  # of this worker among the workers of its job: 0, 1, …
    job_id: str  # of Slurm, with ".1" after the first requeue; "" outside of it
    job_end: float  # Unix seconds; infinite where nothing ends the job
    drain_file: Path | None  # workers stop when it exists
    alive_jobs: frozenset[str] | None  # ids; None where nobody asked Slurm

    @classmethod
    def from_env(cls, **overrides: str) -> Settings:
        """Read the environment; keyword arguments (`STUDY_DB=...`) take precedence over it.

        Raises:
            UserError: a value is not legal; the message says what is.
        """
        env: dict[str, str] = {name: value for name, value in os.environ.items() if value}
        env.update(overrides)
        objectives = _objectives(env)
        directions = _directions(env, max(1, len(objectives)))
        return cls(
            study_db=_study_url(env.get("STUDY_DB", "sqlite:///study.db")),
            study_name=_study_name(env.get("STUDY_NAME", "mnist_hpo")),
            total_trials=_integer(env, "TOTAL_TRIALS", "500", 1),
            py_script=Path(env.get("PY_SCRIPT", "optuna_mnist.py")).name,
            direction=directions[0],
            directions=directions,
            objectives=objectives,
            sampler=_choice(env, "SAMPLER", "tpe", SAMPLERS),
            pruner=_choice(env, "PRUNER", "median", PRUNERS),
            seed=_integer(env, "SEED", "0", 0) if "SEED" in env else None,
            train_images=_integer(env, "TRAIN_IMAGES", str(TRAIN_IMAGES), 128, TRAIN_IMAGES),
            workers_per_gpu=_integer(env, "WORKERS_PER_GPU", "1", 1, 16),
            gpus_per_trial=_gpus_per_trial(env),
            data=_data(env["DATA"]) if "DATA" in env else None,
            small=_choice(env, "SMALL", "0", ("0", "1")) == "1",
            keep_best=_integer(env, "KEEP_BEST", "3", 1),
            lease_grace=float(_integer(env, "LEASE_GRACE", "60", 1)),
            rank=_integer(env, "WORKER_RANK", env.get("SLURM_PROCID", "0"), 0),
            job_id=_job_id(env),
            job_end=float(env.get("SLURM_JOB_END_TIME", "inf")),
            drain_file=Path(env["DRAIN_FILE"]) if "DRAIN_FILE" in env else None,
            alive_jobs=frozenset(env["ALIVE_JOBS"].split()) if "ALIVE_JOBS" in env else None,
        )

    @property
    def sqlite_path(self) -> Path | None:
        """The file of an SQLite study; None where a server keeps the study."""
        if self.study_db.startswith(SQLITE_PREFIX):
            return Path(self.study_db[len(SQLITE_PREFIX) :])
        return None

    def inputs(self) -> dict[str, str]:
        """DATA and SMALL where they are given: what every trial of a study must have in common."""
        found = {"SMALL": "1"} if self.small else {}
        if self.data:  # relative: the bundle may be moved
            found["DATA"] = os.path.relpath(self.data, SCRIPTS)
        return found

    @property
    def checkpoints(self) -> Path:
        """The folder of this study's checkpoints and weights, beside study.db.

        Two databases may hold studies of one name, so that of the file is in it, too.
        """
        if self.sqlite_path is None:
            return SCRIPTS / "checkpoints" / self.study_name
        return self.sqlite_path.parent / "checkpoints" / self.sqlite_path.name / self.study_name


def pip_command(*packages: str) -> str:
    """Return the command that installs packages where this Python runs: image, or machine."""
    image = os.environ.get("APPTAINER_CONTAINER")
    if image:  # where there is a network, that is on the login node
        return (
            f"apptainer exec --bind /tmpdir,/work {image} pip install --user {' '.join(packages)}"
        )
    return f"{sys.executable} -m pip install {' '.join(packages)}"


def run_script(main: Callable[[], int]) -> NoReturn:
    """Run a script's `main` and exit with its status; 2 and no traceback for a `UserError`."""
    try:
        status = main()
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        status = 2
    except gpu.Unusable as unusable:
        print(f"{Path(sys.argv[0]).name}: error: {unusable}", file=sys.stderr)
        status = unusable.status
    if status in (gpu.BROKEN, gpu.NO_CAPTURE):
        # What PyTorch clears up at the end fails, too, and may abort: another status.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _choice(env: Mapping[str, str], name: str, default: str, legal: tuple[str, ...]) -> str:
    value = env.get(name, default).lower()
    if value not in legal:
        raise UserError(f"{name}={value!r} is unknown; choose one of: {', '.join(legal)}")
    return value


def _objectives(env: Mapping[str, str]) -> tuple[str, ...]:
    """Split OBJECTIVES; whether the script knows the names, hpo/objectives.py says."""
    names = tuple(filter(None, (name.strip() for name in env.get("OBJECTIVES", "").split(","))))
    if len(set(names)) < len(names):
        raise UserError(f"OBJECTIVES={env['OBJECTIVES']!r} names one twice")
    if len(names) > 1 and env.get("SAMPLER", "").lower() == "cmaes":
        raise UserError("SAMPLER=cmaes has one objective only; for several use nsgaii or tpe")
    return names


def _directions(env: Mapping[str, str], number: int) -> tuple[str, ...]:
    """Return one direction per objective; one alone is for all of them."""
    words = env.get("DIRECTION", "minimize").split(",")
    if len(words) not in (1, number):
        raise UserError(f"DIRECTION has {len(words)} directions for {number} objectives")
    legal = tuple(_choice({"DIRECTION": w.strip()}, "DIRECTION", "", DIRECTIONS) for w in words)
    return legal * number if len(legal) == 1 else legal


def _integer(
    env: Mapping[str, str], name: str, default: str, least: int, most: int | None = None
) -> int:
    text = env.get(name, default)
    legal = f"from {least} to {most}" if most else f"of {least} or more"
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise UserError(f"{name}={text!r} is not an integer {legal}")
    if int(text) < least or (most and int(text) > most):
        raise UserError(f"{name}={text} is out of range; give an integer {legal}")
    return int(text)


def _gpus_per_trial(env: Mapping[str, str]) -> int:
    number = _integer(env, "GPUS_PER_TRIAL", "1", 1, 8)
    if number > 1 and env.get("WORKERS_PER_GPU", "1") != "1":
        raise UserError("GPUS_PER_TRIAL and WORKERS_PER_GPU: only one of them can be more than 1")
    return number


def _data(text: str) -> Path:
    """Make the path absolute, as that of STUDY_DB; what is in the file, hpo/pairs.py checks."""
    path = SCRIPTS / text  # an absolute right-hand side replaces SCRIPTS
    if not path.is_file():
        raise UserError(f"DATA={text!r}: there is no file {path}")
    if not os.access(path, os.R_OK):
        raise UserError(f"DATA={text!r}: no permission to read {path}")
    return path


def _job_id(env: Mapping[str, str]) -> str:
    """A requeued job keeps its number, but the workers that it had before are dead."""
    restarts = env.get("SLURM_RESTART_COUNT", "0")
    return env.get("SLURM_JOB_ID", "") + (f".{restarts}" if restarts != "0" else "")


def _study_name(text: str) -> str:
    """A study's name is also the name of its checkpoint folder, so it may hold no slash."""
    if not re.fullmatch(r"[\w][\w.+-]{0,99}", text):
        raise UserError(
            f"STUDY_NAME={text!r} cannot be used; give letters, digits, '_', '-', '.' or '+'"
        )
    return text


def _study_url(text: str) -> str:
    scheme = urlsplit(text).scheme.split("+")[0]
    if text.startswith(SQLITE_PREFIX) and len(text) > len(SQLITE_PREFIX):
        return _sqlite_url(text)
    if scheme in SERVER_URLS and "://" in text:
        return text
    raise UserError(
        f"STUDY_DB={text!r} is no URL that can be used here; "
        "give sqlite:///study.db (or sqlite:////absolute/path/study.db)"
    )


def _sqlite_url(text: str) -> str:
    """Make the path absolute: relative ones start at the scripts' folder, not at the cwd."""
    path = SCRIPTS / text[len(SQLITE_PREFIX) :]  # an absolute right-hand side replaces SCRIPTS
    folder = path.parent
    if not folder.is_dir():
        raise UserError(f"STUDY_DB={text!r}: the folder {folder} does not exist; create it first")
    if path.is_dir():
        raise UserError(f"STUDY_DB={text!r}: {path} is a folder; name a file in it")
    # Writable means the folder too: SQLite keeps its rollback journal beside the file.
    for needed in (folder, path):
        if needed.exists() and not os.access(needed, os.W_OK):
            raise UserError(f"STUDY_DB={text!r}: no permission to write {needed}")
    return f"{SQLITE_PREFIX}{path}"
