"""A script's search space: every parameter that search_space(trial) may suggest, and its values.

    space = explore(search_space)                 name → distribution, of all branches
    found = combinations(search_space, "grid")

It is found by calling search_space with a trial that takes notes.  A configuration that
search_space refuses (TrialPruned) is not in the space.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import FixedTrial, create_trial

from hpo.settings import UserError
from hpo.words import one_line, parameters, raised, shown

MOST_COMBINATIONS = 100_000
MOST_TRIES = 2000  # of search_space, to find its branches

SearchSpace: TypeAlias = "Callable[[Any], Any]"
Space: TypeAlias = "dict[str, BaseDistribution]"


def explore(search_space: SearchSpace) -> Space:
    """Return the parameters of every branch that one other value leads to, and so on from there.

    Raises:
        UserError: search_space fails, or a parameter's choices cannot be kept in a study.
    """
    study = quiet_study()
    space: Space = {}
    seen: set[tuple[int, ...]] = {()}
    paths: list[list[int]] = [[]]
    for tries, path in enumerate(paths):  # it grows
        notes = _Notes(path, study)
        try:
            notes.ask(search_space)
        except UserError:
            if tries == 0 or notes.wrong:
                raise
            continue  # the trial that comes there will say why
        _check_same_ranges(space, notes.distributions)
        new = [name for name in notes.distributions if name not in space]
        for name in new:
            space[name] = notes.distributions[name]
        # Other values of what is new here: each may lead into a branch of its own.
        for other in notes.variations(new if tries else list(notes.distributions)):
            if tuple(other) not in seen and len(paths) < MOST_TRIES:
                seen.add(tuple(other))
                paths.append(other)
    check_choices(space)
    return space


def _check_same_ranges(space: Space, branch: Mapping[str, BaseDistribution]) -> None:
    """Raise UserError for a name that stands for something else in another branch."""
    for name, mine in branch.items():
        if name in space and not fits(space[name], mine):
            raise UserError(
                f"search_space: {name} is {legal(space[name])}, and elsewhere {legal(mine)}; "
                f"Optuna keeps one list, or kind, for a name: call the other one {name}_2"
            )


def check_choices(space: Space, tuples: bool = True) -> None:
    """Raise UserError for choices that another worker could not read from the study."""
    plain = (bool, int, float, str, type(None))
    for name, distribution in space.items():
        for choice in getattr(distribution, "choices", ()):
            parts = choice if isinstance(choice, tuple) and tuples else (choice,)
            if not all(type(part) in plain for part in parts):
                cure = "suggest a word, and look up what it stands for in a dictionary"
                if hasattr(parts[0], "tolist"):
                    cure = "numpy's become such with .tolist()"
                raise UserError(
                    f"search_space: the choices of {name} must be numbers, words, True, False or "
                    f"None{', or tuples of them' * tuples}, not {one_line(repr(choice), 60)}; "
                    f"{cure}"
                )


def combinations(search_space: SearchSpace, sampler: str) -> list[dict[str, Any]]:
    """Return every combination, in an order that is mixed but always the same.

    Raises:
        UserError: a parameter is continuous, there are too many, or a grid has branches.
    """
    found = []
    study = quiet_study()
    path: list[int] | None = []
    while path is not None:
        notes = _Notes(path, study)
        refused = notes.ask(search_space)
        notes.need_finite(sampler)
        if not refused:
            found.append(notes.params)
        if len(found) > MOST_COMBINATIONS:
            raise UserError(
                f"SAMPLER={sampler}: search_space has more than {MOST_COMBINATIONS} combinations; "
                "shorten its lists"
            )
        path = notes.next_path()
    if sampler == "grid" and len({frozenset(params) for params in found}) > 1:
        raise UserError("SAMPLER=grid: search_space has branches; use SAMPLER=bruteforce")
    if not found:
        raise UserError(f"SAMPLER={sampler}: search_space refuses every combination")
    random.Random(0).shuffle(found)  # a study that is stopped half-way has seen a bit of all
    return found


def quiet_study() -> optuna.Study:
    """Return a study in memory, of which Optuna says nothing."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study()
    finally:
        optuna.logging.set_verbosity(before)


class _Notes(FixedTrial):
    """Takes the value of `path` (indices) for each parameter in turn, then the first ones."""

    def __init__(self, path: list[int], study: optuna.Study) -> None:
        super().__init__({})
        # A search_space may look at the trials that there are.  In this study there are none: the
        # space must be the same for every worker, whenever it starts.
        self.study = study
        self._path = path
        self._sizes: list[int] = []  # how many values each parameter has; 0: continuous
        self.wrong = ""  # what no value could mend

    def ask(self, search_space: SearchSpace) -> bool:
        """Call search_space; return whether it refuses the configuration. Raises UserError."""
        try:
            search_space(self)
        except optuna.TrialPruned:
            return True
        except UserError:
            raise
        except Exception as error:
            what = raised(error)
            if any(self._path):
                what = f"{parameters(self.params)}: {what} (if that cannot be: optuna.TrialPruned)"
            else:
                what = f"the first values: {what}"
            raise UserError(f"search_space fails with {what}") from error
        return False

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        """Suggest the value of a list. Raises UserError for a set, each process has its order."""
        if isinstance(choices, (set, frozenset)) and any(isinstance(c, str) for c in choices):
            self.wrong = (
                f"search_space: the choices of {name} are a set, which has another order in each "
                "process; give a list, with [ ]"
            )
            raise UserError(self.wrong)
        return super().suggest_categorical(name, choices)

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self._distributions and not fits(self._distributions[name], distribution):
            self.wrong = f"search_space suggests {name} twice, as two different parameters"
            raise UserError(self.wrong)
        if no_range(distribution):
            self.wrong = f"search_space: {name} is {legal(distribution)}, which is no range"
            raise UserError(self.wrong)
        if name not in self._distributions:
            position = len(self._sizes)
            index = self._path[position] if position < len(self._path) else 0
            self._sizes.append(size_of(distribution))
            self._suggested_params[name] = nth_value(distribution, index)
            self._distributions[name] = distribution
        return self._suggested_params[name]

    def variations(self, names: list[str]) -> Iterator[list[int]]:
        """Return this path with another value for each parameter of `names` in turn."""
        here = (self._path + [0] * len(self._sizes))[: len(self._sizes)]
        for position, (name, size) in enumerate(zip(self._distributions, self._sizes, strict=True)):
            if name in names:
                for index in range(1, min(size, 200)):
                    yield [*here[:position], index]

    def need_finite(self, sampler: str) -> None:
        """Raise UserError if a parameter is continuous."""
        for name, size in zip(self._distributions, self._sizes, strict=True):
            if not size:
                raise UserError(
                    f"SAMPLER={sampler} needs a finite space, but {name} is continuous; "
                    f"give a list: suggest_categorical({name!r}, [...])"
                )

    def next_path(self) -> list[int] | None:
        """Return the path after this one, the last parameter moving fastest; None at the end."""
        path = (self._path + [0] * len(self._sizes))[: len(self._sizes)]
        while path and path[-1] + 1 >= self._sizes[len(path) - 1]:
            path.pop()
        return [*path[:-1], path[-1] + 1] if path else None


class _Given(_Notes):
    """Takes the values that are given, if they are legal, and others first ones."""

    def __init__(self, given: Mapping[str, Any], study: optuna.Study) -> None:
        super().__init__([], study)
        self.given = given

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name in self.given and name not in self._distributions:
            value = self.given[name]
            try:
                create_trial(value=0.0, params={name: value}, distributions={name: distribution})
            except (ValueError, TypeError):
                raise UserError(
                    f"{name}={shown(value)} is not in its range: {legal(distribution)}"
                ) from None
            self._suggested_params[name] = value
            self._distributions[name] = distribution
        return super()._suggest(name, distribution)


class _Drawn(_Notes):
    """Takes the values that are given, and draws the others."""

    def __init__(
        self, given: Mapping[str, Any], study: optuna.Study, chance: random.Random
    ) -> None:
        super().__init__([], study)
        self.given, self.chance = given, chance

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._distributions:
            drawn = value_at(distribution, self.chance.random())
            self._suggested_params[name] = self.given.get(name, drawn)
            self._distributions[name] = distribution
        return self._suggested_params[name]


def check_takes_some(search_space: SearchSpace, given: Mapping[str, Any]) -> None:
    """Raise UserError for a search_space that refuses whatever is drawn beside what is given."""
    study, chance = quiet_study(), random.Random(0)
    for _ in range(MOST_TRIES):
        try:
            if not _Drawn(given, study, chance).ask(search_space):
                return
        except UserError:  # the trial that comes there will say why
            return
    beside = f" with FIX={','.join(f'{n}={shown(v)}' for n, v in given.items())}" if given else ""
    raise UserError(
        f"search_space refuses every one of {MOST_TRIES} configurations{beside} (TrialPruned)"
    )


def misfit(search_space: SearchSpace, given: Mapping[str, Any]) -> str:
    """Return why a configuration, or a part of one, is not in the space; "" if it is."""
    trial = _Given(given, quiet_study())
    try:
        refused = trial.ask(search_space)
    except UserError as error:
        return str(error)
    if refused:
        return f"search_space refuses {parameters(given)}"
    if unknown := [name for name in given if name not in trial.distributions]:
        return f"{unknown[0]} is no parameter of search_space ({', '.join(trial.distributions)})"
    return ""


def legal(distribution: BaseDistribution) -> str:
    """Return the values of a parameter in words."""
    if isinstance(distribution, CategoricalDistribution):
        return f"one of {', '.join(map(repr, distribution.choices))}"
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    steps = f" in steps of {shown(distribution.step)}" if distribution.step not in (None, 1) else ""
    return f"from {shown(distribution.low)} to {shown(distribution.high)}{steps}"


def no_range(distribution: BaseDistribution) -> bool:
    """Whether nothing can be drawn: an end is NaN or infinite, or they are too far apart."""
    if not isinstance(distribution, FloatDistribution):
        return False
    return not math.isfinite(distribution.high - distribution.low)


def size_of(distribution: BaseDistribution) -> int:
    """Return how many values a parameter has; 0 where there are infinitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if isinstance(distribution, IntDistribution):  # exact, also beyond what a float can hold
        return (distribution.high - distribution.low) // distribution.step + 1
    if distribution.step is None:
        return 0
    return round((distribution.high - distribution.low) / distribution.step) + 1


def nth_value(distribution: BaseDistribution, index: int) -> Any:
    """Return a parameter's value, counted from 0; the first one stands for infinitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[index]
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    return distribution.low + index * (distribution.step or 0)


def value_at(distribution: BaseDistribution, position: float) -> Any:
    """Return the value at `position`, from 0 (first) to 1 (last), of a parameter's range."""
    if isinstance(distribution, IntDistribution) and distribution.log:
        value = round(distribution.low * (distribution.high / distribution.low) ** position)
        return min(max(value, distribution.low), distribution.high)
    if size := size_of(distribution):
        return nth_value(distribution, min(int(position * size), size - 1))
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        return min(low * (high / low) ** position, high)
    return low + (high - low) * position


def fits(known: BaseDistribution, mine: BaseDistribution) -> bool:
    """Return whether Optuna takes both for one parameter: choices stay, a range may be extended."""
    try:
        check_distribution_compatibility(known, mine)
    except ValueError:
        return False
    return True
