"""Keras 3 as an objective, on any backend: it reports, is pruned, and resumes at the right epoch.

    callback = StudyCallback(trial, "val_loss")
    model.fit(
        …, epochs=10, initial_epoch=callback.epochs, validation_data=…, callbacks=[callback]
    )
    return callback.value

After each epoch the metric is reported, and all variables of the model and its optimiser are saved,
with the random numbers; then the trial may be pruned, or go back to the queue because its worker
has to stop.  The model at the end of the training is model.keras in the trial's folder
(hpo/checkpoint.py), and stays there for the best trials: keras.models.load_model reads it.

On a CPU a trial that goes on ends with the same value to the last digit, with PyTorch, JAX and
TensorFlow alike, if the script begins it with keras.utils.set_random_seed.  Keras's EarlyStopping
and ReduceLROnPlateau forget their counts, as with its BackupAndRestore.  A model of a class of
one's own needs get_config, or its trials fail before their first epoch.  NEEDS = ("keras",).
"""

from __future__ import annotations

import math
import os
from typing import Any

import keras
import optuna

from hpo import checkpoint
from hpo.files import whole
from hpo.saving.states import put_back_random, random_states
from hpo.settings import UserError


class StudyCallback(keras.callbacks.Callback):  # type: ignore[misc, unused-ignore]
    """Connects a training with a trial; `value` is the last metric that was reported."""

    def __init__(self, trial: optuna.Trial, metric: str = "val_loss") -> None:
        """Prepare, for a metric as Keras names it in its logs."""
        super().__init__()
        self.trial, self.metric = trial, metric
        self._progress: dict[str, Any] = {"epochs": 0, "value": math.nan}
        self._variables = _Variables()
        checkpoint.load(trial, progress=self._progress, variables=self._variables)
        self._random = random_states() if self.epochs else None  # to be put back later

    @property
    def epochs(self) -> int:
        """How many epochs of the trial are finished."""
        return int(self._progress["epochs"])

    @property
    def value(self) -> float:
        """The last metric that was reported."""
        return float(self._progress["value"])

    def on_train_begin(self, logs: Any = None) -> None:
        """Go on with the variables that were saved; now the model and its optimiser are built."""
        try:
            self.model.get_config()
        except NotImplementedError:
            raise UserError(
                f"Keras could not save this model at its end: give {type(self.model).__name__} a "
                "get_config(), which returns the arguments of its __init__"
            ) from None
        if self.epochs:
            _build(self.model, self._progress.get("shapes"))
        self._variables.attach(self.model)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Draw on from where the last epoch ended, before the order of the data is drawn."""
        if epoch != self.epochs:
            raise UserError("give fit initial_epoch=callback.epochs")
        if self._random:
            put_back_random(self._random)
        self._random = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Report the metric and save; then prune the trial, or let its worker stop."""
        found = logs or {}
        if self.metric in found:
            self._progress["value"] = float(found[self.metric])
            self.trial.report(self.value, epoch)
        elif not self.metric.startswith("val_") or any(name.startswith("val_") for name in found):
            raise UserError(f"{self.metric}: Keras logs {', '.join(sorted(found)) or 'nothing'}")
        self._progress.update(epochs=epoch + 1, shapes=self.model.get_build_config())
        checkpoint.save(self.trial, progress=self._progress, variables=self._variables)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def on_train_end(self, logs: Any = None) -> None:
        """Keep the model."""
        if math.isnan(self.value):
            raise UserError(f"{self.metric} was never logged: give fit validation_data=…")
        with whole(checkpoint.folder(self.trial) / "model.keras") as path:
            named = path.with_name(f"{path.name}.keras")  # Keras finds the format by the end
            self.model.save(named)
            os.replace(named, path)


def _build(model: Any, shapes: Any) -> None:
    """Make the variables of a model as it was built; TensorFlow would at the first batch."""
    if not model.built:
        model.build_from_config(shapes)
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


class _Variables:
    """All variables of a model and of its optimiser, as checkpoint.save wants them."""

    def __init__(self) -> None:
        self._model: Any = None
        self._saved: dict[str, Any] | None = None

    def attach(self, model: Any) -> None:
        """Let it be those of this model; give them the values that were loaded, if any."""
        self._model = model
        if self._saved:
            for name, variables in self._by_name().items():
                for variable, value in zip(variables, self._saved[name], strict=True):
                    variable.assign(value)
        self._saved = None

    def state_dict(self) -> dict[str, Any]:
        return {name: [_array(each) for each in found] for name, found in self._by_name().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._saved = state

    def _by_name(self) -> dict[str, list[Any]]:
        return {"model": self._model.variables, "optimizer": self._model.optimizer.variables}


def _array(variable: Any) -> Any:
    found = keras.ops.convert_to_numpy(variable)
    return found.astype("float32") if found.dtype.kind == "V" else found  # NumPy has no bfloat16
