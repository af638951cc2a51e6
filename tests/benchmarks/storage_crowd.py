"""A crowd of workers on one study: 64, 300 and 1 000 processes that sleep, on each engine.

    python tests/benchmarks/storage_crowd.py             the three
    python tests/benchmarks/storage_crowd.py 8 16        others

The bundle's own worker loop, SAMPLER=random, eight parameters, four reports, in processes forked
from one that has imported all; trials of 1 s and of 10 s that sleep.  A row is what happened
between the first trial of the last worker and the study's last claim:

    used       share of the workers' time that is trials: claims per second x seconds / workers
    claims/s   how many trials begin per second
    worker     milliseconds of processor of a worker per trial
    server     the same of PostgreSQL's processes; SQLite has none
    wrong      trials too many, unfinished, begun twice: 0 0 0, or the table is worth nothing

All workers share the cores of this machine; on a cluster each has one.  A thousand of them fill
more than 30 GB of memory.
PostgreSQL takes part where Debian's package is installed, and root asks.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from storage_bench import commit_time

import optuna  # isort: skip
from optuna.trial import TrialState  # isort: skip
from hpo.settings import Settings, forget, run_script  # isort: skip
from hpo.study.opening import create_or_open_study, open_study  # isort: skip
from hpo.study.optuna_private import storage_of  # isort: skip
from hpo.trial import spare_the_old  # isort: skip
from hpo.worker import run_worker  # isort: skip
from postgresql_server import PostgreSQLServer, wanted  # isort: skip
from storage_helpers import EPOCHS, fork, suggest  # isort: skip

CROWDS = 64, 300, 1000
SECONDS = 1.0, 10.0  # of a trial
EACH = 3  # trials of a worker, on average
LIMIT = 900.0  # seconds for a row
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Row:
    """What was measured of one crowd; times in milliseconds per trial."""

    workers: int
    seconds: float
    claims: float  # per second
    worker: float
    server: float
    wrong: tuple[int, int, int]

    @property
    def used(self) -> float:
        """The share of the workers' time that is trials."""
        return self.claims * self.seconds / self.workers

    def __str__(self) -> str:
        wrong = " ".join(map(str, self.wrong))
        return (
            f"{self.workers:7}{self.seconds:6.0f} s{self.used:9.1%}{self.claims:10.1f}"
            f"{self.worker:9.1f}{self.server:9.1f}   {wrong}"
        )


# ---------- One worker ----------


def work(rank: int, seconds: float, pipe: int) -> None:
    """Be a worker; write a line to the pipe when a trial begins, and when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ["WORKER_RANK"] = str(rank)
    forget()
    random.seed(rank)

    def say(what: str, trial: optuna.Trial) -> None:
        words = rank, trial.number, time.monotonic(), time.process_time()
        os.write(pipe, f"{what} {' '.join(map(str, words))}\n".encode())

    def objective(trial: optuna.Trial) -> float:
        say("begin", trial)
        lr = float(suggest(trial)["lr"])
        for step in range(EPOCHS):
            time.sleep(seconds / EPOCHS)
            trial.report(lr + step, step)
            trial.should_prune()
        say("end", trial)
        return lr

    time.sleep(random.uniform(0, seconds))  # never in step for long
    run_worker(objective)


# ---------- A crowd ----------


@dataclass
class Seen:
    """What the workers of a crowd have said, and the server's processor then."""

    workers: int
    total: int
    server: Callable[[], float]
    begun: list[int] = field(default_factory=list)  # numbers of trials
    times: list[float] = field(default_factory=list)
    first: dict[int, float] = field(default_factory=dict)  # processor of a worker
    last: dict[int, float] = field(default_factory=dict)
    trials: int = 0  # that lie between the two
    marks: list[float] = field(default_factory=list)  # of the server
    ended: int = 0

    def take(self, line: str) -> None:
        """Take one line of a worker."""
        what, *words = line.split()
        rank, number, when, cost = (float(word) for word in words)
        if what == "end":
            self.ended += 1
            return
        self.begun.append(int(number))
        self.times.append(when)
        self.trials += int(rank) in self.first
        self.first.setdefault(int(rank), cost)
        self.last[int(rank)] = cost
        if len(self.begun) in (self.workers, self.total):
            self.marks.append(self.server())

    def row(self, seconds: float, wrong: tuple[int, int, int]) -> Row:
        """Return what it adds up to."""
        after = sorted(self.times)[self.workers - 1 :]
        trials, window = len(after) - 1, after[-1] - after[0]
        server = 1000 * (self.marks[-1] - self.marks[0]) / trials
        spent = sum(self.last[rank] - self.first[rank] for rank in self.first)
        own = 1000 * spent / max(self.trials, 1)
        return Row(self.workers, seconds, trials / window, own, server, wrong)


def crowd(url: str, workers: int, seconds: float, server: Callable[[], float]) -> Row:
    """Let so many workers run one study to its end; return the row of the table."""
    total = EACH * workers
    os.environ |= {"STUDY_DB": url, "TOTAL_TRIALS": str(total)}
    forget()
    storage_of(create_or_open_study(Settings.from_env())).remove_session()
    seen = Seen(workers, total, server)
    read, write = os.pipe()
    spare_the_old()  # or each worker's first collection would copy what they share
    pids = [fork(work, rank, seconds, write) for rank in range(workers)]
    os.close(write)
    begin = time.monotonic()
    with os.fdopen(read) as lines:
        while seen.ended < total and time.monotonic() < begin + LIMIT:
            seen.take(lines.readline())  # raises ValueError if all have ended before
        wrong = _wrong(seen)  # what follows, the last copies of the study, is not measured
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        os.waitpid(pid, 0)
    return seen.row(seconds, wrong)


def _wrong(seen: Seen) -> tuple[int, int, int]:
    """Return how many trials are too many, unfinished, begun twice; waits for the last to end."""
    study = open_study(Settings.from_env())
    end = time.monotonic() + 60
    while True:
        states = [trial.state for trial in study.get_trials(deepcopy=False)]
        unfinished = len(states) - states.count(TrialState.COMPLETE)
        if not unfinished or time.monotonic() > end:
            break
        time.sleep(0.2)
    storage_of(study).remove_session()
    return len(states) - seen.total, unfinished, len(seen.begun) - len(set(seen.begun))


# ---------- The engines ----------


@contextmanager
def sqlite() -> Iterator[tuple[str, Callable[[], float]]]:
    """Give the URL of a new file, and what says how much processor its server has used: none."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/study.db", lambda: 0.0


@contextmanager
def postgresql() -> Iterator[tuple[str, Callable[[], float]]]:
    """Start a server that takes a thousand workers, and waits for its disk."""
    folder = Path(tempfile.gettempdir()) / f"pg-{os.getpid()}"
    options = f"-c max_connections={max(CROWDS) + 100} -c fsync=on"
    server = PostgreSQLServer(folder, options)
    try:
        yield server.empty("study"), lambda: _processor(folder)
    finally:
        server.stop()
        shutil.rmtree(folder)
        settings = Settings.from_env()
        shutil.rmtree(settings.checkpoints.parent, ignore_errors=True)
        if settings.backup_path:
            settings.backup_path.unlink(missing_ok=True)


def _processor(folder: Path) -> float:
    """Return the seconds of processor of a server, those of its ended processes among them."""
    first = (folder / "data" / "postmaster.pid").read_text().split()[0]
    ticks = 0
    for pid in [first, *Path(f"/proc/{first}/task/{first}/children").read_text().split()]:
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            ticks += sum(map(int, words[11 : 15 if pid == first else 13]))
    return ticks / TICK


ENGINES: dict[str, Callable[[], AbstractContextManager[tuple[str, Callable[[], float]]]]] = {
    "SQLite": sqlite,
    "PostgreSQL": postgresql,
}


def main() -> int:
    """Print the table; return the exit status: 1 if a trial was lost or is too many."""
    crowds = [int(word) for word in sys.argv[1:]] or list(CROWDS)
    del sys.argv[1:]  # the worker loop would take them for its own
    os.environ |= {"STUDY_NAME": "crowd", "SAMPLER": "random", "PY_SCRIPT": __file__}
    fine = True
    commit_time()
    for name, engine in ENGINES.items():
        if name == "PostgreSQL" and (why := wanted()):
            print(f"{name}: {why}")
            continue
        print(f"\n{name}")
        print("workers   trial     used  claims/s   worker   server   wrong", flush=True)
        for workers in crowds:
            for seconds in SECONDS:
                with engine() as (url, server):
                    row = crowd(url, workers, seconds, server)
                print(row, flush=True)
                fine &= not any(row.wrong)
    return 0 if fine else 1


if __name__ == "__main__":
    run_script(main)
