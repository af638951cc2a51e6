"""Cross-validation as an objective: no finished fold is fitted again, and the mean is the same."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy
import optuna
import pytest

from hpo.drain import Drained
from hpo.loops.folds import over_folds
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study

FOLDS = [([1, 2], [0]), ([0, 2], [1]), ([0, 1], [2])]


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study."""
    return create_or_open_study(Settings.from_env())


def drained(trial: optuna.Trial) -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def test_finished_fold_is_not_fitted_again(study: optuna.Study) -> None:
    fitted: list[list[int]] = []

    def fit(train: list[int], test: list[int]) -> float:
        fitted.append(test)
        return random.random() + train[0]

    random.seed(1)
    whole = over_folds(study.ask(), FOLDS, fit)
    assert fitted == [[0], [1], [2]]
    trial = study.ask()
    random.seed(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        for _ in FOLDS:
            with pytest.raises(Drained):
                over_folds(trial, FOLDS, fit)
            random.seed(7)  # whatever is drawn in between
    assert over_folds(trial, FOLDS, fit) == whole
    assert fitted == [[0], [1], [2]] * 2
    one, other = study.get_trials()
    assert one.intermediate_values == other.intermediate_values
    assert one.intermediate_values[2] == whole


def test_pruned(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    with pytest.raises(optuna.TrialPruned):
        over_folds(study.ask(), FOLDS, lambda train, test: 1.0)


def test_with_scikit_learn(study: optuna.Study) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("sklearn")
    from sklearn.datasets import make_classification
    from sklearn.linear_model import SGDClassifier
    from sklearn.model_selection import StratifiedKFold

    rows, classes = make_classification(200, random_state=0)

    def fit(train: Any, test: Any) -> float:
        model = SGDClassifier().fit(rows[train], classes[train])  # draws from NumPy's own state
        return float(model.score(rows[test], classes[test]))

    def mean(trial: optuna.Trial) -> float:
        return over_folds(trial, StratifiedKFold(4).split(rows, classes), fit)

    numpy.random.seed(3)
    whole = mean(study.ask())
    trial = study.ask()
    numpy.random.seed(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        with pytest.raises(Drained):
            mean(trial)
    numpy.random.seed(5)
    assert mean(trial) == whole
    assert 0.5 < whole < 1
