"""SAMPLER → Optuna's sampler, made fit for many workers on one study.

    SAMPLER     form of the search space   how workers share it
    tpe         choices                    each has a seed of its own and sees all trials
    random      choices                    each has a seed of its own
    qmc         choices                    trial n takes point n of one Sobol' sequence
    nsgaii      choices                    generations of POPULATION trials
    grid        finite, one product        each combination once, by the trial's number
    bruteforce  finite, any branches       each combination once, by the trial's number
    cmaes       numeric                    generations; all numbers, so that it moves all of them
    gp          numeric                    each has a seed of its own and sees all trials

What tpe and gp make of trials that were stopped is in stopped.py.

A script's search_space(trial) asks `space_form()` which form to give; space.py lists the
combinations, remembered.py keeps the space and refuses to mix two in one study.

SAMPLER=tpe:n_startup_trials=20 hands options on to Optuna's constructor (options.py).  The names
alone are checked in settings.py, which needs no Optuna.
"""

from __future__ import annotations

import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna import samplers
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, PartialFixedSampler
from optuna.trial import FrozenTrial

from hpo import packages
from hpo.search.options import construct
from hpo.search.space import Space, value_at
from hpo.search.stopped import CompleteTPE, GPOfAll
from hpo.settings import Settings
from hpo.study.trials import searched

FINITE = ("grid", "bruteforce")
NUMERIC = ("cmaes", "gp")
POPULATION = 20  # trials in a generation of NSGA-II; Optuna's 50 leaves few of them in 500 trials
NEEDS = {
    ("SAMPLER", "cmaes"): ("cmaes",),
    ("SAMPLER", "gp"): ("scipy", "torch"),
    ("SAMPLER", "qmc"): ("scipy",),
    ("PRUNER", "wilcoxon"): ("scipy",),
}


def space_form() -> str:
    """Return the form of the search space that SAMPLER needs: choices, finite or numeric."""
    sampler = Settings.from_env().sampler
    return "finite" if sampler in FINITE else "numeric" if sampler in NUMERIC else "choices"


def check_packages(settings: Settings) -> None:
    """Raise UserError, with the command that installs it, if a package is missing."""
    for variable, name in (("SAMPLER", settings.sampler), ("PRUNER", settings.pruner)):
        packages.need(f"{variable}={name}", *NEEDS.get((variable, name), ()))


class _Independent(BaseSampler):
    """A sampler that gives each parameter by itself; there is nothing to be inferred."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """Return nothing: each parameter is given by itself."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: Space
    ) -> dict[str, Any]:
        """Return nothing, see above."""
        return {}


class Combinations(_Independent):
    """Grid and brute force: which combination a trial takes follows from its number.

    The storage gives each number once, and a trial that was interrupted keeps its number: so
    every combination is visited exactly once, with no word between the workers.  (Optuna's own
    samplers choose among the combinations not seen yet, and two workers choose the same.)
    Trials that were enqueued or imported take no combination from the list, but the one that they
    are.
    """

    def __init__(
        self, combinations: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._combinations, self._known = combinations, known

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the trial's value; raises KeyError for a parameter outside search_space."""
        trials = [t for t in study.get_trials(deepcopy=False) if t.number < trial.number]
        index, _ = assign(self._combinations, trials, self._known)
        if "fixed_params" in trial.system_attrs:  # enqueued with a part of its parameters
            given = trial.system_attrs["fixed_params"]
            for combination in self._combinations:
                if all(combination.get(name) == value for name, value in given.items()):
                    return combination[param_name]
        return self._combinations[index % len(self._combinations)][param_name]


def assign(
    combinations: Sequence[Mapping[str, Any]],
    trials: Sequence[FrozenTrial],
    known: Sequence[Mapping[str, Any]] = (),
) -> tuple[int, int]:
    """Return the index of the combination that the next trial takes, and how many are left.

    The same for every worker: it follows from the trials so far, in the order of their numbers, of
    which the first take the combinations that the study begins with (known.py).
    """
    position = {_key(params): i for i, params in enumerate(combinations)}
    taken = [False] * len(combinations)
    left, following = len(combinations), 0
    for trial in trials:
        while following < len(taken) and taken[following]:
            following += 1
        mine = combinations[following] if following < len(taken) else {}
        given = trial.system_attrs.get("fixed_params")
        theirs = trial.params or given or {}
        if trial.number < len(known):
            given = theirs = known[trial.number]
        # Finished with other values than its number stands for: it was imported.
        other = given is not None or (
            trial.state.is_finished()
            and any(mine.get(name) != value for name, value in theirs.items())
        )
        index = position.get(_key(theirs), -1) if other else following
        if 0 <= index < len(taken) and not taken[index]:
            taken[index] = True
            left -= 1
    while following < len(taken) and taken[following]:
        following += 1
    return following, left


def end_of(
    combinations: Sequence[Mapping[str, Any]],
    trials: Sequence[FrozenTrial],
    known: Sequence[Mapping[str, Any]] = (),
) -> int:
    """Return with how many trials every combination has been given to one; final runs take none."""
    left = assign(combinations, searched(trials), known)[1]
    if left:
        return len(trials) + left

    def all_given(number: int) -> bool:
        return not assign(combinations, searched(trials[:number]), known)[1]

    return bisect_left(range(len(trials)), True, key=all_given)


def _key(params: Mapping[str, Any]) -> str:
    return repr(sorted(params.items()))


class NumberedQMC(_Independent):
    """A scrambled Sobol' sequence of the whole space, in which trial n takes point n.

    Optuna's QMCSampler counts the points in the database in two steps: two workers may take the
    same one, and its first trial is drawn at random.
    """

    def __init__(self, space: Mapping[str, BaseDistribution], seed: int) -> None:
        self._names = list(space)
        self._seed = seed

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the trial's value of one parameter; a new one, outside the space, its middle."""
        from scipy.stats.qmc import Sobol

        if param_name not in self._names:
            return value_at(param_distribution, 0.5)
        sequence = Sobol(len(self._names), scramble=True, seed=self._seed)
        if trial.number:
            sequence.fast_forward(trial.number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one point is no power of two
            point = sequence.random(1)[0]
        return value_at(param_distribution, float(point[self._names.index(param_name)]))


def make_sampler(
    settings: Settings,
    seed: int | None,
    *,
    space: Mapping[str, BaseDistribution] | None = None,
    combinations: Sequence[Mapping[str, Any]] = (),
    known: Sequence[Mapping[str, Any]] = (),
) -> BaseSampler:
    """Return the sampler of SAMPLER with its options; FIX holds some parameters fast.

    Args:
        settings: of this worker.
        seed: from `sampler_seed`, this worker's own; None draws one from the operating system.
        space: what search_space suggests, for qmc.
        combinations: all there are, for grid and bruteforce.
        known: those that the first trials take.

    Raises:
        UserError: an option is not legal.
    """
    name, options = settings.sampler, settings.sampler_options
    variable = f"SAMPLER={name}"
    if name in FINITE:
        sampler = construct(variable, Combinations, options, combinations=combinations, known=known)
    elif name == "qmc":
        given = {"space": dict(space or {}), "seed": settings.seed or 0}
        sampler = construct(variable, NumberedQMC, options, **given)
    else:
        # With several objectives nothing is pruned, and Optuna's γ has no upper limit.
        several = {"count_pruned": len(settings.directions) > 1}
        kinds: dict[str, tuple[type[BaseSampler], dict[str, Any]]] = {
            "tpe": (CompleteTPE, several),
            "random": (samplers.RandomSampler, {}),
            "cmaes": (samplers.CmaEsSampler, {"with_margin": True}),
            "nsgaii": (samplers.NSGAIISampler, {"population_size": POPULATION}),
            "gp": (GPOfAll, {"deterministic_objective": False}),
        }
        kind, defaults = kinds[name]
        sampler = construct(variable, kind, options, seed=seed, **defaults)
    if settings.fixed and name not in FINITE:
        warnings.filterwarnings("ignore", category=ExperimentalWarning)
        sampler = PartialFixedSampler(settings.fixed, sampler)
    assert isinstance(sampler, BaseSampler)
    return sampler


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
