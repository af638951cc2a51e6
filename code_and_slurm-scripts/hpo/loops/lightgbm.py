"""LightGBM as an objective: it reports, is pruned, and resumes at the right round.

    callback = StudyCallback(trial)
    lightgbm.train(
        config, training, callback.left(300), valid_sets=[validation],
        callbacks=callback.both, init_model=callback.model,
    )
    return callback.value

The same with its scikit-learn interface: LGBMClassifier(n_estimators=callback.left(300)).fit(…,
eval_set=…, callbacks=callback.both, init_model=callback.model).

The metric is that of the last of `valid_sets`.  With patience=20 the training ends 20 rounds after
the best one, and the best model and its metric are the trial's; lightgbm.early_stopping forgets its
count when a trial goes on.  The model is model.txt in the trial's folder (hpo/checkpoint.py), and
stays there for the best trials: lightgbm.Booster(model_file=…) reads it.  A Dataset that several
trials share needs free_raw_data=False.

On a CPU a trial that goes on ends with the same value to the last digit if LightGBM repeats itself
(deterministic=True, force_row_wise=True, one num_threads), also with bagging and random columns:
every `every` rounds its random numbers begin anew, whether it is interrupted or not; bagging_freq
should divide `every`.  goss and dart, and pos_ and neg_bagging_fraction, keep states that LightGBM
does not give away: those trials go on, but end with another value.  boosting=rf cannot go on.  The
script needs NEEDS = ("lightgbm",); no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import lightgbm
import optuna

from hpo.loops.rounds import Rounds, pick

# Names that LightGBM knows for its parameters.
SEED = ("seed", "random_seed", "random_state")
FRACTION = ("bagging_fraction", "sub_row", "subsample", "bagging")
SEEDS = ("bagging_seed", "feature_fraction_seed", "extra_seed")


class _At:
    """A callback of LightGBM, which finds by its attributes when to call it."""

    def __init__(self, call: Callable[[Any], None], *, before: bool) -> None:
        self._call, self.before_iteration = call, before
        self.order = 40  # after those of LightGBM

    def __call__(self, env: Any) -> None:
        self._call(env)


class StudyCallback:
    """Connects a training with a trial; `value` is the trial's value when it has ended."""

    def __init__(
        self, trial: optuna.Trial, metric: str = "", *, every: int = 10, patience: int = 0
    ) -> None:
        """Prepare.

        Args:
            trial: the one that runs.
            metric: as LightGBM calls it, e.g. "binary_logloss"; by default the last one.
            every: rounds from one report, and saving, to the next.
            patience: rounds without a better metric that end the training; 0 for no such end.
        """
        self._metric = metric
        self._rounds = Rounds(trial, every, patience, "model.txt")
        # What the training is given as `callbacks`.
        self.both: list[Callable[..., Any]] = [
            _At(self._before, before=True),
            _At(self._after, before=False),
        ]

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

    def _before(self, env: Any) -> None:
        """Begin with new random numbers where an interrupted trial would."""
        if not self._rounds.begins_anew():
            return
        seed = int(_first(env.params, SEED, 0)) + self._rounds.done
        changes = {name: seed + at for at, name in enumerate(SEEDS)}
        fraction = float(_first(env.params, FRACTION, 1.0))
        if fraction < 1:  # LightGBM looks at the seed when the fraction changes: there and back
            env.model.reset_parameter({"bagging_fraction": math.nextafter(fraction, 0.0)})
            changes["bagging_fraction"] = fraction  # type: ignore[assignment]
        env.model.reset_parameter(changes)

    def _after(self, env: Any) -> None:
        """Report, save, prune, stop."""
        found: dict[str, float] = {}
        results = env.evaluation_result_list or []
        for each in results:
            if each[0] == results[-1][0]:  # of the last data set
                found[each[1]] = float(each[2])
        if self._rounds.add(pick(self._metric, found), env.model.save_model):
            best = self._rounds.best if self._rounds.patience else self._rounds.done - 1
            self._rounds.finish(lambda path: env.model.save_model(path, num_iteration=best + 1))
            if self._rounds.patience:  # so that the booster predicts with its best round
                raise lightgbm.EarlyStopException(best, results)


def _first(params: dict[str, Any], names: tuple[str, ...], default: float) -> Any:
    return next((params[name] for name in names if params.get(name) is not None), default)
