"""Cross-validation as an objective: a fold is a step, and one that is finished is not fitted again.

    def fit(train, test):                        indices of the rows, as scikit-learn gives them
        model = SVC(C=config["C"]).fit(X[train], y[train])
        return model.score(X[test], y[test])

    def objective(trial):
        config = search_space(trial)
        return over_folds(trial, StratifiedKFold(5).split(X, y), fit)

The folds have to be the same when a trial goes on: give a splitter that shuffles its random_state.
Any iterable of pairs will do; torch and scikit-learn are not needed.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import optuna

from hpo import checkpoint


def over_folds(
    trial: optuna.Trial, folds: Iterable[tuple[Any, Any]], fit: Callable[[Any, Any], float]
) -> float:
    """Return the mean of fit(train, test) over all folds.

    The mean of the folds so far is reported after each of them.  Random numbers that `fit` draws
    from random or NumPy are those of an uninterrupted trial.

    Raises:
        optuna.TrialPruned: the pruner sees no chance for this configuration.
    """
    scores = checkpoint.load(trial)
    for number, (train, test) in enumerate(folds):
        if number < len(scores):
            continue
        scores.append(float(fit(train, test)))
        trial.report(statistics.fmean(scores), number)
        checkpoint.save(trial, losses=scores)
        if trial.should_prune():
            raise optuna.TrialPruned
    return statistics.fmean(scores)
