"""The shared storage: budget, claims, leases and returns, with exact counts."""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from common import LIMIT, wait_for
from hpo.settings import Settings
from hpo.study import leases
from hpo.study.engines.sqlite_file import create_study_file
from hpo.study.storage import LeaseLost, NoTrialLeft, StudyStorage
from hpo.study.upkeep import Upkeep
from storage_helpers import (
    EPOCHS,
    NAME,
    check_study,
    count_lines,
    fork,
    kill,
    open_study,
    read_trials,
    sql,
    stock_storage,
    stock_url,
    storage_of,
    suggest,
    train,
    wait,
    work,
    write_line,
)

# ---- budget and claims ---------------------------------------------------------------------


def test_budget_is_exact_with_16_workers_and_three_relaunches(path: Path) -> None:
    log, errors = path.parent / "log", path.parent / "errors"
    options: dict[str, Any] = {"log": log, "stderr": errors, "grace": 0.4, "epoch": 0.005}
    options["max_attempts"] = 99
    for _ in range(3):  # killed and launched again, three times
        workers = [fork(work, path, rank, 96, **options) for rank in range(16)]
        time.sleep(0.6)
        for pid in workers:
            kill(pid)
    assert wait([fork(work, path, rank, 96, **options) for rank in range(16)]) == [0] * 16
    check_study(path, 96)
    assert wait([fork(work, path, rank, 96, **options) for rank in range(16)]) == [0] * 16
    check_study(path, 96)  # a full study: nothing to do
    assert wait([fork(work, path, rank, 120, **options) for rank in range(16)]) == [0] * 16
    check_study(path, 120)  # exactly the difference
    # A worker can die between the commit and its line in the log, but none finishes twice.
    assert set(count_lines(log, "finished").values()) == {1}
    assert errors.read_text() == ""


def test_200_enqueued_trials_run_once_each_with_8_workers(path: Path) -> None:
    study = open_study(path)
    for i in range(200):
        study.enqueue_trial({"lr": 1e-3, "fc_dim": 64}, user_attrs={"i": i})
    log, errors = path.parent / "log", path.parent / "errors"
    workers = [fork(work, path, r, 200, log=log, stderr=errors, grace=5) for r in range(8)]
    assert wait(workers) == [0] * 8
    check_study(path, 200)
    assert count_lines(log, "claimed") == dict.fromkeys(range(200), 1)
    assert count_lines(log, "finished") == dict.fromkeys(range(200), 1)
    assert errors.read_text() == ""
    trials = read_trials(path)
    assert {(t.params["lr"], t.params["fc_dim"]) for t in trials} == {(1e-3, 64)}
    assert [t.user_attrs["i"] for t in trials] == list(range(200))


def _start_at(path: Path, instant: float, log: Path, total: int) -> None:
    time.sleep(max(0.0, instant - time.monotonic()))
    study = open_study(path, os.getpid(), total_trials=total)
    try:
        write_line(log, f"claimed {study.ask().number}")
    except NoTrialLeft:
        write_line(log, "none 0")


def test_64_simultaneous_starters_each_have_a_trial_or_know_there_is_none(path: Path) -> None:
    log, errors = path.parent / "log", path.parent / "errors"
    instant = time.monotonic() + 1
    starters = [fork(_start_at, path, instant, log, 40, stderr=errors) for _ in range(64)]
    assert wait(starters) == [0] * 64
    assert errors.read_text() == ""
    assert count_lines(log, "claimed") == dict.fromkeys(range(40), 1)
    assert count_lines(log, "none") == {0: 24}


def _create_at(path: Path, instant: float, log: Path) -> None:
    time.sleep(max(0.0, instant - time.monotonic()))
    write_line(log, f"made {int(create_study_file(str(path), NAME))}")
    open_study(path, os.getpid()).ask()


def test_16_simultaneous_creators_make_one_file(tmp_path: Path) -> None:
    log, errors, path = tmp_path / "log", tmp_path / "errors", tmp_path / "study.db"
    instant = time.monotonic() + 1
    creators = [fork(_create_at, path, instant, log, stderr=errors) for _ in range(16)]
    assert wait(creators) == [0] * 16
    assert errors.read_text() == ""
    assert count_lines(log, "made") == {0: 15, 1: 1}
    files = {p.name for p in tmp_path.iterdir()}
    assert files == {"errors", "log", "study.db", "study.db-journal", "study.db.next"}
    assert [t.number for t in read_trials(path)] == list(range(16))


def test_enqueue_counts_in_the_budget(path: Path) -> None:
    study = open_study(path, total_trials=2)
    study.enqueue_trial({"lr": 1e-3})
    study.enqueue_trial({"lr": 2e-3})
    with pytest.raises(NoTrialLeft):
        study.enqueue_trial({"lr": 3e-3})
    assert [study.ask().number, study.ask().number] == [0, 1]
    with pytest.raises(NoTrialLeft):
        study.ask()


def test_a_lease_is_not_renewed_a_moment_after_another_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(path)
    trial = study.ask()
    renew = partial(storage_of(study).renew_lease, trial._trial_id, 900.0)
    seen = [sql(path, "SELECT counter FROM leases")]
    for act in (renew, partial(trial.report, 1.0, 0), renew):
        act()
        seen.append(sql(path, "SELECT counter FROM leases"))
    assert seen[0] == seen[1] != seen[2] == seen[3]
    later = SimpleNamespace(monotonic=lambda: time.monotonic() + 900.0)
    monkeypatch.setattr("hpo.study.held.time", later)
    renew()
    assert sql(path, "SELECT counter FROM leases") != seen[3]
    upkeep = Upkeep(study, replace(Settings.from_env(), lease_grace=60.0))
    assert upkeep._idle + upkeep._seconds < 30.0, "two of these must fit into the grace period"


def test_the_largest_step_of_a_report(path: Path) -> None:
    """One that is larger is refused before anything is written: the trial can go on."""
    study = open_study(path, wait=600.0)
    trial, largest = study.ask(), storage_of(study).file.largest_step
    trial.report(1.0, largest)
    with pytest.raises(ValueError, match=r"the step \d+ of a report is too large"):
        trial.report(2.0, largest + 1)
    study.tell(trial, 1.0)
    assert read_trials(path)[0].intermediate_values == {largest: 1.0}


def test_waiting_trials_come_first_in_order(path: Path) -> None:
    study = open_study(path, total_trials=3)
    first, second = study.ask(), study.ask()
    storage_of(study).return_trial(second._trial_id, crashed=False)
    storage_of(study).return_trial(first._trial_id, crashed=False)
    assert [study.ask().number for _ in range(3)] == [0, 1, 2]


# ---- leases --------------------------------------------------------------------------------


def test_returned_trial_keeps_parameters_and_reports(path: Path) -> None:
    a, b = open_study(path, "a", seed=1), open_study(path, "b", seed=2)
    trial = a.ask()
    before = suggest(trial)
    trial.report(0.5, 0)
    trial.report(float("nan"), 1)
    trial.set_user_attr("note", [1, "x"])
    assert storage_of(a).return_trial(trial._trial_id, crashed=False) == TrialState.WAITING
    again = b.ask()
    assert again.number == trial.number
    assert suggest(again) == before
    with pytest.warns(UserWarning, match="already reported"):
        again.report(0.25, 0)  # Optuna's own rule: a step's first report counts
    storage_of(b).set_trial_intermediate_value(again._trial_id, 1, 0.25)  # the storage may
    b.tell(again, 1.0)
    frozen = read_trials(path)[0]
    assert (frozen.params, frozen.intermediate_values) == (before, {0: 0.5, 1: 0.25})
    assert frozen.user_attrs == {"note": [1, "x"], "worker": "worker b"}
    assert sql(path, "SELECT count(*) FROM trial_params") == [(8,)]


def test_returned_enqueued_trial_keeps_its_fixed_parameters(path: Path) -> None:
    study = open_study(path, seed=1)
    study.enqueue_trial({"lr": 1e-3, "kernel1": 7})
    trial = study.ask()
    assert trial.suggest_float("lr", 1e-4, 5e-3, log=True) == 1e-3
    drawn = trial.suggest_categorical("fc_dim", [64, 128, 256, 512])
    storage_of(study).return_trial(trial._trial_id, crashed=True)
    again = open_study(path, "b", seed=2).ask()
    config = suggest(again)
    assert (config["lr"], config["kernel1"], config["fc_dim"]) == (1e-3, 7, drawn)


@pytest.mark.parametrize("name", ["TPESampler", "GridSampler", "CmaEsSampler", "QMCSampler"])
def test_samplers_accept_a_returned_trial(path: Path, name: str) -> None:
    pytest.importorskip({"CmaEsSampler": "cmaes", "QMCSampler": "scipy"}.get(name, "optuna"))
    space = {"x": [0.0, 1.0, 2.0], "y": [0.0, 0.5, 1.0]}
    options: dict[str, Any] = {"search_space": space} if name == "GridSampler" else {}
    study = open_study(path)
    study.sampler = getattr(optuna.samplers, name)(**options)
    for i in range(6):
        trial = study.ask()
        before = trial.suggest_float("x", 0, 2)
        storage_of(study).return_trial(trial._trial_id, crashed=i % 2 == 0)
        again = study.ask()
        assert again.suggest_float("x", 0, 2) == before
        study.tell(again, before + again.suggest_float("y", 0, 1))
    check_study(path, 6, reports=None)
    if name == "GridSampler":
        assert len({tuple(t.params.values()) for t in read_trials(path)}) == 6


def test_only_the_holder_can_write(path: Path) -> None:
    a, b = open_study(path, "a"), open_study(path, "b", grace=0.0)
    trial = a.ask()
    suggest(trial)
    storage = storage_of(b)
    assert storage.return_stale_trials(b._study_id) == [0]
    for _ in range(2):  # while it waits, and then while b runs it
        before = sql(path, "SELECT * FROM trials, leases")
        with pytest.raises(LeaseLost):
            trial.report(1.0, 0)
        with pytest.raises(LeaseLost):
            trial.set_user_attr("key", "value")
        with pytest.raises(LeaseLost):
            storage_of(a).renew_lease(trial._trial_id)
        with pytest.raises(LeaseLost):
            storage_of(a).set_trial_system_attr(trial._trial_id, "key", "value")
        assert sql(path, "SELECT * FROM trials, leases") == before
        if read_trials(path)[0].state == TrialState.WAITING:
            theirs = b.ask()
    b.tell(theirs, 2.0)
    a.get_trials()  # even when it has seen that the trial is finished
    with pytest.raises(LeaseLost):
        trial.report(1.0, 0)
    with pytest.raises(LeaseLost):
        a.tell(trial, 1.0)
    (frozen,) = read_trials(path)
    assert (frozen.value, frozen.params, frozen.intermediate_values) == (2.0, {}, {})


def test_a_trial_that_stock_optuna_finished_by_hand_stays_so(path: Path) -> None:
    study = open_study(path)
    trial = study.ask()
    stock = optuna.load_study(study_name=NAME, storage=stock_url(path))
    stock.tell(trial.number, 2.0)
    for write in (lambda: trial.report(1.0, 0), lambda: study.tell(trial, 1.0)):
        with pytest.raises(LeaseLost):
            write()
    (frozen,) = read_trials(path)
    assert (frozen.value, frozen.intermediate_values) == (2.0, {})


def test_a_lease_renewed_in_the_last_moment_is_not_taken(path: Path) -> None:
    a, b = open_study(path, "a"), open_study(path, "b", grace=0.0)
    trial = a.ask()
    leases, file = storage_of(b)._leases, storage_of(b).file
    (stale,) = leases.find_stale(file, b._study_id, None)
    storage_of(a).renew_lease(trial._trial_id)  # between the look and the transaction
    assert not leases.take_back(file, stale)
    a.tell(trial, 1.0)


def test_a_dead_jobs_trials_return_at_once(path: Path) -> None:
    asked = {job: open_study(path, f"j{job}", job_id=job).ask().number for job in ("7", "8", "")}
    study = open_study(path, "init", job_id="9")
    storage = storage_of(study)
    assert storage.return_stale_trials(study._study_id, alive_jobs={"7"}) == [asked["8"]]
    assert storage.return_stale_trials(study._study_id, alive_jobs=set()) == [asked["7"]]
    assert read_trials(path)[2].state == TrialState.RUNNING  # no job: only its counter tells


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what lets seconds pass on the clock of those who look at leases."""
    now = 0.0

    def pass_by(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(leases, "time", SimpleNamespace(monotonic=lambda: now))
    return pass_by


def test_a_lease_that_moves_is_never_taken(path: Path, passes: Callable[[float], None]) -> None:
    a, b = open_study(path, "a"), open_study(path, "b", grace=20.0)
    trial = a.ask()
    for _ in range(20):
        passes(5.0)
        storage_of(a).renew_lease(trial._trial_id)
        assert storage_of(b).return_stale_trials(b._study_id) == []
    for _ in range(3):
        passes(5.0)
        assert storage_of(b).return_stale_trials(b._study_id) == []
    passes(5.0)  # the grace period is over
    assert storage_of(b).return_stale_trials(b._study_id) == [0]


def test_an_observer_that_was_stopped_itself_takes_nothing(
    path: Path, passes: Callable[[float], None]
) -> None:
    a, b = open_study(path, "a"), open_study(path, "b", grace=20.0)
    a.ask()
    storage_of(b).return_stale_trials(b._study_id)
    passes(60.0)  # the whole cluster hangs for three grace periods
    assert storage_of(b).return_stale_trials(b._study_id) == []


def _run(path: Path, log: Path, grace: float, go: Path | None = None) -> None:
    """Be a worker, who waits after its first report until there is a file `go`."""

    def objective(trial: optuna.Trial, epoch: float) -> float:
        if go:
            trial.report(suggest(trial)["lr"], 0)
            storage_of(trial.study).renew_lease(trial._trial_id)  # takes it along to the file
            write_line(log, "reported 0")
        while go and not go.exists():
            time.sleep(0.01)
        value = train(trial, epoch)
        return value + 1000 * os.getpid()  # so that one sees whose result was kept

    work(path, 0, 1, grace=grace, objective=objective, log=log)


def _freeze(pid: int, path: Path) -> None:
    """Stop a process, but not while it holds a lock: then everybody waits for it."""
    idle = "SELECT count(*) FROM pg_stat_activity WHERE state LIKE 'idle in transaction%'"
    while True:
        os.kill(pid, signal.SIGSTOP)
        if path.suffix == ".url":
            if sql(path, idle) == [(0,)]:
                return
            os.kill(pid, signal.SIGCONT)
            continue
        try:
            with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as db:
                db.execute("BEGIN EXCLUSIVE")
            return
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.01)


def test_frozen_workers_late_result_is_refused(path: Path) -> None:
    log, errors, go = path.parent / "log", path.parent / "errors", path.parent / "go"
    frozen = fork(_run, path, log, 10.0, go, stderr=errors)
    wait_for(lambda: count_lines(log, "reported"))
    _freeze(frozen, path)
    other = fork(_run, path, log, 0.5, stderr=errors)
    wait_for(lambda: count_lines(log, "claimed") == {0: 2})
    go.touch()
    os.kill(frozen, signal.SIGCONT)
    assert wait([frozen, other]) == [0, 0]
    assert errors.read_text() == ""  # no traceback
    assert (count_lines(log, "claimed"), count_lines(log, "lost")) == ({0: 2}, {0: 1})
    assert count_lines(log, "finished") == {0: 1}
    (trial,) = read_trials(path)
    assert trial.value is not None
    assert int(trial.value // 1000) == other
    assert sorted(trial.intermediate_values) == list(range(EPOCHS))
    assert sql(path, "SELECT count(*) FROM trial_values") == [(1,)]


def _work_with_other_clocks(path: Path, rank: int, log: Path, offset: float) -> None:
    """A host whose wall clock and monotonic clock are both elsewhere."""
    wall, monotonic = time.time, time.monotonic

    class Elsewhere(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(wall() + offset, tz)

    time.time, time.monotonic = lambda: wall() + offset, lambda: monotonic() + 7 * offset
    for module in ("hpo.study.storage", "hpo.study.held", "hpo.study.tables"):
        vars(sys.modules[module])["datetime"] = Elsewhere
    work(path, rank, 24, grace=10.0, epoch=0.05, log=log)


def test_clocks_ten_minutes_apart_take_no_live_trial(path: Path) -> None:
    log, errors = path.parent / "log", path.parent / "errors"
    offsets = [-600.0, 0.0, 600.0, 1200.0]
    workers = [
        fork(_work_with_other_clocks, path, rank, log, offset, stderr=errors)
        for rank, offset in enumerate(offsets)
    ]
    assert wait(workers) == [0] * 4
    check_study(path, 24)
    assert errors.read_text() == ""
    assert count_lines(log, "claimed") == dict.fromkeys(range(24), 1)
    assert count_lines(log, "lost") == {}


def _poisoned(trial: optuna.Trial, epoch: float) -> float:
    value = train(trial, epoch)
    if trial.number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return value


def test_poison_fails_after_max_attempts_and_the_study_goes_on(path: Path) -> None:
    log, errors, ends = path.parent / "log", path.parent / "errors", []
    for rank in range(6):  # a launcher that starts the worker again
        options = {"grace": 0.2, "objective": _poisoned, "max_attempts": 3}
        ends += wait([fork(work, path, rank, 8, log=log, stderr=errors, **options)])
    assert ends == [-9, -9, -9, 0, 0, 0]
    assert count_lines(log, "claimed") == {n: 3 if n == 3 else 1 for n in range(8)}
    trials = read_trials(path)
    assert [t.number for t in trials if t.state == TrialState.COMPLETE] == [0, 1, 2, 4, 5, 6, 7]
    assert trials[3].state == TrialState.FAIL
    assert trials[3].user_attrs["fail_reason"].startswith("crashed 3 times, the last time on ")


# ---- beside stock Optuna -------------------------------------------------------------------


def _stock_worker(path: Path, trials: int) -> None:
    study = optuna.load_study(study_name=NAME, storage=stock_storage(path))
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, train(trial))


def test_stock_worker_beside_ours_on_the_same_file(path: Path) -> None:
    errors = path.parent / "errors"
    ours = [fork(work, path, rank, 60, stderr=errors, grace=2.0) for rank in range(3)]
    stock = fork(_stock_worker, path, 15, stderr=errors)
    assert wait([*ours, stock]) == [0] * 4
    total = len(read_trials(path))  # stock knows no budget: it may go over
    assert 60 <= total <= 75
    check_study(path, total)
    assert errors.read_text() == ""


def test_stock_and_ours_read_the_same(path: Path) -> None:
    study = open_study(path)
    study.set_user_attr("note", {"a": [1, None]})
    trial = study.ask()
    suggest(trial)
    trial.suggest_int("layers", 4, 24, step=2)
    for step, value in enumerate([1.5, float("inf"), float("-inf"), float("nan")]):
        trial.report(value, step)
    study.tell(trial, float("inf"))
    study.tell(study.ask(), state=TrialState.PRUNED)
    study.enqueue_trial({"lr": 1e-3})
    stock = optuna.load_study(study_name=NAME, storage=stock_url(path))
    mine = open_study(path, "fresh").get_trials()
    for ours, theirs in zip(mine, stock.get_trials(), strict=True):
        assert repr(ours) == repr(theirs)  # NaN is not equal to itself
    assert stock.user_attrs == study.user_attrs == {"note": {"a": [1, None]}}


def test_a_study_that_stock_optuna_made_goes_on_here(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    optuna.create_study(study_name=NAME, storage=stock_url(path))
    _stock_worker(path, 3)
    work(path, 0, 6)
    check_study(path, 6)


def test_stock_may_delete_the_study_and_reuse_its_ids(path: Path) -> None:
    open_study(path).ask()
    optuna.delete_study(study_name=NAME, storage=stock_url(path))
    stock = optuna.create_study(study_name=NAME, storage=stock_url(path))
    trial = stock.ask()  # has the id, but not the lease, of the trial that is gone
    study = open_study(path, "b", grace=0.0)
    for _ in range(3):
        assert storage_of(study).return_stale_trials(study._study_id, alive_jobs=set()) == []
    stock.tell(trial, 1.0)


# ---- parameters that wait for the first report ---------------------------------------------


def test_parameters_are_written_with_the_first_report(path: Path) -> None:
    study = open_study(path)
    trial = study.ask()
    suggest(trial)
    assert sql(path, "SELECT count(*) FROM trial_params") == [(0,)]
    assert len(study.get_trials()[0].params) == 8  # but this process sees them
    trial.report(1.0, 0)
    assert sql(path, "SELECT count(*) FROM trial_params") == [(8,)]
    late = study.ask()
    suggest(late)
    storage_of(study).renew_lease(late._trial_id)
    assert sql(path, "SELECT count(*) FROM trial_params") == [(16,)]


def test_incompatible_distribution_is_refused_at_once(path: Path) -> None:
    study = open_study(path)
    trial = study.ask()
    trial.suggest_categorical("a", [1, 2])
    trial.suggest_float("b", 0, 1)
    with pytest.raises(ValueError, match="dynamic value space"):
        study.ask().suggest_categorical("a", [1, 2, 3])
    study.tell(trial, 1.0)
    with pytest.raises(ValueError, match="different"):
        open_study(path, "b").ask().suggest_categorical("b", [1, 2, 3])


def test_threads_and_copies_share_one_file(path: Path) -> None:
    study = open_study(path, total_trials=40)

    def loop() -> None:
        while True:
            try:
                trial = study.ask()
            except NoTrialLeft:
                return
            study.tell(trial, train(trial))

    threads = [threading.Thread(target=loop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    check_study(path, 40)
    copied: StudyStorage = pickle.loads(pickle.dumps(storage_of(study)))
    assert len(copied.get_all_trials(study._study_id)) == 40


def test_a_forked_child_has_its_own_connection(path: Path) -> None:
    study = open_study(path)
    trial = study.ask()
    assert wait([fork(suggest_and_report, trial) for _ in range(3)]) == [0] * 3
    trial.report(9.0, 9)  # the parent's connection still works
    study.tell(trial, 1.0)
    assert sorted(read_trials(path)[0].intermediate_values) == [0, 9]


def test_fork_never_splits_another_threads_transaction(path: Path) -> None:
    study = open_study(path)
    storage, trial = storage_of(study), study.ask()
    stop = threading.Event()

    def renew() -> None:
        while not stop.is_set():
            storage.renew_lease(trial._trial_id)

    thread = threading.Thread(target=renew)
    thread.start()
    # Each child would wait for ever if it inherited a lock that only the parent's thread frees.
    children = [fork(storage.get_n_trials, study._study_id) for _ in range(40)]
    stop.set()
    thread.join()
    deadline, ends = time.monotonic() + LIMIT, list[int]()
    while children and time.monotonic() < deadline:
        pid, status = os.waitpid(children[0], os.WNOHANG)
        if pid:
            ends.append(status)
            children.pop(0)
        else:
            time.sleep(0.01)
    for pid in children:
        kill(pid)
    assert ends == [0] * 40
    study.tell(trial, 1.0)
    check_study(path, 1, reports=None)


def suggest_and_report(trial: optuna.Trial) -> None:
    file: Any = storage_of(trial.study).file
    inherited = file._connection
    trial.report(0.0, 0)
    assert file.connection() is not inherited
