"""SAMPLER and PRUNER → Optuna's objects.

Optuna itself is imported when a function is called: the names alone are checked in settings.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler


def make_sampler(name: str, seed: int | None) -> BaseSampler:
    """Return the sampler of that name.

    Args:
        name: one of `hpo.settings.SAMPLERS`.
        seed: from `sampler_seed`; None draws one from the operating system.
    """
    from optuna import samplers

    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: samplers.TPESampler(seed=seed),
        "random": lambda: samplers.RandomSampler(seed=seed),
    }
    return makers[name]()


def make_pruner(name: str) -> BasePruner:
    """Return the pruner of that name, one of `hpo.settings.PRUNERS`."""
    from optuna import pruners

    makers: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: pruners.MedianPruner(),
        "percentile": lambda: pruners.PercentilePruner(25.0),
        "halving": lambda: pruners.SuccessiveHalvingPruner(),
        "hyperband": lambda: pruners.HyperbandPruner(max_resource=5),
        "none": lambda: pruners.NopPruner(),
    }
    return makers[name]()


def sampler_seed(seed: int | None, rank: int, trials: int) -> int | None:
    """Return a seed that no other worker of the study has used.

    With one seed for all, four workers suggest the same parameters four times (12 trials were
    seen to have 3 distinct ones).  The number of trials in the study when the worker starts sets
    a second job apart from the first.
    """
    if seed is None:
        return None
    import numpy as np

    return int(np.random.SeedSequence([seed, rank, trials]).generate_state(1)[0])
