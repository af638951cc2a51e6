"""SAMPLER and PRUNER → Optuna's objects, made fit for many workers on one study.

    SAMPLER     form of the search space   how workers share it
    tpe         choices                    each has a seed of its own and sees all trials
    random      choices                    each has a seed of its own
    qmc         choices                    trial n takes point n of one Sobol' sequence
    nsgaii      choices                    generations of POPULATION trials
    grid        finite, one product        trial n takes combination n: each exactly once
    bruteforce  finite, any branches       trial n takes combination n: each exactly once
    cmaes       numeric                    generations; all numbers, so that it moves all of them
    gp          numeric                    each has a seed of its own and sees all trials

A script's search_space(trial) asks `space_form()` which form to give; hpo/space.py lists the
combinations, remembers the space and refuses to mix two in one study.

The names alone are checked in settings.py, which needs no Optuna.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, QMCSampler
from optuna.trial import FrozenTrial

from hpo.settings import Settings, UserError, pip_command
from hpo.tpe import QuickTPESampler

FINITE = ("grid", "bruteforce")
NUMERIC = ("cmaes", "gp")
POPULATION = 20  # trials in a generation of NSGA-II; Optuna's 50 leaves few of them in 500 trials
NEEDS = {
    "cmaes": ("cmaes",),
    "gp": ("scipy", "torch"),
    "qmc": ("scipy",),
    "wilcoxon": ("scipy",),
}


def space_form() -> str:
    """Return the form of the search space that SAMPLER needs: choices, finite or numeric."""
    sampler = Settings.from_env().sampler
    return "finite" if sampler in FINITE else "numeric" if sampler in NUMERIC else "choices"


def check_packages(settings: Settings) -> None:
    """Raise UserError, with the command that installs it, if a package is missing."""
    for variable, name in (("SAMPLER", settings.sampler), ("PRUNER", settings.pruner)):
        missing = [p for p in NEEDS.get(name, ()) if not importlib.util.find_spec(p)]
        if missing:
            raise UserError(
                f"{variable}={name} needs {' and '.join(missing)}, which this Python has not; "
                f"once:\n    {pip_command(*missing)}"
            )


class Combinations(BaseSampler):
    """Grid and brute force: trial n takes combination n, whoever runs it.

    The storage gives each number once, and a trial that was interrupted keeps its number: so
    every combination is visited exactly once, with no word between the workers.  (Optuna's own
    samplers choose among the combinations not seen yet, and two workers choose the same.)
    """

    def __init__(self, combinations: Sequence[Mapping[str, Any]]) -> None:
        self._combinations = combinations

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return nothing: each parameter is taken from the list by itself."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return nothing, see above."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the trial's value; raises KeyError for a parameter outside search_space."""
        return self._combinations[trial.number % len(self._combinations)][param_name]


class NumberedQMC(QMCSampler):
    """Optuna's quasi-random sequence, in which trial n takes point n.

    Optuna counts the points in the database in two steps: two workers may take the same one.
    """

    def __init__(self, space: dict[str, BaseDistribution], seed: int) -> None:
        super().__init__(scramble=True, seed=seed, warn_independent_sampling=False)
        self._space = space
        self._number = 0

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the whole space, also for the first trial; Optuna draws that at random."""
        self._number = trial.number
        return self._space or super().infer_relative_search_space(study, trial)

    def _find_sample_id(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution]
    ) -> int:
        return self._number


class LastEpochCounts(BasePruner):
    """Prunes a trial as another pruner says, but never after its last epoch.

    Where `epochs` is searched, the trials with few epochs would otherwise be pruned when all of
    their work is done, and their result be lost; pruning saves nothing then.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Ask the other pruner, unless the trial has no epoch left."""
        epochs = trial.params.get("epochs")
        if epochs is not None and trial.last_step is not None and trial.last_step + 1 >= epochs:
            return False
        return self._pruner.prune(study, trial)


def make_sampler(
    name: str,
    seed: int | None,
    *,
    study_seed: int | None = None,
    space: Mapping[str, BaseDistribution] | None = None,
    combinations: Sequence[Mapping[str, Any]] = (),
) -> BaseSampler:
    """Return the sampler of that name.

    Args:
        name: one of `hpo.settings.SAMPLERS`.
        seed: from `sampler_seed`, this worker's own; None draws one from the operating system.
        study_seed: the same for all workers.
        space: what search_space suggests, for qmc.
        combinations: all there are, for grid and bruteforce.
    """
    from optuna import samplers

    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    makers: dict[str, Callable[[], BaseSampler]] = {
        "tpe": lambda: QuickTPESampler(seed=seed),
        "random": lambda: samplers.RandomSampler(seed=seed),
        "grid": lambda: Combinations(combinations),
        "bruteforce": lambda: Combinations(combinations),
        "cmaes": lambda: samplers.CmaEsSampler(seed=seed, with_margin=True),
        "nsgaii": lambda: samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
        "gp": lambda: samplers.GPSampler(seed=seed, deterministic_objective=False),
        "qmc": lambda: NumberedQMC(dict(space or {}), study_seed or 0),
    }
    return makers[name]()


def make_pruner(name: str) -> BasePruner:
    """Return the pruner of that name, one of `hpo.settings.PRUNERS`.

    All of them compare values of the same step, so trials that have seen each image equally often.
    """
    from optuna import pruners

    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    warnings.filterwarnings("ignore", message="WilcoxonPruner finds steps")  # fewer epochs
    makers: dict[str, Callable[[], BasePruner]] = {
        "median": lambda: pruners.MedianPruner(),
        "percentile": lambda: pruners.PercentilePruner(25.0),
        "halving": lambda: pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
        "hyperband": lambda: pruners.HyperbandPruner(max_resource=5),
        "wilcoxon": lambda: pruners.WilcoxonPruner(),
        "none": lambda: pruners.NopPruner(),
    }
    return LastEpochCounts(makers[name]())


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
