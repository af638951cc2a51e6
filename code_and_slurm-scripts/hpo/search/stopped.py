"""What SAMPLER=tpe and SAMPLER=gp make of trials that were stopped.

tpe   TPE models the best γ trials and all others, and tries what is likely among the first and not
      among the others.  Optuna takes γ as 10 % of the finished trials, pruned ones among them.  But
      the good ones are taken from the complete trials first: with a pruner that stops most trials,
      the best 10 % become the best quarter or half of the complete ones, and the search stays near
      the mediocre (tests/benchmarks/optuna-gamma.txt).  Here complete trials alone decide.
gp    Optuna's Gaussian process learns from complete trials alone.  With such a pruner it would know
      few, all of them good, and try again and again what has just been stopped.  Here a stopped
      trial counts as a complete one, with its last value and what those of complete trials have
      changed by since that step, in the median.

Measured: chapter 4 of tests/benchmarks/README.txt.
"""

from __future__ import annotations

import copy
import inspect
import math
import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import GPSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.search.space import Space
from hpo.study.optuna_private import as_seen

MOST = 25  # good trials, as in Optuna
FAR = 20  # see _worst
_OPTIONS = inspect.signature(TPESampler).parameters.values()
_COUNT_PRUNED = inspect.Parameter(
    "count_pruned", inspect.Parameter.KEYWORD_ONLY, default=False, annotation="bool"
)


class CompleteTPE(TPESampler):
    """TPE whose γ is 10 % of the complete trials, at most 25.

    While no trial is complete, one is good: the pruned one that came furthest.  Where trials have
    constraints it is as in Optuna, since an infeasible trial is complete, too.

    `gamma` is public in Optuna 5, deprecated, and goes in 6.0 (tests/test_space.py says so).  It is
    given the number of finished trials alone; that of the complete ones comes by
    `infer_relative_search_space`, which Optuna calls before each trial's first suggestion.

    Args:
        count_pruned: True counts pruned trials, too, as Optuna does.
        options: of TPESampler.
    """

    # What SAMPLER=tpe:… may name.
    __signature__ = inspect.Signature([*(p for p in _OPTIONS if p.name != "gamma"), _COUNT_PRUNED])

    def __init__(self, *, count_pruned: bool = False, **options: Any) -> None:
        self._complete: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # see above
            super().__init__(gamma=None if count_pruned else self.good, **options)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """Count the complete trials, then do as Optuna."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self._complete = None if any(t.constraints for t in complete) else len(complete)
        return super().infer_relative_search_space(study, trial)

    def good(self, finished: int) -> int:
        """Return γ, how many trials are good, of so many that are complete or pruned."""
        counted = finished if self._complete is None else self._complete
        return max(1, min(math.ceil(0.1 * counted), MOST))


class GPOfAll(GPSampler):
    """Optuna's GPSampler; with one objective, of the trials `with_stopped`."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """See GPSampler."""
        return super().infer_relative_search_space(_seen(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        """See GPSampler."""
        return super().sample_relative(_seen(study), trial, search_space)


def _seen(study: optuna.Study) -> optuna.Study:
    if len(study.directions) > 1:  # nothing is pruned
        return study
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    return as_seen(study, lambda trials: with_stopped(trials, sign))


def with_stopped(trials: Sequence[FrozenTrial], sign: float) -> list[FrozenTrial]:
    """Return the trials, the pruned ones as complete with the value that they would have had.

    Only where complete trials return one of the values that they report: another measure, such as
    the mean of all reports, would mix two kinds of values.  And not where they have constraints,
    of which a stopped one may know nothing.

    Args:
        trials: of a study with one objective, which are left as they are.
        sign: 1.0 if the lower value is the better, else -1.0.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not all(_returned_a_report(t) and not t.constraints for t in complete):
        return list(trials)
    gains: dict[int, float] = {}
    ends: dict[int, float] = {}  # of stopped trials, by their place; the lower the better
    for place, trial in enumerate(trials):
        step = trial.last_step
        if trial.state == TrialState.PRUNED and step is not None:
            if step not in gains:
                gains[step] = _gain(complete, step)
            ends[place] = sign * (trial.intermediate_values[step] + gains[step])
    worst = _worst([*ends.values(), *(sign * t.value for t in complete if t.value is not None)])
    return [  # min in this order: NaN becomes the worst, too
        _complete(trial, sign * min(worst, ends[place])) if place in ends else trial
        for place, trial in enumerate(trials)
    ]


def _returned_a_report(trial: FrozenTrial) -> bool:
    reports = trial.intermediate_values.values()
    return not reports or trial.value in reports


def _gain(complete: Sequence[FrozenTrial], step: int) -> float:
    """Return the median of what complete trials' values have changed by since that step."""
    both = [(t.value, t.intermediate_values.get(step)) for t in complete]
    gains = [last - then for last, then in both if last is not None and then is not None]
    finite = list(filter(math.isfinite, gains))
    return statistics.median(finite) if finite else 0.0


def _worst(ends: list[float]) -> float:
    """Return what a diverged training counts as: beside 1e30 all others would look the same.

    The worst there is, if it is not FAR times as far from the best as the median.
    """
    finite = sorted(filter(math.isfinite, ends))
    if not finite:
        return math.inf
    best, middle = finite[0], statistics.median(finite)
    return min(finite[-1], best + FAR * (middle - best)) if middle > best else finite[-1]


def _complete(trial: FrozenTrial, value: float) -> FrozenTrial:
    known = copy.copy(trial)
    known.state, known.value = TrialState.COMPLETE, value
    return known
