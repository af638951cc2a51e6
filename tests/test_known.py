"""What a study begins with: known_good(), KNOWN_GOOD, FROM_STUDY; each once; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

import known_for_tests
import optuna_command
from common import HELPERS, SCRIPTS, Run
from hpo.script import Script
from hpo.search.given import GivenFirst
from hpo.search.known import KNOWN, begin_with, first_trials, known_for
from hpo.search.remembered import plan_of
from hpo.search.samplers import assign
from hpo.settings import Settings, UserError, forget
from hpo.study.opening import create_or_open_study, open_study
from hpo.words import logger
from known_for_tests import other_study
from storage_helpers import wait

SCRIPT = Script("known_for_tests.py", vars(known_for_tests))
FIRST = [{"x": 0.25, "layers": (4,)}, {"x": 0.5}]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests' objective import hpo, and its helpers."""
    monkeypatch.setenv("PYTHONPATH", f"{SCRIPTS}:{HELPERS}")
    monkeypatch.setenv("SAMPLER", "random")


def found(**env: str) -> list[dict[str, Any]]:
    """Return what a study with these settings would begin with."""
    settings = Settings.from_env(**env)
    return known_for(settings, SCRIPT, plan_of(settings, SCRIPT))


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    forget()
    return open_study(Settings.from_env()).get_trials()


def test_workers_that_start_together_and_again_try_each_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = other_study(tmp_path / "old.db", [0.1, 5.0, -0.2, 0.1, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setenv("FROM_STUDY", source)
    monkeypatch.setenv("TOTAL_TRIALS", "5")
    assert wait([known_for_tests.start(rank) for rank in range(3)]) == [0, 0, 0]
    monkeypatch.setenv("TOTAL_TRIALS", "16")
    (tmp_path / "old.db").unlink()  # it is no longer needed
    assert wait([known_for_tests.start(rank) for rank in range(3)]) == [0, 0, 0]
    xs = [trial.params["x"] for trial in trials()]
    assert xs[:6] == [0.25, 0.5, 0.1, -0.2, 0.3, 0.4]  # 0.5 is there, and then five have fitted
    assert len(set(xs)) == len(xs) == 16
    assert trials()[0].params["layers"] == (4,)
    assert all("layers" in trial.params for trial in trials())  # of a part, the rest is drawn
    assert all(trial.state.is_finished() for trial in trials())


def test_a_grid_with_what_is_known_still_tries_each_combination_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SPACE", "finite")
    monkeypatch.setenv("SAMPLER", "grid")
    assert wait([known_for_tests.start(rank) for rank in range(3)]) == [0, 0, 0]
    tried = [(trial.params["a"], trial.params["b"]) for trial in trials()]
    assert len(tried) == len(set(tried)) == 12
    assert tried[0] == (4, 2)
    assert tried[1][0] == 2
    monkeypatch.setattr(known_for_tests, "known_good", lambda: [{"a": 3}])
    with pytest.raises(UserError, match=r"a=3 is not in its range: one of 1, 2, 4"):
        found(STUDY_NAME="other")


def test_a_known_combination_is_taken_from_the_moment_of_its_claim() -> None:
    combinations = [{"a": 1}, {"a": 2}, {"a": 3}]
    running = optuna.create_trial(state=TrialState.RUNNING)
    running.number = 0
    assert assign(combinations, [running], [{"a": 3}]) == (0, 2)
    assert assign(combinations, [running]) == (1, 2)


def test_the_first_who_begins_a_study_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env()
    mine = create_or_open_study(settings)
    monkeypatch.setattr(  # another one has seen that nothing is known yet, and now writes
        type(mine), "user_attrs", property(lambda study: {}), raising=True
    )
    begin_with(mine, [{"x": 0.1}])
    begin_with(mine, [{"x": 0.2}])
    monkeypatch.undo()
    assert begin_with(open_study(settings), [{"x": 0.3}]) == [{"x": 0.1}]
    assert open_study(settings).user_attrs[KNOWN] == [{"x": 0.1}]


def test_a_study_that_has_begun_takes_nothing_more(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger("hpo"), "propagate", True)
    study = create_or_open_study(Settings.from_env())
    study.add_trial(optuna.create_trial(state=TrialState.FAIL))
    assert begin_with(study, [{"x": 0.1}]) == []
    assert "the study has begun without them" in caplog.text


def test_a_given_value_is_of_the_kind_that_is_suggested() -> None:
    """As a table or a JSON file may have it: 64.0, "0.5"; nothing but 64 is a batch size."""
    given: dict[str, Any] = {"n": 64.0, "x": "0.5", "f": 1, "c": 16.0, "b": 1}
    sampler = GivenFirst(optuna.samplers.RandomSampler(), [given], finals=False)
    trial = optuna.create_study(sampler=sampler).ask()
    values = [
        trial.suggest_int("n", 16, 128),
        trial.suggest_float("x", 0, 1),
        trial.suggest_float("f", 0, 1),
        trial.suggest_categorical("c", [8, 16]),
        trial.suggest_categorical("b", [False, True]),
    ]
    assert [(type(value), value) for value in values] == [
        (int, 64), (float, 0.5), (float, 1.0), (int, 16), (bool, True),
    ]  # fmt: skip


def test_file_fix_and_parts(tmp_path: Path) -> None:
    path = tmp_path / "good.json"
    path.write_text(json.dumps([{"layers": [8, 8]}, *FIRST]), encoding="utf-8-sig")  # Windows'
    assert found(KNOWN_GOOD=str(path)) == [*FIRST, {"layers": (8, 8)}]
    path.with_name("bad.json").write_text("[{]")
    for name, says in (("bad.json", "is no JSON"), ("none.json", "there is no file")):
        with pytest.raises(UserError, match=f"KNOWN_GOOD: .*{says}"):
            found(KNOWN_GOOD=str(path.with_name(name)))
    assert found(KNOWN_GOOD=str(path), FIX="x=0.75") == [
        {"x": 0.75, "layers": (4,)}, {"x": 0.75}, {"layers": (8, 8)},
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("known", "says"),
    [
        ([{"x": 2.0}], "known_good, configuration 1: x=2 is not in its range: from -1 to 1"),
        ([{}, {"y": 2.0}], "configuration 2: y is no parameter of search_space (x, layers)"),
        ([{"layers": "4"}], "layers=4 is not in its range: one of (8, 8), (4,)"),
        ({"x": 0.1}, "known_good is no list of configurations"),
        (None, "known_good is no list of configurations"),
    ],
)
def test_a_configuration_outside_the_space(
    known: Any, says: str, monkeypatch: pytest.MonkeyPatch, own_study: Path
) -> None:
    monkeypatch.setattr(known_for_tests, "known_good", lambda: known)
    with pytest.raises(UserError) as caught:
        found()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not own_study.exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("none", "FROM_STUDY: there is no file"),
        ("{folder}/none.db:old", "FROM_STUDY: there is no file"),
        ("{folder}/old.db:new", "FROM_STUDY: there is no study 'new'; studies there: far, more, o"),
        ("{folder}/old.db:far", "FROM_STUDY=far does not fit: trial 0: x=4 is not in its range: f"),
        ("{folder}/old.db:more", "FROM_STUDY=more does not fit: trial 0: momentum is no parameter"),
        ("{folder}/old.db:void", "FROM_STUDY: 'void': no trial is complete yet"),
        ("mnist_hpo", "FROM_STUDY=mnist_hpo is the study itself"),
        ("postgresql://me:secret@host/db", "FROM_STUDY names no study; give the NAME of one"),
        ("a b", "FROM_STUDY names no study; give the NAME of one"),
    ],
)
def test_another_study_that_is_not_there_or_does_not_fit(
    given: str, says: str, tmp_path: Path, own_study: Path
) -> None:
    other_study(tmp_path / "old.db", [4.0, 5.0], "far")
    other_study(tmp_path / "old.db", [0.1], "more", momentum=0.9)
    other_study(tmp_path / "old.db", [], "old")
    other_study(tmp_path / "old.db", [], "void")
    with pytest.raises(UserError) as caught:
        found(FROM_STUDY=given.format(folder=tmp_path))
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert not own_study.exists()


def test_refused_before_there_is_a_study_and_by_check(run: Run, own_study: Path) -> None:
    script = HELPERS / "known_for_tests.py"
    for words in (["init_optuna_db.py"], [script], [script, "--check"]):
        result = run(*words, PY_SCRIPT=str(script), FROM_STUDY="none.db:old", SPACE="finite")
        assert result.returncode == 2, result.stdout
        assert "error: FROM_STUDY: there is no file" in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert not own_study.exists()


def test_the_examples_know_one_that_is_legal_in_each_form_of_their_space() -> None:
    import optuna_mnist
    import optuna_t5

    for module, sampler in (
        *((optuna_mnist, sampler) for sampler in ("tpe", "grid", "cmaes")),
        *((optuna_t5, "tpe"), (optuna_command, "tpe")),
    ):
        settings = Settings.from_env(SAMPLER=sampler)
        script = Script("example.py", vars(module))
        assert len(first_trials(settings, script, plan_of(settings, script))) == 1
