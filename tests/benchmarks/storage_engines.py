"""The storages that the benchmarks compare, and one trial of the guide on each of them."""

from __future__ import annotations

import copy
import json
import os
import random
import socket
import sqlite3
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts"), str(ROOT / "tests" / "helpers")]

import optuna  # noqa: E402
from optuna.samplers import BaseSampler  # noqa: E402
from optuna.storages import BaseStorage, RDBStorage  # noqa: E402
from optuna.storages.journal import JournalFileBackend  # noqa: E402
from optuna.trial import FrozenTrial, TrialState  # noqa: E402

from hpo.search.samplers import make_sampler  # noqa: E402
from hpo.settings import Settings  # noqa: E402
from hpo.study.storage import StudyStorage  # noqa: E402
from storage_helpers import EPOCHS, NAME, fork, kill, make_study, suggest  # noqa: E402

warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the proxy
optuna.logging.set_verbosity(optuna.logging.ERROR)


class Engine:
    """A storage under its name; a context while something must run beside the workers."""

    name = "ours"

    @staticmethod
    def sampler(name: str, seed: int) -> BaseSampler:
        return make_sampler(Settings.from_env(SAMPLER=name), seed)

    def __init__(self, folder: Path) -> None:
        self.path = make_study(folder)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def storage(self, rank: int) -> BaseStorage:
        return StudyStorage(self.path, worker=f"worker {rank}", wait=StudyStorage.WAIT)

    def study(self, rank: int, sampler: BaseSampler) -> optuna.Study:
        return optuna.load_study(
            study_name=NAME, storage=self.storage(rank), sampler=sampler,
            pruner=optuna.pruners.MedianPruner(),
        )  # fmt: skip

    def worker(self, rank: int, trials: int, seconds: float, sampler: BaseSampler) -> float:
        """Run trials that sleep; return how many seconds all of it took."""
        study = self.study(rank, sampler)
        study.get_trials(deepcopy=False)  # open: that is not part of a trial
        warm_up(copy.deepcopy(sampler))
        time.sleep(random.Random(rank).uniform(0, seconds))  # workers are never in step for long
        start = time.monotonic()
        for _ in range(trials):
            trial = study.ask()
            study.tell(trial, one_trial(trial, seconds))
        return time.monotonic() - start


def warm_up(sampler: BaseSampler) -> None:
    """Run trials in memory: a worker imports and compiles once, which is no cost of a trial."""
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner())
    for _ in range(12):  # after ten, TPE and the pruner begin their work
        study.tell(trial := study.ask(), one_trial(trial, 0.0))


def one_trial(trial: optuna.Trial, seconds: float) -> float:
    lr = float(suggest(trial)["lr"])
    for step in range(EPOCHS):
        time.sleep(seconds / EPOCHS)
        trial.report(lr + step, step)
        trial.should_prune()
    return lr


class Stock(Engine):
    name = "stock SQLite"

    @staticmethod
    def sampler(name: str, seed: int) -> BaseSampler:
        if name == "tpe":
            return optuna.samplers.TPESampler(seed=seed)
        return make_sampler(Settings.from_env(SAMPLER=name), seed)

    def storage(self, rank: int) -> BaseStorage:
        options = {"connect_args": {"timeout": 60}}
        return RDBStorage(f"sqlite:///{self.path}", engine_kwargs=options)


class Journal(Engine):
    name = "journal file"
    sampler = staticmethod(Stock.sampler)

    def __init__(self, folder: Path) -> None:
        self.path = folder / "journal.log"
        optuna.create_study(study_name=NAME, storage=self.storage(0))

    def storage(self, rank: int) -> BaseStorage:
        backend = JournalFileBackend(str(self.path))
        return optuna.storages.JournalStorage(backend)


class Grpc(Stock):
    name = "gRPC proxy"

    def __enter__(self) -> Engine:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.server = fork(self._serve)
        return self

    def _serve(self) -> None:
        storage = optuna.storages.get_storage(Stock.storage(self, 0))  # with Optuna's cache
        optuna.storages.run_grpc_proxy_server(storage, host="localhost", port=self.port)

    def __exit__(self, *error: object) -> None:
        kill(self.server)

    def storage(self, rank: int) -> BaseStorage:
        proxy = optuna.storages.GrpcStorageProxy(host="localhost", port=self.port)
        proxy.wait_server_ready(timeout=60)
        return proxy


class Floor(Engine):
    """What SQLite itself costs: the same rows in six commits, without Optuna."""

    name = "plain sqlite3"

    def worker(self, rank: int, trials: int, seconds: float, sampler: BaseSampler) -> float:
        db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        time.sleep(random.Random(rank).uniform(0, seconds))
        start = time.monotonic()
        for _ in range(trials):
            trial_id = self._commit(db, self._create)
            for step in range(EPOCHS):
                time.sleep(seconds / EPOCHS)
                self._commit(db, self._report, trial_id, step)
            self._commit(db, self._finish, trial_id)
        return time.monotonic() - start

    def _commit(self, db: sqlite3.Connection, change: Callable[..., int], *args: int) -> int:
        self._retry(db, "BEGIN IMMEDIATE")
        result = change(db, *args)
        self._retry(db, "COMMIT")
        return result

    def _retry(self, db: sqlite3.Connection, statement: str) -> None:
        while True:
            try:
                db.execute(statement)
                return
            except sqlite3.OperationalError:
                time.sleep(random.uniform(0.0002, 0.001))

    def _create(self, db: sqlite3.Connection) -> int:
        row = db.execute("INSERT INTO trials (number, study_id, state) VALUES (0, 1, 'RUNNING')")
        return int(row.lastrowid or 0)

    def _report(self, db: sqlite3.Connection, trial_id: int, step: int) -> int:
        if step == 0:
            text = json.dumps({"choices": [64, 128, 256, 512]})
            db.executemany(
                "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json) "
                "VALUES (?, ?, 1.0, ?)",
                [(trial_id, f"p{i}", text) for i in range(8)],
            )
        db.execute(
            "INSERT INTO trial_intermediate_values (trial_id, step, intermediate_value, "
            "intermediate_value_type) VALUES (?, ?, 1.0, 'FINITE')",
            (trial_id, step),
        )
        return 0

    def _finish(self, db: sqlite3.Connection, trial_id: int) -> int:
        db.execute(
            "INSERT INTO trial_values (trial_id, objective, value, value_type) "
            "VALUES (?, 0, 1.0, 'FINITE')",
            (trial_id,),
        )
        db.execute("UPDATE trials SET state = 'COMPLETE' WHERE trial_id = ?", (trial_id,))
        return 0


ENGINES: list[type[Engine]] = [Stock, Journal, Grpc, Engine, Floor]


def run_workers(
    engine: Engine, workers: int, trials: int, seconds: float, *, tpe: bool = False
) -> float:
    """Return the mean time of a worker, in seconds, for `trials` trials each."""
    read, write = os.pipe()

    def worker(rank: int) -> None:
        sampler = engine.sampler("tpe" if tpe else "random", rank)
        took = engine.worker(rank, trials, seconds, sampler)
        os.write(write, f"{took}\n".encode())

    pids = [fork(worker, rank) for rank in range(workers)]
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(write)
    with os.fdopen(read) as pipe:
        times = [float(line) for line in pipe]
    assert len(times) == workers, f"{engine.name}: {workers - len(times)} workers died"
    return sum(times) / workers


def past_trials(count: int) -> list[FrozenTrial]:
    """Finished trials of the guide's space, the same every time."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        trial = study.ask()
        study.tell(trial, one_trial(trial, 0.0), TrialState.COMPLETE)
    return study.get_trials(deepcopy=False)
