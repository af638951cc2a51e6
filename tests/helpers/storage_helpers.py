"""What the storage's tests share: studies, forked processes that can be killed, what must hold.

`work` asks and tells through Optuna's public study, as any program may that is given the storage;
the worker that the bundle starts (hpo/worker.py) has tests of its own.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo.settings import Settings
from hpo.study.engines.postgresql import PostgreSQL
from hpo.study.engines.sqlite_file import StudyFile, create_study_file
from hpo.study.storage import LeaseLost, NoTrialLeft, StudyStorage
from hpo.study.upkeep import Upkeep
from postgresql_server import ask

optuna.logging.set_verbosity(optuna.logging.ERROR)
NAME = "study"
EPOCHS = 4


def make_study(folder: Path) -> Path:
    path = folder / "study.db"
    create_study_file(str(path), NAME)
    return path


def place_of(path: Path, options: dict[str, Any]) -> Path | PostgreSQL:
    """Return the file, or the server whose URL is in it; it takes the options that are its own."""
    if path.suffix != ".url":
        return path
    return PostgreSQL(path.read_text(), options.pop("timeout", 60.0))


def stock_url(path: Path) -> str:
    """Return the URL of a study for stock Optuna."""
    if path.suffix == ".url":
        return path.read_text().replace("postgresql:", "postgresql+psycopg:")
    return f"sqlite:///{path}"


def stock_storage(path: Path) -> optuna.storages.RDBStorage:
    options = {} if path.suffix == ".url" else {"connect_args": {"timeout": 60}}
    return optuna.storages.RDBStorage(stock_url(path), engine_kwargs=options)


def open_study(path: Path, rank: object = "test", seed: int = 0, **options: Any) -> optuna.Study:
    storage = StudyStorage(place_of(path, options), worker=f"worker {rank}", **options)
    sampler = optuna.samplers.RandomSampler(seed=seed)
    pruner = optuna.pruners.NopPruner()
    return optuna.load_study(study_name=NAME, storage=storage, sampler=sampler, pruner=pruner)


def storage_of(study: optuna.Study) -> StudyStorage:
    assert isinstance(study._storage, StudyStorage)
    return study._storage


def file_of(storage: StudyStorage) -> StudyFile:
    assert isinstance(storage.file, StudyFile)
    return storage.file


def suggest(trial: optuna.Trial) -> dict[str, Any]:
    """The guide's space: eight parameters."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64, 128]),
        "conv1_channels": trial.suggest_categorical("conv1_channels", [8, 16, 32, 64]),
        "conv2_channels": trial.suggest_categorical("conv2_channels", [16, 32, 64, 128]),
        "kernel1": trial.suggest_categorical("kernel1", [3, 5, 7]),
        "kernel2": trial.suggest_categorical("kernel2", [3, 5, 7]),
        "fc_dim": trial.suggest_categorical("fc_dim", [64, 128, 256, 512]),
        "epochs": trial.suggest_categorical("epochs", [2, 3, 5]),
    }


def short_trials(study: optuna.Study) -> Callable[[int], None]:
    """Return what runs so many trials of four epochs, with TPE and the median pruner."""
    study.sampler = optuna.samplers.TPESampler(seed=0)
    study.pruner = optuna.pruners.MedianPruner()

    def run(trials: int) -> None:
        for _ in range(trials):
            trial = study.ask()
            lr = suggest(trial)["lr"]
            for step in range(4):
                trial.report(lr + step, step)
                trial.should_prune()
            study.tell(trial, lr)

    run(12)  # after ten, TPE and the pruner begin their work
    return run


def train(trial: optuna.Trial, epoch: float = 0.0) -> float:
    """Report EPOCHS values, `epoch` seconds apart, from where an earlier run stopped."""
    lr = float(suggest(trial)["lr"])
    reports = trial.storage.get_trial(trial._trial_id).intermediate_values
    for step in range(max(reports, default=-1) + 1, EPOCHS):
        time.sleep(epoch)
        trial.report(lr + step, step)
    return lr


def work(
    path: Path,
    rank: int,
    total: int,
    *,
    grace: float = 0.5,
    epoch: float = 0.0,
    objective: Callable[[optuna.Trial, float], float] = train,
    log: Path | None = None,
    **options: Any,
) -> None:
    """Be a worker until the study has `total` finished trials."""
    study = open_study(path, rank, seed=os.getpid(), total_trials=total, grace=grace, **options)
    own = replace(Settings.from_env(), lease_grace=grace, study_db="")  # no backup
    with Upkeep(study, own) as upkeep:
        while (trial := claim(study, grace)) is not None:
            write_line(log, f"claimed {trial.number}")
            upkeep.trial_id = trial._trial_id
            try:
                study.tell(trial, objective(trial, epoch))
                write_line(log, f"finished {trial.number}")
            except LeaseLost:
                write_line(log, f"lost {trial.number}")
            finally:
                upkeep.trial_id = None


def claim(study: optuna.Study, grace: float) -> optuna.Trial | None:
    """Take a trial, or wait for those that may still come back; None when all are finished."""
    while True:
        try:
            return study.ask()
        except NoTrialLeft:
            if all(t.state.is_finished() for t in study.get_trials(deepcopy=False)):
                return None
            time.sleep(min(grace / 5, 1.0))


def write_line(log: Path | None, line: str) -> None:
    """Append one line, whole, even when many processes do it."""
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(descriptor, f"{line}\n".encode())
        os.close(descriptor)


def count_lines(log: Path, word: str) -> Counter[int]:
    """How often the log says `word` of each trial."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return Counter(int(line[1]) for line in lines if line[0] == word)


def fork(call: Callable[..., Any], *args: Any, stderr: Path | None = None, **kwargs: Any) -> int:
    """Run a call in a forked process: exit 0, or 1 with the traceback on stderr."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        if stderr is not None:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644), 2)
            sys.stderr = os.fdopen(2, "w", closefd=False)
        call(*args, **kwargs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(pids: list[int]) -> list[int]:
    """Wait for processes; their exit statuses, negative for a signal."""
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def read_trials(path: Path) -> list[optuna.trial.FrozenTrial]:
    """What stock Optuna reads."""
    study = optuna.load_study(study_name=NAME, storage=stock_url(path))
    return study.get_trials(deepcopy=False)


def sql(path: Path, statement: str) -> list[Any]:
    if path.suffix == ".url":
        return ask(path.read_text(), statement)
    with closing(sqlite3.connect(path, timeout=60)) as db:
        return db.execute(statement).fetchall()


def check_study(path: Path, total: int, *, reports: int | None = EPOCHS) -> None:
    """Assert exactly once: numbers without gap, all COMPLETE, each with its rows once, healthy."""
    if path.suffix != ".url":
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    assert not list(path.parent.glob(f".{path.name}*.new"))
    trials = read_trials(path)
    assert [t.number for t in trials] == list(range(total))
    assert Counter(t.state for t in trials) == {TrialState.COMPLETE: total}
    assert sql(path, "SELECT count(*) FROM leases") == [(0,)]
    if reports is not None:
        assert {len(t.params) for t in trials} == {8}
        assert {tuple(sorted(t.intermediate_values)) for t in trials} == {tuple(range(reports))}
        assert sql(path, "SELECT count(*) FROM trial_values") == [(total,)]
        assert sql(path, "SELECT count(*) FROM trial_params") == [(8 * total,)]
        # every report was made with the parameters that the trial ended with
        for t in trials:
            assert t.value == t.params["lr"]
            assert all(v == t.params["lr"] + s for s, v in t.intermediate_values.items())
