"""SAMPLER=gp: Optuna's Gaussian process, which learns from stopped trials, too.

Optuna's learns from complete trials alone.  With a pruner that stops most trials it would know a
few of them, all of them good, and try again and again what the pruner has just stopped.  Here a
stopped trial counts as a complete one, with its last value and what those of complete trials have
changed by since that step, in the median (measured: tests/benchmarks/README.txt, chapter 4).
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.samplers import GPSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.search.space import Space
from hpo.study.optuna_private import as_seen


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
    the mean of all reports, would mix two kinds of values.

    Args:
        trials: of a study with one objective, which are left as they are.
        sign: 1.0 if the lower value is the better, else -1.0.
    """
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    if not all(_returned_a_report(trial) for trial in complete):
        return list(trials)
    reports = [sign * v for trial in complete for v in trial.intermediate_values.values()]
    worst = max(filter(math.isfinite, reports), default=math.inf)
    gains: dict[int, float] = {}
    found = []
    for trial in trials:
        step = trial.last_step if trial.state == TrialState.PRUNED else None
        if step is not None:
            if step not in gains:
                gains[step] = _gain(complete, step)
            value = sign * (trial.intermediate_values[step] + gains[step])
            # What diverges is as bad as can be, and no worse; in this order for NaN, too.
            found.append(_complete(trial, sign * min(worst, value)))
        else:
            found.append(trial)
    return found


def _returned_a_report(trial: FrozenTrial) -> bool:
    reports = trial.intermediate_values.values()
    return not reports or trial.value in reports


def _gain(complete: Sequence[FrozenTrial], step: int) -> float:
    """Return the median of what complete trials' values have changed by since that step."""
    both = [(t.value, t.intermediate_values.get(step)) for t in complete]
    gains = [last - then for last, then in both if last is not None and then is not None]
    finite = list(filter(math.isfinite, gains))
    return statistics.median(finite) if finite else 0.0


def _complete(trial: FrozenTrial, value: float) -> FrozenTrial:
    known = copy.copy(trial)
    known.state, known.value = TrialState.COMPLETE, value
    return known
