"""XGBoost and LightGBM as objectives: the same result after each interruption, the same model."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import optuna
import pytest
from optuna.trial import TrialState

from hpo import checkpoint
from hpo.drain import Drain, Drained
from hpo.settings import Settings, UserError
from hpo.show.results import load_weights
from hpo.study.opening import create_or_open_study
from hpo.trial import run_trial
from plain import run_plain

if not os.environ.get("CI"):
    pytest.importorskip("xgboost")
    pytest.importorskip("lightgbm")
import lightgbm
import xgboost

from hpo.loops.lightgbm import StudyCallback as LightGBM
from hpo.loops.xgboost import StudyCallback as XGBoost

ROUNDS, EVERY = 17, 4
GENERATOR = numpy.random.default_rng(0)
ROWS = GENERATOR.normal(size=(200, 6))
CLASSES = (ROWS[:, 0] * ROWS[:, 1] + GENERATOR.normal(size=200) > 0).astype(int)
PARTS = ((ROWS[:150], CLASSES[:150]), (ROWS[150:], CLASSES[150:]))
RANDOM = {"subsample": 0.6, "colsample_bytree": 0.6, "colsample_bynode": 0.6}
REPEATABLE = {"deterministic": True, "force_row_wise": True, "num_threads": 1, "verbose": -1}
BAGGING = {"bagging_fraction": 0.6, "bagging_freq": 2, "feature_fraction": 0.6, "extra_trees": True}


def with_xgboost(trial: optuna.Trial, changes: dict[str, Any], **options: Any) -> float:
    config = {"objective": "binary:logistic", "max_depth": 3, "nthread": 1, "seed": 3, **changes}
    training, validation = (xgboost.DMatrix(*part) for part in PARTS)
    callback = XGBoost(trial, **{"every": EVERY, **options})
    xgboost.train(
        config, training, callback.left(ROUNDS), evals=[(validation, "validation")],
        callbacks=[callback], xgb_model=callback.model, verbose_eval=False,
    )  # fmt: skip
    return callback.value


def with_lightgbm(trial: optuna.Trial, changes: dict[str, Any], **options: Any) -> float:
    config = {"objective": "binary", "num_leaves": 5, "seed": 3, **REPEATABLE, **changes}
    training = lightgbm.Dataset(*PARTS[0])
    validation = lightgbm.Dataset(*PARTS[1], reference=training)
    callback = LightGBM(trial, **{"every": EVERY, **options})
    lightgbm.train(
        config, training, callback.left(ROUNDS), valid_sets=[validation],
        callbacks=callback.both, init_model=callback.model,
    )  # fmt: skip
    return callback.value


BOTH = pytest.mark.parametrize(
    ("train", "name"), [(with_xgboost, "model.ubj"), (with_lightgbm, "model.txt")]
)


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study."""
    return create_or_open_study(Settings.from_env())


def drained(trial: optuna.Trial) -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def finished(study: optuna.Study, objective: Callable[[optuna.Trial], float]) -> int:
    """Run a new trial without an interruption; return its number."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    run_trial(study, trial, objective, Drain(float("inf")))
    return trial.number


def interrupted(study: optuna.Study, objective: Callable[[optuna.Trial], float]) -> int:
    """Run a new trial that is interrupted at each saving; return its number."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        for time in range(ROUNDS // EVERY):
            with pytest.raises(Drained):
                objective(trial)
            [path] = checkpoint.folder(trial).iterdir()  # an older one does not stay
            assert path.stem == f"rounds-{EVERY * (time + 1):06d}"
    run_trial(study, trial, objective, Drain(float("inf")))
    return trial.number


@pytest.mark.parametrize(
    ("train", "name", "changes"),
    [
        (with_xgboost, "model.ubj", {}),
        (with_xgboost, "model.ubj", RANDOM),
        (
            with_xgboost,
            "model.ubj",
            {"tree_method": "exact", "subsample": 0.6, "colsample_bytree": 0.6},
        ),
        (with_xgboost, "model.ubj", {"booster": "dart", "rate_drop": 0.3, "subsample": 0.7}),
        (with_lightgbm, "model.txt", {}),
        (with_lightgbm, "model.txt", BAGGING),
    ],
)
def test_trial_that_is_interrupted_at_each_saving(
    train: Callable[..., float], name: str, changes: dict[str, Any], study: optuna.Study
) -> None:
    def objective(trial: optuna.Trial) -> float:
        return train(trial, changes)

    numbers = [finished(study, objective), interrupted(study, objective)]
    one, other = study.get_trials()
    assert one.state == other.state == TrialState.COMPLETE, other.user_attrs
    assert list(one.intermediate_values) == [3, 7, 11, 15, 16]
    assert len(set(one.intermediate_values.values())) == 5
    assert one.intermediate_values == other.intermediate_values
    assert one.value == other.value == one.intermediate_values[16]
    first, second = (
        checkpoint.folder_path(Settings.from_env(), number) / name for number in numbers
    )
    assert predicted(first) == predicted(second)
    with pytest.raises(UserError, match=f"a file of its framework: {second}"):
        load_weights(Settings.from_env(), 1)


@BOTH
def test_patience_is_not_forgotten(
    train: Callable[..., float], name: str, study: optuna.Study
) -> None:
    def objective(trial: optuna.Trial) -> float:
        return train(trial, {"learning_rate": 1.0}, patience=5)

    numbers = [finished(study, objective), 1]
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        with pytest.raises(Drained):
            objective(trial)
    run_trial(study, trial, objective, Drain(float("inf")))
    one, other = study.get_trials()
    last = max(one.intermediate_values)
    assert EVERY < last < ROUNDS - 1  # it did go on, and did not go to the end
    assert one.intermediate_values == other.intermediate_values
    assert one.value == other.value
    assert one.value is not None
    assert one.value < one.intermediate_values[last]
    paths = [checkpoint.folder_path(Settings.from_env(), number) / name for number in numbers]
    assert predicted(paths[0]) == predicted(paths[1])
    assert trees(paths[0]) == last + 1 - 5  # the best one, then five that are no better


def predicted(path: Path) -> list[float]:
    """Return what a model says of the rows that it has not seen."""
    rows = PARTS[1][0]
    if path.suffix == ".ubj":
        found: Any = xgboost.Booster(model_file=str(path)).predict(xgboost.DMatrix(rows))
    else:
        found = lightgbm.Booster(model_file=str(path)).predict(rows)
    return [float(number) for number in found]


def trees(path: Path) -> int:
    if path.suffix == ".ubj":
        return int(xgboost.Booster(model_file=str(path)).num_boosted_rounds())
    return lightgbm.Booster(model_file=str(path)).num_trees()


@BOTH
def test_pruned(
    train: Callable[..., float], name: str, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    finished(study, lambda trial: train(trial, {}))
    [found] = study.get_trials()
    assert found.state == TrialState.PRUNED
    assert list(found.intermediate_values) == [EVERY - 1]
    assert not list(Settings.from_env().checkpoints.iterdir())


@BOTH
def test_model_of_the_best_trial_is_kept(
    train: Callable[..., float], name: str, study: optuna.Study
) -> None:
    Settings.from_env(KEEP_BEST="1")
    for rate in (0.01, 0.3, 0.02):
        finished(study, partial(train, changes={"learning_rate": rate}))
    [path] = Settings.from_env().checkpoints.iterdir()
    best = study.best_trial.number
    assert path == checkpoint.folder_path(Settings.from_env(), best)
    assert trees(path / name) == ROUNDS


@BOTH
def test_metric_that_is_not_there(
    train: Callable[..., float], name: str, study: optuna.Study
) -> None:
    with pytest.raises(UserError, match=r"metric='auc': those of the last data set are \w*logloss"):
        train(study.ask(), {}, metric="auc")
    value = train(study.ask(), {"metric" if name.endswith("txt") else "eval_metric": "auc"})
    assert 0.5 < value < 1


def test_number_of_rounds_has_to_be_asked_for(study: optuna.Study) -> None:
    callback = XGBoost(study.ask())
    with pytest.raises(UserError, match=r"callback\.left\(rounds\)"):
        xgboost.train(
            {"nthread": 1}, xgboost.DMatrix(*PARTS[0]), 3, callbacks=[callback],
            evals=[(xgboost.DMatrix(*PARTS[1]), "validation")],
        )  # fmt: skip


@pytest.mark.parametrize("framework", ["xgboost", "lightgbm"])
def test_plain_script_and_its_study(framework: str, capfd: pytest.CaptureFixture[str]) -> None:
    trial = run_plain(framework)
    losses = [float(loss) for loss in re.findall(r"logloss: ?(\S+)", capfd.readouterr().out)]
    assert losses[3] < losses[0] < 2.3  # better than guessing
    assert list(trial.intermediate_values) == [9, 19, 29, 39]
