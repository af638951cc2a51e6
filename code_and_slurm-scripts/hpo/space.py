"""A study's search space: what it is, how many combinations it has, and that it stays the same.

    plan = adopt_space(study, settings, search_space)      a worker, before its first trial

The space is found by calling the script's own search_space(trial) with a trial that takes notes.
The study remembers it (user attribute `space`): workers with another one, e.g. with the finite
form of SAMPLER=grid in a study that TPE has begun, are refused instead of mixed in.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.trial import FixedTrial

from hpo.objectives import declared_objectives
from hpo.samplers import FINITE
from hpo.settings import Settings, UserError

MOST_COMBINATIONS = 100_000


@dataclass
class Plan:
    """What a worker knows of the space before its first trial."""

    space: dict[str, BaseDistribution] = field(default_factory=dict)  # of the first path
    combinations: list[dict[str, Any]] = field(default_factory=list)  # of grid and bruteforce

    def total(self, total_trials: int) -> int:
        """Return with how many trials the study ends: a finite space may end it earlier."""
        return min(total_trials, len(self.combinations)) if self.combinations else total_trials


def adopt_space(study: optuna.Study, settings: Settings, script: Mapping[str, Any]) -> Plan:
    """Return the space of `script` (its names), and make the study remember it.

    Raises:
        UserError: the study has another space or other objectives, or the sampler cannot use it.
    """
    search_space = script.get("search_space")
    plan = Plan()
    if search_space is not None:
        plan.space = first_path(search_space)
    if settings.sampler in FINITE:
        if search_space is None:
            raise UserError(
                f"SAMPLER={settings.sampler} needs a function search_space(trial) in "
                f"{settings.py_script}, which returns every suggested value"
            )
        plan.combinations = combinations(search_space, settings.sampler)
    # In this order: who finds a space without combinations takes it for one that has none.
    remembered: dict[str, Any] = {
        "combinations": len(plan.combinations),
        "space": {name: json.loads(distribution_to_json(d)) for name, d in plan.space.items()},
    }
    _refuse_another(study, settings, remembered)
    several = len(study.directions) > 1  # then nothing is pruned
    facts: dict[str, Any] = {
        "sampler": settings.sampler,
        "pruner": "none" if several else settings.pruner,
        "total_trials": settings.total_trials,  # of the last job: it may be raised
    }
    if names := settings.objectives or declared_objectives(settings.py_script)[:1]:
        facts["objectives"] = list(names)
    for key, value in {**{k: v for k, v in remembered.items() if v}, **facts}.items():
        if study.user_attrs.get(key) != value:
            study.set_user_attr(key, value)
    return plan


def _refuse_another(study: optuna.Study, settings: Settings, mine: Mapping[str, Any]) -> None:
    attributes = study.user_attrs
    known = attributes.get("space", mine["space"])
    count = attributes.get("combinations", 0 if "space" in attributes else mine["combinations"])
    if (known, count) == (mine["space"], mine["combinations"]):
        return
    names = [n for n in {**known, **mine["space"]} if known.get(n) != mine["space"].get(n)]
    raise UserError(
        f"study {study.study_name!r} was begun with another search space "
        f"(SAMPLER={attributes.get('sampler')}; different: {', '.join(names) or 'its branches'}); "
        f"choose another STUDY_NAME for SAMPLER={settings.sampler}"
    )


def first_path(search_space: Callable[[Any], object]) -> dict[str, BaseDistribution]:
    """Return the parameters that search_space suggests when each has its first value."""
    trial = _Notes([])
    search_space(trial)
    return dict(trial.distributions)


def combinations(search_space: Callable[[Any], object], sampler: str) -> list[dict[str, Any]]:
    """Return every combination, in an order that is mixed but always the same.

    Raises:
        UserError: a parameter is continuous, there are too many, or a grid has branches.
    """
    found = []
    path: list[int] | None = []
    while path is not None:
        trial = _Notes(path)
        search_space(trial)
        trial.need_finite(sampler)
        found.append(trial.params)
        if len(found) > MOST_COMBINATIONS:
            raise UserError(
                f"SAMPLER={sampler}: search_space has more than {MOST_COMBINATIONS} combinations; "
                "shorten its lists"
            )
        path = trial.next_path()
    if sampler == "grid" and len({frozenset(params) for params in found}) > 1:
        raise UserError("SAMPLER=grid: search_space has branches; use SAMPLER=bruteforce")
    random.Random(0).shuffle(found)  # a study that is stopped half-way has seen a bit of all
    return found


class _Notes(FixedTrial):
    """Takes the value of `path` (indices) for each parameter in turn, then the first ones."""

    def __init__(self, path: list[int]) -> None:
        super().__init__({})
        self._path = path
        self._sizes: list[int] = []  # how many values each parameter has; 0: continuous

    def _suggest(self, name: str, distribution: BaseDistribution) -> Any:
        if name not in self._distributions:
            values = values_of(distribution)
            position = len(self._sizes)
            index = self._path[position] if position < len(self._path) else 0
            self._sizes.append(len(values))
            self._suggested_params[name] = values[index] if values else distribution.low  # type: ignore[attr-defined]
            self._distributions[name] = distribution
        return self._suggested_params[name]

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


def values_of(distribution: BaseDistribution) -> list[Any]:
    """Return the values of a parameter; none where there are infinitely many."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(range(distribution.low, distribution.high + 1, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        steps = round((distribution.high - distribution.low) / distribution.step)
        return [distribution.low + i * distribution.step for i in range(steps + 1)]
    return []
