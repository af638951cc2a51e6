"""What a worker remembers of the trials: never older than the file, read only when need be."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from hpo.study.cache import Follower
from hpo.study.storage import StudyStorage
from storage_helpers import file_of, open_study, place_of, storage_of, suggest

only_sqlite = pytest.mark.parametrize("path", ["sqlite"], indirect=True)


def fresh(path: Path) -> list[Any]:
    """Return the trials as somebody reads them who remembers nothing."""
    return list(StudyStorage(place_of(path, {})).get_all_trials(1))


def selects(study: optuna.Study) -> list[str]:
    seen: list[str] = []
    file_of(storage_of(study)).connection().set_trace_callback(
        lambda sql: seen.append(sql) if "SELECT" in sql else None
    )
    return seen


@only_sqlite
def test_nothing_is_selected_while_only_this_worker_reports(path: Path) -> None:
    study = open_study(path, 0)
    trial = study.ask()
    suggest(trial)
    trial.report(1.0, 0)
    states = (TrialState.COMPLETE,)
    study.get_trials(deepcopy=False, states=states)
    seen = selects(study)
    for step in range(1, 4):
        trial.report(1.0, step)
        assert study.get_trials(deepcopy=False, states=states) == []
    assert [sql for sql in seen if "picked" in sql] == []
    assert len(fresh(path)[0].intermediate_values) == 4


def test_every_write_is_seen_at_once(path: Path) -> None:
    """Of this worker, and of another; after each, both see what is in the file."""
    one, two = open_study(path, 1), open_study(path, 2)

    def same() -> None:
        expected = fresh(path)
        for study in (one, two):
            for states in (None, (TrialState.COMPLETE,), (TrialState.RUNNING, TrialState.FAIL)):
                wanted = [t for t in expected if states is None or t.state in states]
                trials = study.get_trials(states=states)
                assert [(t.number, t.state) for t in trials] == [
                    (t.number, t.state) for t in wanted
                ]
                finished = [t for t in trials if t.state.is_finished()]
                assert finished == [t for t in wanted if t.state.is_finished()]

    same()
    first = one.ask()
    same()
    one.enqueue_trial({"lr": 1e-3})
    same()
    second = two.ask()
    assert second.number == 1  # the waiting one
    same()
    suggest(first)
    first.report(0.5, 0)
    same()
    one.tell(first, 0.5)
    same()
    storage_of(two).return_trial(second._trial_id, crashed=False)
    same()
    again = one.ask()
    assert again.number == 1
    same()
    one.tell(again, state=TrialState.FAIL)
    same()
    two.add_trial(optuna.trial.create_trial(value=1.0))
    same()


@pytest.mark.parametrize("values", [[1.5], [float("inf")], None])
def test_a_trial_finished_here_is_as_in_the_file(path: Path, values: list[float] | None) -> None:
    study = optuna.load_study(
        study_name="study", storage=StudyStorage(place_of(path, {}), worker="worker 0 on n1")
    )
    study.get_trials()
    trial = study.ask()
    suggest(trial)
    trial.set_user_attr("note", {"a": (1, 2)})
    trial.report(float("nan"), 0)
    trial.report(2.0, 1)
    study.tell(trial, values, state=TrialState.PRUNED if values is None else None)
    seen = selects(study) if path.suffix == ".db" else []
    mine = storage_of(study).get_trial(trial._trial_id)
    assert seen == []
    theirs = fresh(path)[0]
    assert mine.user_attrs["worker"] == "worker 0 on n1"
    for name, value in vars(theirs).items():
        assert repr(getattr(mine, name)) == repr(value), name  # NaN is like no other number


def test_another_connection_counts_anew(path: Path) -> None:
    """SQLite's data_version begins anew: after a fork, and when a connection was closed."""
    study = open_study(path, 0)
    study.ask()
    assert len(study.get_trials()) == 1
    storage_of(study).remove_session()
    open_study(path, 1).ask()
    assert len(study.get_trials()) == 2
    if (pid := os.fork()) == 0:
        open_study(path, 2).ask()
        os._exit(len(study.get_trials()))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
    assert len(study.get_trials()) == 3


@only_sqlite
def test_statements_of_a_trial(path: Path) -> None:
    """In steady state, with the sampler and the pruner that are the default."""
    study = open_study(path)
    study.sampler = optuna.samplers.TPESampler(seed=0)
    study.pruner = optuna.pruners.MedianPruner()
    seen: list[str] = []

    def run_one() -> None:
        trial = study.ask()
        value = suggest(trial)["lr"]
        for step in range(4):
            trial.report(value, step)
            trial.should_prune()
        study.tell(trial, value)

    for _ in range(12):
        run_one()
    file_of(storage_of(study)).connection().set_trace_callback(seen.append)
    for _ in range(4):
        run_one()
    assert sum(s.startswith("COMMIT") for s in seen) == 4 * 7
    assert sum(s.lstrip().startswith(("SELECT", "WITH")) for s in seen) == 4 * 3


class _Ended(Follower):
    """Notes what it has taken, and how often it began anew."""

    anew = -1

    def forget(self) -> None:
        self.numbers: list[int] = []
        self.anew += 1

    def take(self, trial: FrozenTrial) -> None:
        self.numbers.append(trial.number)


def test_a_finished_trial_is_taken_once_whatever_the_order(path: Path) -> None:
    """Two workers end their trials in any order; then one goes back to the queue and ends again."""
    study, other, chance = open_study(path, 0), open_study(path, 1), random.Random(0)
    ended = _Ended()

    def check() -> None:
        trials = study.get_trials(deepcopy=False)
        unfinished = ended.look(trials)
        assert sorted(ended.numbers) == [t.number for t in trials if t.state.is_finished()]
        assert unfinished == [t for t in trials if not t.state.is_finished()]

    running: list[tuple[optuna.Study, optuna.Trial]] = []
    for step in range(30):
        who = chance.choice([study, other])
        running.append((who, who.ask()))
        while len(running) > chance.randrange(5):
            owner, trial = running.pop(chance.randrange(len(running)))
            owner.tell(trial, state=TrialState.FAIL if step == 9 else TrialState.PRUNED)
        check()
    assert ended.anew == 0
    while running:
        running[-1][0].tell(running.pop()[1], 1.0)
    first, later = study.ask(), other.ask()
    for anew in (1, 2):  # some before the first that still runs, and then one after it
        assert storage_of(study).retry_failed(1)
        check()
        assert ended.anew == anew
        while any(t.state == TrialState.WAITING for t in study.get_trials()):
            study.tell(study.ask(), 1.0)
        if anew == 1:
            other.tell(later, state=TrialState.FAIL)
        check()
    study.tell(first, 1.0)
    check()
