"""The configurations that a study begins with: what is known beforehand.

    known_good() in the script        a list of dicts, each a configuration or a part of one
    KNOWN_GOOD=good.json              a file with such a list
    FROM_STUDY=old.db:mnist_hpo       the five best configurations of another study that fit here

    found = known_for(settings, script, plan)    checked, before there is a study
    known = begin_with(study, found)             what the study began with

The study remembers them (user attribute `known_good`), and its trial n takes configuration n
(given.py): so each is tried once, whoever starts, and is started again.  Of another study only
configurations are taken: its values may be of other data, and count in no budget.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.trial import FrozenTrial

from hpo.script import Script, as_if_launched
from hpo.search.remembered import Plan
from hpo.search.space import misfit
from hpo.settings import FINALISTS, Settings, UserError
from hpo.study.opening import clear_errors, open_storage, open_study
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.storage import StudyStorage
from hpo.study.trials import best_trials, without_best
from hpo.words import logger, one_line, parameters, raised, with_tuples

KNOWN = "known_good"  # the function of a script, and the study's user attribute
Params: TypeAlias = "dict[str, Any]"

log = logger("hpo.worker")


def offered(settings: Settings, script: Script | None) -> bool:
    """Whether anything is known beforehand."""
    from_script = script is not None and script.offers(KNOWN) is not None
    return from_script or bool(settings.known_good or settings.from_study)


def known_for(settings: Settings, script: Script, plan: Plan) -> list[Params]:
    """Return what a study begins with; nothing if it has begun and knows what it began with.

    Raises:
        UserError: see first_trials.
    """
    if not offered(settings, script) or _knows(settings):
        return []
    return first_trials(settings, script, plan)


def first_trials(settings: Settings, script: Script, plan: Plan) -> list[Params]:
    """Return the configurations, each once, as the study will try them.

    Args:
        settings: FIX goes before what is known.
        script: it needs a search_space.
        plan: with SAMPLER=grid or bruteforce each is made one of the combinations.

    Raises:
        UserError: one is outside the search space, or FROM_STUDY is not there, or none of its
            configurations fits.
    """
    if not offered(settings, script):
        return []
    script.need("search_space", "what is known beforehand (known_good, KNOWN_GOOD, FROM_STUDY)")
    found: list[Params] = []
    for name, given in (
        *_numbered("known_good", _of_script(script)),
        *_numbered("KNOWN_GOOD", _of_file(settings.known_good)),
    ):
        params, wrong = _fitted(given, settings, script, plan)
        if wrong:
            raise UserError(f"{name}: {wrong}")
        found.append(params)
    found += _that_fit(_best_of_another(settings), settings, script, plan)
    return list({repr(sorted(params.items())): params for params in found}.values())


def begin_with(study: optuna.Study, found: list[Params]) -> list[Params]:
    """Return the configurations that the study began with; a new one begins with `found`."""
    begun = bool(study.get_trials(deepcopy=False))  # first: who has trials has decided
    if found and not begun:
        _remember_once(study, found)
    known = study.user_attrs.get(KNOWN)
    if found and known is None:
        log.info("known_good, FROM_STUDY: not used, for the study has begun without them")
    return [{name: with_tuples(value) for name, value in params.items()} for params in known or []]


def _knows(settings: Settings) -> bool:
    """Whether the study is there, and knows what it began with; creates nothing."""
    try:
        return KNOWN in open_study(settings).user_attrs
    except UserError:
        return False


def _remember_once(study: optuna.Study, found: list[Params]) -> None:
    """Let the study remember; the first who does so decides.

    With a storage of Optuna's own, which has no such transaction, it is the last one of those who
    begin a study at the same instant; in a job, init_optuna_db.py has done so before them.
    """
    storage = storage_of(study)
    if isinstance(storage, StudyStorage):
        storage.set_study_user_attr_once(study_id(study), KNOWN, found)
    elif KNOWN not in study.user_attrs:
        study.set_user_attr(KNOWN, found)


def _of_script(script: Script) -> Any:
    if script.offers(KNOWN) is None:
        return []
    try:
        with as_if_launched(script.py_script):
            return script.offers(KNOWN)()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"known_good fails: {raised(error)}") from error


def _of_file(path: Path | None) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig")) if path else []
    except ValueError as error:
        raise UserError(f"KNOWN_GOOD: {path} is no JSON: {one_line(error)}") from error


def _numbered(name: str, found: Any) -> list[tuple[str, Params]]:
    """Return configurations with names for messages. Raises UserError for anything else."""
    if not isinstance(found, (list, tuple)) or not all(isinstance(x, Mapping) for x in found):
        raise UserError(
            f'{name} is no list of configurations; it is like [{{"lr": 0.001, "epochs": 3}}]'
        )
    return [
        (f"{name}, configuration {number}", {str(key): value for key, value in x.items()})
        for number, x in enumerate(found, 1)
    ]


def _fitted(
    given: Mapping[str, Any], settings: Settings, script: Script, plan: Plan
) -> tuple[Params, str]:
    """Return a configuration as it will be tried, and what is wrong with it; "" if nothing is."""
    params = {name: settings.fixed.get(name, with_tuples(given[name])) for name in given}
    if wrong := misfit(script.offers("search_space"), params):
        return params, wrong
    if not plan.combinations:
        return params, ""
    for combination in plan.combinations:
        if all(combination.get(name) == value for name, value in params.items()):
            return combination, ""
    return params, f"SAMPLER={settings.sampler} has no combination with {parameters(params)}"


def _best_of_another(settings: Settings) -> list[FrozenTrial]:
    """Return the complete trials of FROM_STUDY, the best first; none without it.

    Raises:
        UserError: there is no such study, or no trial of it is complete.
    """
    if settings.from_study is None:
        return []
    url, name = settings.from_study
    other = replace(settings, study_db=url, study_name=name)
    try:
        with clear_errors(other):
            return _best_of(other)
    except UserError as error:
        raise UserError(f"FROM_STUDY: {error}") from error


def _best_of(other: Settings) -> list[FrozenTrial]:
    if other.sqlite_path and not other.sqlite_path.is_file():
        raise UserError(f"there is no file {other.sqlite_path}")
    storage = open_storage(other)
    names = optuna.get_all_study_names(storage=storage)
    if other.study_name not in names:
        known = ", ".join(sorted(names)) or "none"
        raise UserError(f"there is no study {other.study_name!r}; studies there: {known}")
    study = optuna.load_study(study_name=other.study_name, storage=storage)
    if not (best := best_trials(study)):
        raise UserError(f"{other.study_name!r}: {without_best(study)}")
    return best


def _that_fit(
    others: Sequence[FrozenTrial], settings: Settings, script: Script, plan: Plan
) -> list[Params]:
    """Return the best configurations of another study that can be tried in this one."""
    found: dict[str, Params] = {}
    numbers: list[str] = []
    first_wrong = ""
    for trial in others:
        params, wrong = _fitted(trial.params, settings, script, plan)
        first_wrong = first_wrong or (wrong and f"trial {trial.number}: {wrong}")
        if not wrong and found.setdefault(repr(sorted(params.items())), params) is params:
            numbers.append(str(trial.number))
        if len(found) == FINALISTS:
            break
    if others and not found:
        raise UserError(f"FROM_STUDY={settings.from_study[1]} does not fit: {first_wrong}")  # type: ignore[index]
    if numbers:
        log.info("the best of the other study are its trials %s", ", ".join(numbers))
    return list(found.values())
