"""PRUNER → Optuna's pruner, which never stops a trial when all of its work is done.

All of them compare values of the same step, so trials that have seen each image equally often.
PRUNER=median:n_warmup_steps=2 hands options on to Optuna's constructor.  Several pruners take the
length of a trial from the steps that complete trials have reported ("auto").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
from optuna import pruners
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from hpo.search.samplers import check_packages, construct, make_sampler
from hpo.settings import Settings


class LastReportCounts(BasePruner):
    """Prunes a trial as another pruner says, but never after its last report.

    Where the number of epochs is searched, trials with few of them would otherwise be pruned when
    all of their work is done, and their result be lost; pruning saves nothing then.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Ask the other pruner, and then whether anything is left to be saved."""
        if not self._pruner.prune(study, trial):
            return False
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        last = number_of_reports(trial, complete)
        return last is None or len(trial.intermediate_values) < last


def number_of_reports(trial: FrozenTrial, complete: list[FrozenTrial]) -> int | None:
    """Return how often a trial will report, as far as the complete ones tell; None if they do not.

    Either all have reported equally often, or as often as one of their parameters says, whatever
    its name; before there is a complete trial, that is `epochs` if there is one.
    """
    return reports_as(complete)(trial)


def reports_as(complete: list[FrozenTrial]) -> Callable[[FrozenTrial], int | None]:
    """Return `number_of_reports` for the same complete trials, which are looked at once."""
    counts = [(other, len(other.intermediate_values)) for other in complete]
    names = set(counts[0][0].params) if counts else {"epochs"}
    for other, count in counts:
        names = {name for name in names if other.params.get(name) == count}
    found = {count for _, count in counts}

    def number(trial: FrozenTrial) -> int | None:
        for name in sorted(names):
            if type(trial.params.get(name)) is int:
                return int(trial.params[name])
        return next(iter(found)) if len(found) == 1 else None

    return number


def check_search(settings: Settings) -> None:
    """Raise UserError if SAMPLER or PRUNER needs a package, or an option, that is not there."""
    check_packages(settings)
    make_sampler(settings, None)
    make_pruner(settings)


def make_pruner(settings: Settings) -> BasePruner:
    """Return the pruner of PRUNER with its options.

    Raises:
        UserError: an option is not legal.
    """
    warnings.filterwarnings("ignore", message="WilcoxonPruner finds steps")  # fewer epochs
    kinds: dict[str, tuple[type[BasePruner], dict[str, Any]]] = {
        "median": (pruners.MedianPruner, {}),
        "percentile": (pruners.PercentilePruner, {"percentile": 25.0}),
        "halving": (pruners.SuccessiveHalvingPruner, {"reduction_factor": 2}),
        "hyperband": (pruners.HyperbandPruner, {"max_resource": "auto"}),
        "wilcoxon": (pruners.WilcoxonPruner, {}),
        "none": (pruners.NopPruner, {}),
    }
    kind, defaults = kinds[settings.pruner]
    name = f"PRUNER={settings.pruner}"
    return LastReportCounts(construct(name, kind, settings.pruner_options, **defaults))
