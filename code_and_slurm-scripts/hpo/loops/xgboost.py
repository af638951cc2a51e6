"""XGBoost as an objective: it reports, is pruned, and resumes at the right round.

    callback = StudyCallback(trial)
    xgboost.train(
        config, training, callback.left(300), evals=[(validation, "validation")],
        callbacks=[callback], xgb_model=callback.model,
    )
    return callback.value

The same with its scikit-learn interface: XGBClassifier(n_estimators=callback.left(300),
callbacks=[callback]).fit(…, eval_set=…, xgb_model=callback.model).

The metric is that of the last of `evals`.  With patience=20 the training ends 20 rounds after the
best one, and the best model and its metric are the trial's; its early_stopping_rounds forgets
its count when a trial goes on.  The model is model.ubj in the trial's folder (hpo/checkpoint.py),
and stays there for the best trials: xgboost.Booster(model_file=…) reads it.

On a CPU a trial that goes on ends with the same value to the last digit, also with random rows and
columns: every `every` rounds its random numbers begin anew, whether it is interrupted or not.  With
the parameter `updater` they cannot.  The script needs NEEDS = ("xgboost",); no torch.
"""

from __future__ import annotations

import json
from typing import Any

import optuna
import xgboost

from hpo.loops.rounds import Rounds, pick


class StudyCallback(xgboost.callback.TrainingCallback):  # type: ignore[misc, unused-ignore]
    """Connects a training with a trial; `value` is the trial's value when it has ended."""

    def __init__(
        self, trial: optuna.Trial, metric: str = "", *, every: int = 10, patience: int = 0
    ) -> None:
        """Prepare.

        Args:
            trial: the one that runs.
            metric: as XGBoost calls it, e.g. "logloss"; by default the last one.
            every: rounds from one report, and saving, to the next.
            patience: rounds without a better metric that end the training; 0 for no such end.
        """
        super().__init__()
        self._metric, self._seed = metric, 0
        self._rounds = Rounds(trial, every, patience, "model.ubj")

    @property
    def model(self) -> str | None:
        """The model to go on from; None for a trial that is new."""
        return str(self._rounds.saved) if self._rounds.saved else None

    @property
    def value(self) -> float:
        """The metric after the last round; with `patience`, the best one."""
        return self._rounds.value

    def left(self, rounds: int) -> int:
        """Return how many of the trial's rounds are still to be done."""
        return self._rounds.left(rounds)

    def before_training(self, model: Any) -> Any:
        """Note the script's seed."""
        self._seed = int(_config(model)["generic_param"]["seed"])
        return model

    def before_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Begin with new random numbers where an interrupted trial would."""
        if self._rounds.begins_anew():
            _grow_anew(model)
            model.set_param({"seed": self._seed + self._rounds.done})
        return False

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Report, save, prune; return whether to stop."""
        of_last = list(evals_log.values())[-1] if evals_log else {}
        found = {name: float(values[-1]) for name, values in of_last.items()}
        # XGBoost finds the format by the name's end, which a temporary file has not.
        return self._rounds.add(
            pick(self._metric, found), lambda path: path.write_bytes(model.save_raw("ubj"))
        )

    def after_training(self, model: Any) -> Any:
        """Write the model to keep, and hand it on."""
        if self._rounds.patience:
            model = model[: self._rounds.best + 1]
        self._rounds.finish(lambda path: path.write_bytes(model.save_raw("ubj")))
        return model


def _config(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(model.save_config())["learner"]
    return found


def _grow_anew(model: Any) -> None:
    """Let XGBoost make what grows the trees anew: it draws columns from a state of its own.

    It does when the method changes, there and back; saving the configuration carries that out.
    """
    booster = _config(model)["gradient_booster"]
    trees = booster.get("gbtree", booster).get("gbtree_train_param")  # dart has it in a gbtree
    if trees is None:  # gblinear
        return
    mine = trees["tree_method"]
    model.set_param({"tree_method": "hist" if mine in ("approx", "exact") else "approx"})
    model.save_config()
    model.set_param({"tree_method": mine})
