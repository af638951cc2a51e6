"""Keras as an objective, with PyTorch as its backend: the same result after each interruption."""

from __future__ import annotations

import os
import re
from typing import Any

import numpy
import optuna
import pytest
from optuna.trial import TrialState

from hpo import checkpoint
from hpo.drain import Drain, Drained
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study
from hpo.trial import run_trial
from plain import run_plain

os.environ["KERAS_BACKEND"] = "torch"
if not os.environ.get("CI"):
    pytest.importorskip("keras")
import keras

from hpo.loops.keras import StudyCallback, _Variables

EPOCHS = 4
ROWS = numpy.random.default_rng(0).normal(size=(128, 4)).astype("float32")
PARTS = (ROWS[:96], ROWS[:96, 0] > 0), (ROWS[96:], ROWS[96:, 0] > 0)


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study."""
    return create_or_open_study(Settings.from_env())


def network() -> Any:
    """Return a network with dropout and a schedule, which is not built yet."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8), keras.layers.Dropout(0.5), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    schedule = keras.optimizers.schedules.CosineDecay(0.05, EPOCHS * 6)
    loss = keras.losses.BinaryCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(schedule), loss)
    return model


def train(trial: optuna.Trial, metric: str = "val_loss", **changes: Any) -> float:
    """Train it with shuffled data."""
    model, callback = network(), StudyCallback(trial, metric)
    options = {"validation_data": PARTS[1], "initial_epoch": callback.epochs, **changes}
    model.fit(
        *PARTS[0], batch_size=16, epochs=EPOCHS, callbacks=[callback], verbose=0, **options
    )  # fmt: skip
    return callback.value


def drained(trial: optuna.Trial) -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def test_trial_that_is_interrupted_after_each_epoch(study: optuna.Study) -> None:
    study.ask().suggest_float("x", 0, 1)
    run_trial(study, optuna.Trial(study, 1), train, Drain(float("inf")))
    study.ask().suggest_float("x", 0, 1)
    trial = optuna.Trial(study, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        for _ in range(EPOCHS):
            with pytest.raises(Drained):
                train(trial)
    run_trial(study, trial, train, Drain(float("inf")))
    one, other = study.get_trials()
    assert one.state == other.state == TrialState.COMPLETE, other.user_attrs
    assert list(one.intermediate_values) == list(range(EPOCHS))
    assert len(set(one.intermediate_values.values())) == EPOCHS
    assert one.intermediate_values == other.intermediate_values
    assert one.value == other.value == one.intermediate_values[EPOCHS - 1]
    settings = Settings.from_env()
    paths = [checkpoint.folder_path(settings, number) / "model.keras" for number in (0, 1)]
    said = [keras.models.load_model(path).predict(ROWS, verbose=0) for path in paths]
    assert numpy.array_equal(*said)


def test_model_that_is_built_at_its_first_batch(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with TensorFlow: what was saved is there before that, and not drawn anew by it."""
    trial = study.ask()
    monkeypatch.setattr(optuna.Trial, "should_prune", drained)
    with pytest.raises(Drained):
        train(trial)
    model, callback = network(), StudyCallback(trial)
    saved = checkpoint.load(trial, progress={}, variables=(found := _Variables()))
    assert saved == []
    assert not model.built
    callback.set_model(model)
    callback.on_train_begin()
    assert found._saved
    for name, variables in (("model", model), ("optimizer", model.optimizer)):
        values = [keras.ops.convert_to_numpy(each) for each in variables.variables]
        assert len(values) == len(found._saved[name]) > 4
        assert all(map(numpy.array_equal, values, found._saved[name]))


def test_pruned(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    run_trial(study, trial, train, Drain(float("inf")))
    [found] = study.get_trials()
    assert found.state == TrialState.PRUNED
    assert list(found.intermediate_values) == [0]
    assert not list(Settings.from_env().checkpoints.iterdir())


def test_epochs_without_a_validation_report_nothing(study: optuna.Study) -> None:
    train(study.ask(), validation_freq=2)
    assert list(study.get_trials()[0].intermediate_values) == [1, 3]


@pytest.mark.parametrize(
    ("metric", "changes", "says"),
    [
        ("val_accuracy", {}, "val_accuracy: Keras logs loss, val_loss"),
        ("val_loss", {"validation_data": None}, "val_loss was never logged: give fit validation"),
        ("val_loss", {"initial_epoch": 1}, r"give fit initial_epoch=callback\.epochs"),
    ],
)
def test_training_that_no_trial_can_use(
    metric: str, changes: dict[str, Any], says: str, study: optuna.Study
) -> None:
    with pytest.raises(UserError, match=says):
        train(study.ask(), metric, **changes)


class Own(keras.Model):  # type: ignore[misc, unused-ignore]
    """A model that Keras cannot save, for nobody says with which arguments it was made."""

    def __init__(self, units: Any) -> None:
        super().__init__()
        self.units = units
        self.layer = keras.layers.Dense(1)

    def call(self, inputs: Any) -> Any:
        """Return the output."""
        return self.layer(inputs)


def test_model_that_keras_cannot_save_is_found_before_its_first_epoch(study: optuna.Study) -> None:
    callback, model = StudyCallback(study.ask()), Own(object())
    model.compile("sgd", "mse")
    with pytest.raises(UserError, match=r"give Own a get_config\(\)"):
        model.fit(*PARTS[0], epochs=1, callbacks=[callback], validation_data=PARTS[1], verbose=0)
    assert not study.get_trials()[0].intermediate_values


def test_plain_script_and_its_study(capsys: pytest.CaptureFixture[str]) -> None:
    trial = run_plain("keras")
    losses = [float(loss) for loss in re.findall(r"val_loss: (\S+)", capsys.readouterr().out)]
    assert len(losses) == 2 * 5
    assert losses[4] < losses[0] < 2.3  # better than guessing
    assert len(trial.intermediate_values) == 5
