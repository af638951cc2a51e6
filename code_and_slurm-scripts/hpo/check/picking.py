"""Which values a short trial has: picked, not sampled, so that it can be repeated.

values = pick(search_space, study, position=0.0)            the smallest, as a rule
values = pick(search_space, study, given={"units": 8})      others as before, this one changed

A combination that search_space refuses (TrialPruned) is not picked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FixedTrial, FrozenTrial

from hpo.search.space import value_at

MOST_TRIES = 2000  # of search_space, until it refuses no longer


def value_of(distribution: BaseDistribution, position: float) -> Any:
    """Return the value at `position`, 0 … 1, of a range, or of a list in the order of its numbers.

    So the first trial has the fewest epochs, in whatever order they are listed.
    """
    choices = getattr(distribution, "choices", ())
    if choices and all(type(choice) in (int, float) for choice in choices):
        distribution = CategoricalDistribution(sorted(choices))
    return value_at(distribution, position)


def others_of(distribution: BaseDistribution, value: Any) -> list[Any]:
    """Return values of a parameter that are not this one: the middle, the last, the first, …"""
    found: list[Any] = []
    for position in (0.5, 1.0, 0.0, 0.25, 0.75):
        other = value_of(distribution, position)
        if not _same(other, value) and not any(_same(other, each) for each in found):
            found.append(other)
    return found


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def legal(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a parameter may have this value; its range may depend on other parameters."""
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except (ValueError, TypeError):
        return False


class Picked(optuna.samplers.BaseSampler):
    """Gives each parameter its value in `values`; to those that are not there the first."""

    def __init__(self, values: Mapping[str, Any], chance: int = 0) -> None:
        """Prepare; `chance` above 0 draws the others by chance, always the same way."""
        self.values, self.random = values, random.Random(chance) if chance else None

    def infer_relative_search_space(self, *_: Any) -> dict[str, BaseDistribution]:
        """Return nothing: every parameter is independent of the others."""
        return {}

    def sample_relative(self, *_: Any) -> dict[str, Any]:
        """Return nothing, for the same reason."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Return the value of one parameter."""
        if name in self.values and legal(distribution, self.values[name]):
            return self.values[name]
        return value_of(distribution, self.random.random() if self.random else 0.0)


class _Asking(FixedTrial):
    """A trial that nobody runs: search_space is asked what it would suggest."""

    def __init__(self, study: optuna.Study, given: Mapping[str, Any], draw: Any) -> None:
        super().__init__({})
        self.study = study  # a search_space may look at the trials that there are
        self._given, self._draw = given, draw

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._distributions:
            value = self._given.get(name)
            if name not in self._given or not legal(distribution, value):
                value = value_of(distribution, self._draw())
            self._suggested_params[name] = value
            self._distributions[name] = distribution
        return self._suggested_params[name]


def pick(
    search_space: Callable[[Any], Any],
    study: optuna.Study,
    given: Mapping[str, Any],
    position: float = 0.0,
    needed: Collection[str] = (),
    tries: int = MOST_TRIES,
) -> dict[str, Any] | None:
    """Return a combination that search_space takes, or None if none was found.

    Parameters that are not `given` are at `position` of their ranges; if that is refused, or lacks
    the one that is `needed`, they are drawn by chance, always in the same order.
    """
    chance = random.Random(0)
    for attempt in range(tries):
        asking = _Asking(study, given, chance.random if attempt else lambda: position)
        try:
            search_space(asking)
        except Exception:  # TrialPruned, or a branch that fails: the trial that comes there says so
            continue
        if all(name in asking.params for name in needed):
            return dict(asking.params)
    return None
