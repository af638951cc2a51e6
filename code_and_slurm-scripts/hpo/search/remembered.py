"""What a study remembers of its search, and that every worker searches the same.

    plan = plan_of(settings, script)           a worker, before there is a study
    adopt_space(study, settings, plan)         the study remembers it, or refuses another

The study remembers the space (user attribute `space`): workers with another one, e.g. with the
finite form of SAMPLER=grid in a study that TPE has begun, are refused instead of mixed in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json, json_to_distribution
from optuna.trial import create_trial

from hpo.script import Script
from hpo.search.objectives import declared_objectives
from hpo.search.samplers import FINITE
from hpo.search.space import Space, check_takes_some, combinations, explore, fits, legal
from hpo.settings import Settings, UserError
from hpo.words import logger, shown

log = logger("hpo.worker")


@dataclass
class Plan:
    """What a worker knows of the space before its first trial."""

    space: Space = field(default_factory=dict)  # of all branches
    combinations: list[dict[str, Any]] = field(default_factory=list)  # of grid and bruteforce
    known: list[dict[str, Any]] = field(default_factory=list)  # what the first trials take


def adopt_space(study: optuna.Study, settings: Settings, plan: Plan) -> None:
    """Make the study remember the space.

    Raises:
        UserError: the study has another space.
    """
    # In this order: who finds a space without combinations takes it for one that has none.
    remembered: dict[str, Any] = {
        "combinations": len(plan.combinations),
        "space": {name: _json(distribution) for name, distribution in plan.space.items()},
    }
    _refuse_another(study, settings, plan)
    several = len(study.directions) > 1  # then nothing is pruned
    facts: dict[str, Any] = {
        "sampler": settings.sampler,
        "pruner": "none" if several else settings.pruner,
        "total_trials": settings.total_trials,  # of the last job: it may be raised
    }
    if settings.final_runs or "final_runs" in study.user_attrs:
        facts["final_runs"] = settings.final_runs
    if settings.script_args:
        facts["script_args"] = list(settings.script_args)
    if names := settings.objectives or declared_objectives(settings.py_script)[:1]:
        facts["objectives"] = list(names)
    attributes = study.user_attrs
    for key, value in {**{k: v for k, v in remembered.items() if v}, **facts}.items():
        if attributes.get(key) != value:
            study.set_user_attr(key, value)


def plan_of(settings: Settings, script: Script) -> Plan:
    """Return the space of the script, as the sampler needs it.

    Raises:
        UserError: search_space fails, the sampler cannot use it, or FIX does not fit.
    """
    search_space = script.offers("search_space")
    plan = Plan()
    if search_space is not None:
        plan.space = explore(search_space)
        _check_fixed(settings, plan.space)
        if settings.sampler not in FINITE:
            check_takes_some(search_space, settings.fixed)
    if settings.sampler in FINITE:
        if search_space is None:
            raise UserError(
                f"SAMPLER={settings.sampler} needs a function search_space(trial) in "
                f"{settings.py_script}, which returns every suggested value"
            )
        plan.combinations = [
            params
            for params in combinations(search_space, settings.sampler)
            if all(params.get(name, value) == value for name, value in settings.fixed.items())
        ]
    return plan


def _check_fixed(settings: Settings, space: Space) -> None:
    for name, value in settings.fixed.items():
        if name not in space:
            raise UserError(f"FIX: {name} is no parameter of search_space ({', '.join(space)})")
        try:
            create_trial(value=0.0, params={name: value}, distributions={name: space[name]})
        except (ValueError, TypeError) as error:
            raise UserError(
                f"FIX: {name}={shown(value)} is not in its range: {legal(space[name])}"
            ) from error


def _refuse_another(study: optuna.Study, settings: Settings, plan: Plan) -> None:
    attributes = study.user_attrs
    if "space" not in attributes:
        _check_trials_fit(study, plan)
        return
    known = {name: _parse(text) for name, text in attributes["space"].items()}
    mine = {name: _parse(_json(distribution)) for name, distribution in plan.space.items()}
    count = attributes.get("combinations", 0)
    differ = [
        name
        for name in {**known, **mine}
        if name not in known or name not in mine or not fits(known[name], mine[name])
    ]
    if not differ and count == len(plan.combinations):
        for name in known:
            if known[name] != mine[name]:
                log.info("the range of %s is another one from now on: %s", name, mine[name])
        return
    raise UserError(
        f"study {study.study_name!r} was begun with another search space "
        f"(SAMPLER={attributes.get('sampler')}; different: {', '.join(differ) or 'its branches'}); "
        f"choose another STUDY_NAME for SAMPLER={settings.sampler}"
    )


def _check_trials_fit(study: optuna.Study, plan: Plan) -> None:
    """Adopt a study that this bundle has not made (stock Optuna's) only if its trials fit."""
    trials = study.get_trials(deepcopy=False)
    mine = {name: _parse(_json(distribution)) for name, distribution in plan.space.items()}
    for trial in trials:
        for name, distribution in trial.distributions.items():
            theirs = _parse(_json(distribution))
            if mine and (name not in mine or not fits(theirs, mine[name])):
                raise UserError(
                    f"study {study.study_name!r} has trials with another search space "
                    f"({name}: {distribution}); choose another STUDY_NAME"
                )
    if trials and "space" not in study.user_attrs:  # no other worker has just begun it
        log.info("the study had %d trials before this bundle knew it", len(trials))


def _json(distribution: BaseDistribution) -> Any:
    return json.loads(distribution_to_json(distribution))


def _parse(content: Any) -> BaseDistribution:
    """Return the distribution of what a study remembers; tuples among the choices are lists."""
    return json_to_distribution(json.dumps(content))
