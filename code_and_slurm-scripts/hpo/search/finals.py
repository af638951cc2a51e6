"""When a study's search ends, and which of its last trials run the best configurations again.

What final runs are: hpo/study/trials.py.  What they do not do to the search: given.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.trial import FrozenTrial

from hpo.search.remembered import Plan
from hpo.search.samplers import end_of
from hpo.settings import Settings
from hpo.study import trials as ranking
from hpo.study.optuna_private import storage_of, trial_id
from hpo.study.trials import FINAL_OF, is_final
from hpo.words import logger

log = logger("hpo.worker")


def limit(
    study: optuna.Study, settings: Settings, plan: Plan, trials: Sequence[FrozenTrial]
) -> int:
    """Return how many trials the study may have now: without its final runs while it searches.

    A finite space ends when all was tried; without a complete trial there is nothing to repeat.
    """
    runs = settings.final_runs
    if runs and plan.combinations and not ranking.best_searched(study, 1):
        runs = 0
    return ranking.limit(trials, _end(settings, plan, trials), runs)


def _end(settings: Settings, plan: Plan, trials: Sequence[FrozenTrial]) -> int:
    end = settings.total_trials - settings.final_runs
    return min(end, end_of(plan.combinations, trials, plan.known)) if plan.combinations else end


def mark(study: optuna.Study, settings: Settings, plan: Plan, trial: optuna.Trial) -> None:
    """Mark a trial that is a final run, before its parameters are asked for.

    One that goes on is what it was; a worker that dies here leaves one that is judged anew.
    """
    if not settings.final_runs:
        return
    frozen = storage_of(study).get_trial(trial_id(trial))
    if frozen.params or is_final(frozen) or "fixed_params" in frozen.system_attrs:  # enqueued
        return
    end = _end(settings, plan, study.get_trials(deepcopy=False))
    number = ranking.repeated_by(study, trial.number, end)
    if number is not None:
        trial.set_user_attr(FINAL_OF, number)
        log.info("trial %d is trial %d again, with another seed", trial.number, number)
