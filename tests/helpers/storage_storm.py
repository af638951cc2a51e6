"""The kill storm: 1 000 SIGKILLs of random workers at random moments over a 500-trial study.

    pytest tests/test_storm.py -s                       ours alone, with the counts asserted
    python tests/benchmarks/storage_kill_storm.py       ours and stock Optuna with heartbeat and
                                                        retry, and the table of both

Both run the same objective (4 epochs, resumed after the last report) with 8 workers that a
launcher starts again when they die. The moments and the victims follow from the seed.
"""

from __future__ import annotations

import os
import random
import time
import warnings
from collections import Counter
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import optuna
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import FrozenTrial, TrialState

from storage_helpers import (
    NAME,
    count_lines,
    fork,
    kill,
    make_study,
    open_study,
    read_trials,
    sql,
    storage_of,
    train,
    work,
    write_line,
)

warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # stock's retries

WORKERS, TRIALS, KILLS = 8, 500, 1000
EPOCH = 0.1  # seconds; four of them are a trial
GRACE = 0.5  # seconds; stock counts in whole seconds, so it has 1
PAUSE = 0.04  # seconds between two kills, on average


@dataclass
class Result:
    storage: str
    kills: int
    interrupted: int  # runs of a trial that a kill ended
    seconds: float
    rows: int  # trials in the study
    finished: int  # planned trials that have a result
    doubled: int  # planned trials that ran to their end twice
    lost: int  # planned trials without a result and not running
    left_running: int  # still RUNNING after the grace period and one poll
    tracebacks: int
    healthy: bool


def our_worker(path: Path, log: Path) -> None:
    def objective(trial: optuna.Trial, epoch: float) -> float:
        keep_step(log, trial.number)
        return train(trial, epoch)

    options = {"grace": GRACE, "epoch": EPOCH, "max_attempts": 10**9}
    work(path, os.getpid(), TRIALS, objective=objective, log=log, **options)


def keep_step(log: Path, number: int) -> None:
    """Wait until the kills have come as far as the trials: on a slow machine they are fewer."""
    kills = log.with_name("kills")  # a byte for each
    while number > WORKERS + TRIALS * kills.stat().st_size / KILLS:
        time.sleep(0.01)


def stock_worker(path: Path, log: Path) -> None:
    storage = RDBStorage(
        f"sqlite:///{path}",
        engine_kwargs={"connect_args": {"timeout": 60}},
        heartbeat_interval=1,
        grace_period=1,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(
            inherit_intermediate_values=True
        ),
    )
    study = optuna.load_study(study_name=NAME, storage=storage)

    def note(study: optuna.Study, trial: FrozenTrial) -> None:
        write_line(log, f"finished {_planned(trial)}")

    def objective(trial: optuna.Trial) -> float:
        write_line(log, f"claimed {trial.number}")
        keep_step(log, _planned(trial.study.get_trials(deepcopy=False)[trial.number]))
        return train(trial, EPOCH)

    limit = MaxTrialsCallback(TRIALS, states=(TrialState.COMPLETE,))
    if sum(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)) < TRIALS:
        study.optimize(objective, callbacks=[note, limit])


def _planned(trial: FrozenTrial) -> int:
    """The number of the planned trial that this one is, or is a retry of."""
    number = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial)
    return trial.number if number is None else number


class Launcher:
    """Keeps WORKERS workers alive, and kills them."""

    def __init__(self, folder: Path, ours: bool, seed: int, path: Path | None = None) -> None:
        self.path = path or make_study(folder)
        self.log, self.errors = folder / "log", folder / "errors"
        (folder / "kills").touch()
        self.worker = our_worker if ours else stock_worker
        self.random = random.Random(seed)
        self.pids = [self._start() for _ in range(WORKERS)]

    def _start(self) -> int:
        return fork(self.worker, self.path, self.log, stderr=self.errors)

    def storm(self, kills: int, limit: float) -> int:
        """Kill until there were so many kills or the time is over; return how many."""
        start, done = time.monotonic(), 0
        while done < kills and time.monotonic() - start < limit:
            time.sleep(self.random.uniform(0, 2 * PAUSE))
            victim = self.random.randrange(WORKERS)
            running = os.waitpid(self.pids[victim], os.WNOHANG) == (0, 0)
            if running:  # one that ended by itself was no kill
                kill(self.pids[victim])
                done += 1
                self._note(1)
            self.pids[victim] = self._start()
        for pid in self.pids:
            kill(pid)
        self._note(KILLS)
        return done

    def _note(self, kills: int) -> None:
        with self.log.with_name("kills").open("a") as file:
            file.write("x" * kills)

    def finish(self, limit: float) -> None:
        """Let workers end by themselves, and start one again that dies of an error."""
        start = time.monotonic()
        waiting = [self._start() for _ in range(WORKERS)]
        while waiting and time.monotonic() - start < limit:
            pid, status = os.waitpid(waiting[0], os.WNOHANG)
            if pid:
                waiting.pop(0)
                if status:
                    waiting.append(self._start())
            time.sleep(0.01)
        for pid in waiting:
            kill(pid)


def storm_ours(
    folder: Path, seed: int, kills: int = KILLS, path: Path | None = None, name: str = "ours"
) -> Result:
    """Storm our storage: on a new file, or on the study behind `path`."""
    launcher, start = Launcher(folder, True, seed, path), time.monotonic()
    done = launcher.storm(kills, 900)
    observer = open_study(launcher.path, "observer", grace=GRACE, max_attempts=10**9)
    polls = 6  # one look, the grace period in five steps
    for _ in range(polls):
        storage_of(observer).return_stale_trials(observer._study_id)
        time.sleep(GRACE / 5)
    storage_of(observer).return_stale_trials(observer._study_id)
    left = sum(t.state == TrialState.RUNNING for t in read_trials(launcher.path))
    launcher.finish(120)
    return _result(name, launcher, done, time.monotonic() - start, left)


def storm_stock(folder: Path, seed: int, kills: int = KILLS) -> Result:
    launcher, start = Launcher(folder, False, seed), time.monotonic()
    done = launcher.storm(kills, 300)
    launcher.finish(300)
    time.sleep(3)
    storage = RDBStorage(f"sqlite:///{launcher.path}", heartbeat_interval=1, grace_period=1)
    optuna.storages.fail_stale_trials(optuna.load_study(study_name=NAME, storage=storage))
    left = sum(t.state == TrialState.RUNNING for t in read_trials(launcher.path))
    return _result("stock", launcher, done, time.monotonic() - start, left)


def _result(name: str, launcher: Launcher, kills: int, seconds: float, left: int) -> Result:
    trials = read_trials(launcher.path)
    rows = Counter(_planned(t) for t in trials if t.state == TrialState.COMPLETE)
    runs = count_lines(launcher.log, "finished")
    doubled = sum(max(rows[n], runs[n]) > 1 for n in {*rows, *runs})
    planned = {_planned(t) for t in trials}
    open_ = {_planned(t) for t in trials if not t.state.is_finished()}
    tracebacks = launcher.errors.read_text().count("Traceback (most recent call last)")
    is_file = launcher.path.suffix != ".url"
    healthy = not is_file or sql(launcher.path, "PRAGMA integrity_check") == [("ok",)]
    lost = len(planned - set(rows) - open_)
    interrupted = count_lines(launcher.log, "claimed").total() - runs.total()
    return Result(
        name, kills, interrupted, round(seconds, 1), len(trials), len(rows), doubled, lost, left,
        tracebacks, healthy,
    )  # fmt: skip


def print_table(results: list[Result]) -> None:
    names = [f.name.replace("_", " ") for f in fields(Result)]
    print("\n" + " ".join(f"{name:>12}" for name in names))
    for result in results:
        print(" ".join(f"{value!s:>12}" for value in astuple(result)))
