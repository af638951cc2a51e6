"""The environment variables of the bundle: read once, checked before a GPU is used.

    python -m hpo.settings        prints the table of all of them, with the values in force
    python -m hpo.settings given  what was given, as it is typed before a command

The names are those of the USER CONFIG block in run-optuna-multinode_Turpan.sh.  Every script calls
`Settings.from_env()`: the first call of a process reads the environment, later ones return that.
The launch scripts also set WORKER_RANK or SLURM_PROCID, SLURM_JOB_ID, SLURM_JOB_USER,
SLURM_JOB_END_TIME (Unix seconds), DRAIN_FILE (hpo/drain.py), ALIVE_JOBS (the user's jobs in
Slurm's queue) and WORKER_TOKEN (hpo/job/keep_running.sh).

This module and hpo/gpu.py import the standard library alone: they start at once on a login node.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from hpo import files, gpu, values
from hpo.values import UserError

__all__ = ["SCRIPTS", "Settings", "UserError", "run_script", "use"]

SCRIPTS = Path(__file__).resolve().parent.parent  # code_and_slurm-scripts/
SAMPLERS = ("tpe", "random", "grid", "cmaes", "bruteforce", "nsgaii", "gp", "qmc")
PRUNERS = ("halving", "median", "percentile", "hyperband", "wilcoxon", "none")
DIRECTIONS = ("minimize", "maximize")
FINALISTS = 5  # best configurations that run again, with FINAL_SEEDS
TRAIN_IMAGES = 50_000  # most images that a trial trains on, whatever a script counts as one


class Variable(NamedTuple):
    """One row of the table of settings."""

    name: str
    default: str  # "" where there is none
    says: str


VARIABLES = (
    Variable("STUDY_DB", "sqlite:///study.db", "where the study is stored, from this folder"),
    Variable("STUDY_NAME", "mnist_hpo", "its name in that database"),
    Variable("TOTAL_TRIALS", "500", "trials in the whole study, over all workers and jobs"),
    Variable("PY_SCRIPT", "optuna_mnist.py", "the script with the objective, from this folder"),
    Variable("SCRIPT_ARGS", "", "command-line arguments of that script's own"),
    Variable("DIRECTION", "minimize", "minimize or maximize; one for each of OBJECTIVES"),
    Variable("OBJECTIVES", "", "loss,parameters: those of the script to use; its first alone"),
    Variable("SAMPLER", "tpe", "how parameters are chosen; tpe:n_startup_trials=20 sets options"),
    Variable("PRUNER", "halving", "which trials are stopped; median:n_warmup_steps=2 likewise"),
    Variable("FIX", "", "batch_size=64,…: parameters that are not searched"),
    Variable("KNOWN_GOOD", "", "a JSON file: a list of configurations that are tried first"),
    Variable("FROM_STUDY", "", "a study, or FILE:STUDY; its five best configurations go first"),
    Variable("FINAL_SEEDS", "0", "3: the last 10 trials run the best five again, for 3 seeds each"),
    Variable("STOP_VALUE", "", "a value that is good enough: it ends the study"),
    Variable("SEED", "", "of the samplers; repeatable with one worker on a new study"),
    Variable("TRAIN_IMAGES", str(TRAIN_IMAGES), "images a trial trains on; fewer for a quick try"),
    Variable("DATA", "", "a data file of your own, for scripts that use it (pairs of texts)"),
    Variable("MODEL", "", "the folder of a language model, for scripts that use it"),
    Variable("SMALL", "0", "1: the script's search space for a laptop, where it has one"),
    Variable("WORKERS_PER_GPU", "1", "workers that share one GPU, 1 to 16"),
    Variable("GPUS_PER_TRIAL", "1", "GPUs that share one trial, 1 to 8"),
    Variable("KEEP_BEST", "3", "best trials whose weights are kept"),
    Variable("MAX_ATTEMPTS", "3", "crashes, or returns without a new epoch, that fail a trial"),
    Variable("LEASE_GRACE", "60", "seconds without a sign of life until a trial is taken back"),
)
DEFAULTS = {variable.name: variable.default for variable in VARIABLES}


@dataclass(frozen=True)
class Settings:
    """One checked value for every environment variable of the table above."""

    study_db: str  # a URL; for SQLite always with an absolute path
    study_name: str
    total_trials: int
    total_is_given: bool  # by TOTAL_TRIALS; otherwise a study that exists knows better
    py_script: str  # the script with the objective, relative to SCRIPTS
    script_args: tuple[str, ...]
    directions: tuple[str, ...]  # of all objectives
    objectives: tuple[str, ...]  # names; () for the one of the script
    sampler: str
    sampler_options: dict[str, Any]
    pruner: str
    pruner_options: dict[str, Any]
    fixed: dict[str, Any]  # parameters that have one value in every trial
    known_good: Path | None  # a file with configurations that are tried first
    from_study: tuple[str, str] | None  # STUDY_DB and STUDY_NAME of another one
    final_seeds: int  # with how many each of the best configurations is trained at the end
    stop_value: float | None
    seed: int | None
    train_images: int
    workers_per_gpu: int  # the launch scripts start them
    gpus_per_trial: int  # hpo/train/ddp.py
    data: Path | None  # a file of the user's own; None for the data of the script
    model: Path | None  # the folder of a language model
    small: bool  # the script's search space for a laptop
    keep_best: int  # trials whose weights are kept
    max_attempts: int
    lease_grace: float  # seconds
    rank: int  # of this worker among the workers of its job: 0, 1, …
    token: str  # of this process, from the script that keeps it running; "" without one
    job_id: str  # of Slurm: "12@ann", "12.1@ann" after the first requeue; "" outside of it
    job_end: float  # Unix seconds; infinite where nothing ends the job
    drain_file: Path | None  # workers stop when it exists
    alive_jobs: frozenset[str] | None  # ids; None where nobody asked Slurm

    @classmethod
    def from_env(cls, **overrides: str) -> Settings:
        """Return the settings of this process; keyword arguments (`STUDY_DB=...`) go before them.

        The environment is read by the first call, and again by one with arguments, which the
        process then keeps.

        Raises:
            UserError: a value is not legal; the message says what is.
        """
        if overrides or not _in_use:
            use(_read({**os.environ, **overrides}))
        return _in_use[0]

    @property
    def sqlite_path(self) -> Path | None:
        """The file of an SQLite study; None where a server keeps the study."""
        if self.study_db.startswith(values.SQLITE_PREFIX):
            return Path(self.study_db[len(values.SQLITE_PREFIX) :])
        return None

    @property
    def final_runs(self) -> int:
        """How many of the study's trials, its last ones, run the best configurations again."""
        return FINALISTS * max(self.final_seeds - 1, 0)

    @property
    def postgresql_url(self) -> str:
        """The URL of a PostgreSQL study, for its driver, with the password; "" for any other."""
        return self.study_db if self.study_db.startswith("postgresql:") else ""

    @property
    def shown_db(self) -> str:
        """STUDY_DB as it may be shown to people: without a password."""
        return values.without_password(self.study_db)

    @property
    def database(self) -> str:
        """The name of the database among files: study.db, or one that is a server's alone."""
        return self.sqlite_path.name if self.sqlite_path else values.server_name(self.study_db)

    @property
    def beside(self) -> Path:
        """The folder of study.db: reports, checkpoints and the preflight's notes lie there."""
        return self.sqlite_path.parent if self.sqlite_path else SCRIPTS

    @property
    def backup_path(self) -> Path | None:
        """Where the copy of the study is kept while workers run: beside study.db, or the scripts.

        An SQLite file either way.  None where the storage is Optuna's own.
        """
        if self.postgresql_url:
            return SCRIPTS / f"{self.database}.{self.study_name}.backup"
        path = self.sqlite_path
        return path.with_name(f"{path.name}.backup") if path else None

    @property
    def checkpoints(self) -> Path:
        """The folder of this study's checkpoints and weights, beside study.db.

        Two databases may hold studies of one name, so that of the database is in it, too.
        """
        return self.beside / "checkpoints" / self.database / self.study_name

    @property
    def worker(self) -> str:
        """The name of this worker, for people."""
        return f"worker {self.rank} on {os.uname().nodename}"

    @property
    def signature(self) -> str:
        """What a trial keeps of who has run it: the worker and its job, which name its log."""
        return self.worker + (f", job {self.job_id}" if self.job_id else "")

    def inputs(self) -> dict[str, str]:
        """What all trials of a study must have in common, as it was given: DATA, SMALL, …"""
        found = {"SMALL": "1"} if self.small else {}
        for name, path in (("DATA", self.data), ("MODEL", self.model)):
            if path:  # relative: the bundle may be moved
                found[name] = os.path.relpath(path, SCRIPTS)
        if self.train_images != TRAIN_IMAGES:
            found["TRAIN_IMAGES"] = str(self.train_images)
        return found


_in_use: list[Settings] = []  # at most one
imported_by_another = False  # the script: then it must not begin a study (hpo/script.py)
ends_with_a_line = False  # what a UserError leaves: run_script is around it


def use(settings: Settings) -> Settings:
    """Make these the settings of this process; a check and an export change some."""
    _in_use[:] = [settings]
    return settings


def forget() -> None:
    """Let the next `Settings.from_env()` read the environment again."""
    _in_use.clear()


def run_script(main: Callable[[], int] | int) -> None:
    """Run a script's `main` and exit with its status; no traceback for a `UserError`, which has 2.

    Does nothing while another program imports the script (hpo/script.py).  Where the lambda was
    forgotten, `main` is the status.
    """
    global ends_with_a_line
    if imported_by_another:
        return
    files.outlive_the_log()
    ends_with_a_line, status = True, 0
    try:
        try:
            status = main() if callable(main) else main
        except (UserError, OSError) as error:
            status = values.end_of(error)
        except gpu.Unusable as unusable:
            print(f"{Path(sys.argv[0]).name}: error: {unusable}", file=sys.stderr)
            status = unusable.status
        if not sys.stdout.closed:  # by the script
            sys.stdout.flush()
    except BrokenPipeError:  # `… | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if status in (gpu.BROKEN, gpu.NO_CAPTURE):  # PyTorch's end fails, too, with another status
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    files.end_in_time(status)
    sys.exit(status)


def _read(environment: Mapping[str, str]) -> Settings:
    given = {name: value for name, value in environment.items() if value}  # empty means default
    env = {**DEFAULTS, **given}
    objectives = values.names(env["OBJECTIVES"], "OBJECTIVES")
    sampler, sampler_options = values.with_options(env, "SAMPLER", SAMPLERS)
    pruner, pruner_options = values.with_options(env, "PRUNER", PRUNERS)
    if len(objectives) > 1 and sampler == "cmaes":
        raise UserError("SAMPLER=cmaes has one objective only; for several use nsgaii or tpe")
    if env["GPUS_PER_TRIAL"] != "1" and env["WORKERS_PER_GPU"] != "1":
        raise UserError("GPUS_PER_TRIAL and WORKERS_PER_GPU: only one of them can be more than 1")
    study = study_url(env["STUDY_DB"]), values.study_name(env["STUDY_NAME"])
    total_trials = values.integer(env, "TOTAL_TRIALS", 1)
    return Settings(
        study_db=study[0],
        study_name=study[1],
        total_trials=total_trials,
        total_is_given="TOTAL_TRIALS" in given,
        py_script=values.py_script(env["PY_SCRIPT"], SCRIPTS),
        script_args=values.arguments(env["SCRIPT_ARGS"], "SCRIPT_ARGS"),
        directions=values.directions(env["DIRECTION"], DIRECTIONS, max(1, len(objectives))),
        objectives=objectives,
        sampler=sampler,
        sampler_options=sampler_options,
        pruner=pruner,
        pruner_options=pruner_options,
        fixed=values.pairs(env["FIX"], "FIX"),
        known_good=_file_of(env, "KNOWN_GOOD"),
        from_study=values.other_study(env["FROM_STUDY"], study, study_url),
        final_seeds=values.final_seeds(env, FINALISTS, total_trials, len(objectives)),
        stop_value=values.number(env, "STOP_VALUE") if env["STOP_VALUE"] else None,
        seed=values.integer(env, "SEED", 0, 2**32 - 1) if env["SEED"] else None,
        train_images=values.integer(env, "TRAIN_IMAGES", 128, TRAIN_IMAGES),
        workers_per_gpu=values.integer(env, "WORKERS_PER_GPU", 1, 16),
        gpus_per_trial=values.integer(env, "GPUS_PER_TRIAL", 1, 8),
        data=_file_of(env, "DATA"),
        model=values.readable_folder(SCRIPTS / env["MODEL"], "MODEL") if env["MODEL"] else None,
        small=values.choice(env, "SMALL", ("0", "1")) == "1",
        keep_best=values.integer(env, "KEEP_BEST", 1),
        max_attempts=values.integer(env, "MAX_ATTEMPTS", 1),
        lease_grace=float(values.integer(env, "LEASE_GRACE", 1)),
        **_job(given),
    )


def _job(given: Mapping[str, str]) -> dict[str, Any]:
    """Return what the launch scripts and Slurm set."""
    rank = "WORKER_RANK" if "WORKER_RANK" in given else "SLURM_PROCID"
    restarts = given.get("SLURM_RESTART_COUNT", "0")
    job_id = given.get("SLURM_JOB_ID", "")
    if job_id:  # a requeued job keeps its number, but the workers that it had before are dead
        user = given.get("SLURM_JOB_USER") or str(os.getuid())
        job_id += (f".{restarts}" if restarts != "0" else "") + f"@{user}"
    end = "SLURM_JOB_END_TIME"
    return {
        "rank": values.integer({rank: "0", **given}, rank, 0),
        "token": given.get("WORKER_TOKEN", ""),
        "job_id": job_id,
        "job_end": values.number(given, end) if end in given else float("inf"),
        "drain_file": Path(given["DRAIN_FILE"]) if "DRAIN_FILE" in given else None,
        "alive_jobs": frozenset(given["ALIVE_JOBS"].split()) if "ALIVE_JOBS" in given else None,
    }


def study_url(text: str) -> str:
    """Return STUDY_DB in the form that the bundle uses.  Raises UserError if it is not legal."""
    return values.study_url(text, SCRIPTS)


def _file_of(env: Mapping[str, str], name: str) -> Path | None:
    return values.readable_file(SCRIPTS / env[name], name) if env[name] else None


def print_table() -> int:
    """Print every variable, the value in force, and what it is; return the exit status.

    With the word `given`: those that are not their default, on one line, as before a command.
    """
    Settings.from_env()
    if sys.argv[1:] == ["given"]:
        words = [f"{n}={shlex.quote(v)}" for n, v in in_force().items() if v != DEFAULTS[n]]
        print(" ".join(words))
        return 0
    for variable in VARIABLES:
        print(f"{variable.name:16} {in_force()[variable.name] or '-':20} {variable.says}")
    return 0


def in_force() -> dict[str, str]:
    """Return the text of every variable: of the environment, or its default; no password."""
    set_to = {name: os.environ.get(name) or default for name, default in DEFAULTS.items()}
    return {name: values.without_password(value) for name, value in set_to.items()}


if __name__ == "__main__":
    run_script(print_table)
