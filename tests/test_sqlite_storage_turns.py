"""Few file operations per trial: what shares a transaction, exact counts; and long studies."""

from __future__ import annotations

import copy
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from common import wait_for
from hpo import checkpoint
from hpo.study import cache, tables, trials
from hpo.study.leases import LeaseLost
from hpo.study.serving import server
from storage_helpers import (
    check_study,
    file_of,
    fork,
    make_study,
    open_study,
    read_trials,
    short_trials,
    sql,
    stock_storage,
    storage_of,
    suggest,
    wait,
)

LONG = 600.0  # seconds that no test takes: whatever waits, waits to the trial's next write
only_sqlite = pytest.mark.parametrize("path", ["sqlite"], indirect=True)


def reports(path: Path) -> dict[int, float]:
    """Return the reports of the only trial that are in the database."""
    return read_trials(path)[0].intermediate_values


# ---- what waits, and until when --------------------------------------------------------------


def test_reports_wait_for_the_trials_next_write_and_its_pruner_sees_them(path: Path) -> None:
    study = open_study(path, wait=LONG)
    seen: list[int] = []

    class Pruner(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            (all_,) = study.get_trials()
            assert all_.intermediate_values == trial.intermediate_values
            seen.append(len(trial.intermediate_values))
            return False

    study.pruner = Pruner()
    trial = study.ask()
    suggest(trial)
    for step in range(3):
        trial.report(step / 2, step)
        trial.should_prune()
    assert seen == [1, 2, 3]
    assert reports(path) == {}
    trial.set_user_attr("note", 1)  # is never late, and takes along what waits
    assert reports(path) == {0: 0.0, 1: 0.5, 2: 1.0}
    trial.report(9.0, 9)
    study.tell(trial, 1.0)
    (frozen,) = read_trials(path)
    assert (frozen.intermediate_values, frozen.value) == ({0: 0.0, 1: 0.5, 2: 1.0, 9: 9.0}, 1.0)
    assert len(frozen.params) == 8


def test_what_waits_is_written_in_time_by_itself(path: Path) -> None:
    study = open_study(path, wait=0.2)
    trial = study.ask()
    trial.report(1.0, 0)
    wait_for(lambda: reports(path) == {0: 1.0})
    storage_of(study).set_trial_system_attr(trial._trial_id, "rung", 1)
    trial.report(2.0, 1)
    wait_for(lambda: reports(path) == {0: 1.0, 1: 2.0})
    assert read_trials(path)[0].system_attrs == {"rung": 1}


def test_reports_of_long_epochs_are_written_at_once(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = open_study(path, wait=0.05)
    monkeypatch.setattr("hpo.study.held.threading", None)  # nobody writes later
    trial = study.ask()
    for step in range(3):
        time.sleep(0.1)
        trial.report(1.0, step)
        assert len(reports(path)) == step + 1


@pytest.mark.parametrize("excused", [True, False])
def test_a_trial_that_goes_back_takes_its_reports_along(path: Path, excused: bool) -> None:
    study = open_study(path, wait=LONG)
    trial = study.ask()
    params = suggest(trial)
    trial.report(1.0, 0)
    storage_of(study).return_trial(trial._trial_id, excused=excused)
    (frozen,) = read_trials(path)
    assert (frozen.state, frozen.params) == (TrialState.WAITING, params)
    assert frozen.intermediate_values == {0: 1.0}


def test_a_lease_that_was_lost_is_noticed_by_the_next_write(path: Path) -> None:
    a, b = open_study(path, "a", wait=LONG), open_study(path, "b", grace=0.0)
    trial = a.ask()
    trial.report(1.0, 0)
    assert storage_of(b).return_stale_trials(b._study_id) == [0]
    theirs = b.ask()
    trial.report(2.0, 1)  # in memory alone
    before = sql(path, "SELECT * FROM trials, leases")
    with pytest.raises(LeaseLost):
        storage_of(a).renew_lease(trial._trial_id)
    with pytest.raises(LeaseLost):
        a.tell(trial, 1.0)
    assert sql(path, "SELECT * FROM trials, leases") == before
    assert reports(path) == {}
    b.tell(theirs, 2.0)


def test_a_forked_child_writes_at_once(path: Path) -> None:
    study = open_study(path, wait=LONG)
    trial = study.ask()
    assert wait([fork(trial.report, 1.0, 0)]) == [0]
    assert reports(path) == {0: 1.0}


def test_a_served_study_keeps_nothing_in_the_servers_memory() -> None:
    assert server._Storage.WAIT == 0.0


def test_what_this_process_does_meanwhile_is_seen_at_once(path: Path) -> None:
    """However young what it has read is; only what others do may be as old as a report."""
    study, fresh = open_study(path, wait=LONG), open_study(path, "fresh")

    def same() -> None:
        states = [[(t.number, t.state) for t in each.get_trials()] for each in (study, fresh)]
        assert states[0] == states[1]

    trials = [study.ask() for _ in range(3)]
    for step, trial in enumerate(trials):
        trial.report(1.0, step)
        same()
    study.enqueue_trial({"lr": 1e-3})
    same()
    study.tell(trials[1], 1.0)
    same()
    storage_of(study).return_trial(trials[2]._trial_id, excused=True)
    trials[0].report(1.0, 7)
    again = study.ask()
    assert again.number == 2
    same()
    fresh.tell(fresh.ask(), 1.0)
    assert len(study.get_trials()) == 4  # old, but whole
    trials[0].set_user_attr("note", 1)


def test_of_the_running_trials_those_that_have_changed_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker reads several times per trial, and in a crowd hundreds of others run."""
    study, others, stock = open_study(path), open_study(path, "others"), stock_storage(path)
    trials = [others.ask() for _ in range(5)]
    theirs = optuna.load_study(study_name=study.study_name, storage=stock)
    theirs.ask()  # without a lease: it is read each time
    seen: list[int] = []
    build = cache.build_trials

    def spy(rows: list[tuple[Any, ...]]) -> dict[int, FrozenTrial]:
        built = build(rows)
        seen[:] = sorted(trial.number for trial in built.values())
        return built

    monkeypatch.setattr(cache, "build_trials", spy)

    def read() -> list[int]:
        found = study.get_trials()
        assert found == theirs.get_trials()
        return seen

    assert read() == [0, 1, 2, 3, 4, 5]
    trials[1].report(0.5, 0)
    suggest(trials[3])
    trials[3].report(0.5, 0)
    assert read() == [1, 3, 5]
    others.tell(trials[1], 1.0)
    theirs.tell(2, 1.0)  # a stock worker ends it by hand, and its lease stays as it is
    assert read() == [1, 2, 5]
    storage_of(others).return_trial(trials[4]._trial_id)
    assert read() == [4, 5]
    assert read() == [4, 5]  # one that waits is read each time
    assert study.ask().number == 4
    assert read() == [4, 5]


# ---- a worker that is killed within that second ----------------------------------------------


def _save_and_die(path: Path) -> None:
    trial = open_study(path, wait=LONG).ask()
    suggest(trial)
    for step in range(3):
        trial.report(step / 2, step)
    checkpoint.save(trial, losses=[0.0, 0.5, 1.0])
    os._exit(9)


@only_sqlite
def test_a_checkpoint_carries_what_waits(path: Path) -> None:
    assert wait([fork(_save_and_die, path)]) == [9]
    assert reports(path) == {}
    storage_of(open_study(path, grace=0.0)).return_stale_trials(1)
    trial = open_study(path, "next", wait=LONG).ask()
    assert checkpoint.load(trial) == [0.0, 0.5, 1.0]
    trial.report(1.5, 3)
    trial.study.tell(trial, 1.5)
    assert reports(path) == {0: 0.0, 1: 0.5, 2: 1.0, 3: 1.5}


@only_sqlite
def test_nothing_waits_where_something_else_saves(path: Path) -> None:
    """A framework in the trial's folder, a process beside the worker: they carry no reports."""
    trial = open_study(path, wait=LONG).ask()
    trial.report(1.0, 0)
    checkpoint.folder(trial)
    assert reports(path) == {0: 1.0}
    trial.report(2.0, 1)
    assert reports(path) == {0: 1.0, 1: 2.0}


# ---- counts --------------------------------------------------------------------------------


def _trials(path: Path) -> tuple[optuna.Study, Callable[[int], None]]:
    """Return a study, and what runs trials of short epochs."""
    study = open_study(path, wait=LONG)
    return study, short_trials(study)


@only_sqlite
def test_statements_of_a_trial_of_short_epochs(path: Path) -> None:
    study, run = _trials(path)
    seen: list[str] = []
    file_of(storage_of(study)).connection().set_trace_callback(seen.append)
    run(4)
    assert sum(s.startswith("COMMIT") for s in seen) == 4 * 2
    assert sum(s.lstrip().startswith(("SELECT", "WITH")) for s in seen) == 4 * 3
    check_study(path, 16)


def traced(path: Path) -> None:
    """Run the trials whose system calls are counted, between two that no program makes."""
    _, run = _trials(path)
    os.access("/begin-of-the-count", os.F_OK)
    run(4)
    os.access("/end-of-the-count", os.F_OK)


def _system_calls(path: Path) -> Counter[str]:
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\n"
    code += f"import test_sqlite_storage_turns as t\nt.traced(Path({str(path)!r}))"
    record = path.with_name("calls")
    strace = ["strace", "-f", "-qq", "-o", str(record)]
    subprocess.run([*strace, sys.executable, "-c", code], check=True)
    text = record.read_text()
    text = text[text.index("begin-of-the-count") : text.index("end-of-the-count")]
    return Counter(re.findall(r"^\d+ +(\w+)\(", text, re.MULTILINE))


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_system_calls_of_a_trial_of_short_epochs(tmp_path: Path) -> None:
    """Each is a round with the file server, where there is one."""
    calls: Any = _system_calls(make_study(tmp_path))
    per_trial = {name: number / 4 for name, number in calls.items()}
    assert per_trial["fdatasync"] == 10  # five in each of two transactions
    most = {"openat": 10, "fcntl": 44, "pwrite64": 80, "pread64": 20}
    assert {name: per_trial[name] for name in most if per_trial[name] > most[name]} == {}


# ---- long studies --------------------------------------------------------------------------


def fill(study: optuna.Study, number: int) -> None:
    """Put complete trials into a new study, in one transaction."""
    template = optuna.trial.create_trial(value=0.0)
    with file_of(storage_of(study)).write() as db:
        for each in range(number):
            trial = copy.copy(template)
            trial.number, trial.values = each, [random.random()]
            tables.insert_trial(db, study._study_id, trial)


def _steps_of_a_trial(folder: Path, behind: int) -> int:
    """Return how many instructions SQLite carries out for a trial and a look at the others."""
    folder.mkdir()
    study = open_study(make_study(folder), wait=LONG, total_trials=behind + 9)
    fill(study, behind)
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    def run() -> None:
        trial = study.ask()
        suggest(trial)
        trial.report(1.0, 0)
        trial.should_prune()
        storage_of(study).renew_lease(trial._trial_id)
        storage_of(study).return_stale_trials(study._study_id)
        assert storage_of(study).count_leases(study._study_id) == 1
        study.tell(trial, 1.0)

    run()  # what is there is read once
    file_of(storage_of(study)).connection().set_progress_handler(count, 1)
    run()
    return steps


def test_a_trial_costs_sqlite_no_more_behind_many_others(tmp_path: Path) -> None:
    few, many = (_steps_of_a_trial(tmp_path / str(n), n) for n in (50, 2000))
    assert many < 1.2 * few


def test_a_trial_is_ranked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ranked anew each time: whoever else finishes one, and after it was all read anew."""
    path = make_study(tmp_path)
    study, other = open_study(path, 0), open_study(path, 1)
    fill(study, 300)
    looked: list[int] = []
    is_feasible = trials.is_feasible

    def look(trial: FrozenTrial) -> bool:
        looked.append(trial.number)
        return is_feasible(trial)

    def numbers() -> list[int]:
        return [trial.number for trial in trials.best_trials(study)]

    def sorted_anew() -> list[int]:
        complete = open_study(path, 2).get_trials(states=(TrialState.COMPLETE,))
        return [t.number for t in sorted(complete, key=lambda t: (t.value, t.number))]

    monkeypatch.setattr(trials, "is_feasible", look)
    assert numbers() == sorted_anew()
    assert len(looked) == 300
    early, late = other.ask(), study.ask()
    study.tell(late, 0.5)
    other.tell(early, -1.0)
    assert numbers() == numbers() == sorted_anew()
    assert sorted(looked[300:]) == [early.number, late.number]
    storage_of(study).retry_failed(study._study_id)  # it forgets what it has read
    other.tell(other.ask(), -2.0)
    assert numbers() == sorted_anew()
