"""What a study's own script says of a trial: its configuration, its weights, its test scores.

A script is the user's: whatever leaves one of its functions becomes one line (UserError) that names
the function and the script's line.
"""

from __future__ import annotations

import copy
import numbers
import os
import traceback
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo import packages
from hpo.checkpoint import folder_path, weights_path
from hpo.script import Script, as_if_launched, load
from hpo.settings import SCRIPTS, Settings, UserError, use
from hpo.study.trials import best_trials, without_best
from hpo.words import cut, one_line, plain, shown


def chosen_trial(study: optuna.Study, number: int | None) -> FrozenTrial:
    """Return trial `number`, or the best one.

    Raises:
        UserError: there is no such complete trial, or several are best and none was chosen.
    """
    if number is not None:
        return _complete_trial(study, number)
    best = best_trials(study)
    if not best:
        raise UserError(f"study {study.study_name!r}: {without_best(study)}")
    if len(study.directions) > 1:
        front = ", ".join(str(trial.number) for trial in best)
        raise UserError(f"several objectives: choose a trial with --trial, of the front {front}")
    return best[0]


def _complete_trial(study: optuna.Study, number: int) -> FrozenTrial:
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    if number not in trials:
        known = f"the study has 0 to {max(trials)}" if trials else "the study has none yet"
        raise UserError(f"--trial {number}: there is no trial of that number ({known})")
    state = trials[number].state
    if state != TrialState.COMPLETE:
        reason = one_line(trials[number].user_attrs.get("fail_reason", ""))
        why = f" ({cut(reason)})" if state == TrialState.FAIL and reason else ""
        raise UserError(
            f"--trial {number}: it is {state.name}{why}; only a complete trial has a result"
        )
    return trials[number]


def load_script(study: optuna.Study, settings: Settings) -> Script:
    """Import the study's script, which sees the study's own settings.

    Raises:
        UserError: the script, a package, its DATA or MODEL is missing; or it raises.
    """
    remembered = study.user_attrs
    inputs = remembered.get("inputs", {})
    data = SCRIPTS / inputs["DATA"] if "DATA" in inputs else settings.data
    model = SCRIPTS / inputs["MODEL"] if "MODEL" in inputs else settings.model
    if data and not data.is_file():
        raise UserError(f"DATA: there is no file {data}")
    if model and not model.is_dir():
        raise UserError(f"MODEL: {model} is no folder")
    use(
        replace(
            settings,
            # Its search space takes the form that the study's sampler needs.
            sampler=str(remembered.get("sampler", settings.sampler)),
            small=inputs.get("SMALL", "0") == "1" or settings.small,
            data=data,
            model=model,
            train_images=int(inputs.get("TRAIN_IMAGES", settings.train_images)),
            script_args=tuple(remembered.get("script_args", settings.script_args)),
        )
    )
    return load(str(remembered.get("py_script", settings.py_script)))


def asked(script: Script, name: str, *arguments: Any) -> Any:
    """Return what a function of the script returns; the script offers it.

    Raises:
        UserError: it raised something, or called sys.exit.
    """
    try:
        with as_if_launched(script.py_script):
            return script.offers(name)(*arguments)
    except (UserError, BrokenPipeError):  # the latter: nobody reads what it prints
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
        raise UserError(f"{name} fails in {_place(script, error)}: {cut(what, 300)}") from error


def _place(script: Script, error: BaseException) -> str:
    """Return the script's name, with the last of its lines that led to an error."""
    name = script.py_script
    files = {str(SCRIPTS / name), str((SCRIPTS / name).resolve())}
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename in files]
    return f"{name}, line {lines[-1]}" if lines else name


def configuration(script: Script, study: optuna.Study, trial: FrozenTrial) -> Any:
    """Return what search_space gives for the parameters of a trial.

    Raises:
        UserError: the script has none, or has been changed since.
    """
    script.need("search_space", "the configuration of a trial")
    frozen = copy.deepcopy(trial)  # a search_space may set attributes
    frozen.study = study  # type: ignore[attr-defined]  # or look at the other trials
    try:
        return asked(script, "search_space", frozen)
    except UserError as error:
        raise UserError(
            f"{script.py_script} no longer fits trial {trial.number}: {error}; "
            "was search_space edited since?"
        ) from error


def load_weights(settings: Settings, number: int) -> dict[str, Any]:
    """Return the state_dict of a trial, on the CPU.

    Raises:
        UserError: the file is not there, or cannot be read.
    """
    path = weights_path(settings, number)
    if not os.path.exists(path):
        own = folder_path(settings, number)
        if models := ", ".join(str(each) for each in own.glob("model.*")):
            raise UserError(f"the model of trial {number} is a file of its framework: {models}")
        raise UserError(
            f"the weights of trial {number} are not here ({path}): those of the KEEP_BEST best "
            "trials are kept, if the objective calls checkpoint.save"
        )
    packages.need("it", "torch")
    import torch

    try:
        weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # half a file, another format, no permission
        what = one_line(getattr(error, "strerror", None) or error)
        raise UserError(f"the weights of trial {number} cannot be read ({path}): {what}") from error
    return weights


def scores(script: Script, config: Any, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the script's test_model says, by name: numbers, lists of them, or texts.

    Raises:
        UserError: it has no such function, or that raised something, or returned nothing.
    """
    if script.offers("test_model") is None:
        raise UserError(f"{script.py_script} has no function test_model(config, weights)")
    found = asked(script, "test_model", config, weights)
    if found is None:
        raise UserError(f"test_model in {script.py_script} returned nothing")
    named = found if isinstance(found, Mapping) else {"test score": found}
    return {str(name): as_data(score) for name, score in named.items()}


def tested(study: optuna.Study, settings: Settings, trial: FrozenTrial) -> dict[str, str]:
    """Return what is there of a trial, by name, as it is shown: test scores, its folder, weights.

    Without a score, why there is none: whatever is wrong, everything else can be shown.
    """
    folder, weights = folder_path(settings, trial.number), weights_path(settings, trial.number)
    found = {"folder": str(folder)} if folder.is_dir() else {}
    if found and not weights.exists():
        return found  # of a program, or a framework, that saves by itself
    try:
        state = load_weights(settings, trial.number)
        script = load_script(study, settings)
        script.need("test_model", "it")
        named = scores(script, configuration(script, study, trial), state)
    except UserError as error:
        return {**found, "test score": f"none: {error}"}
    return {**found, **{n: shown_score(s) for n, s in named.items()}, "weights": str(weights)}


def as_data(value: Any) -> Any:
    """Return a value as JSON knows it: tensors and arrays are numbers and lists, others texts."""
    value = plain(value.detach() if hasattr(value, "detach") else value)
    if isinstance(value, Mapping):
        return {str(name): as_data(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [as_data(part) for part in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def shown_score(score: Any) -> str:
    """Return a score on one line, whatever it is."""
    if isinstance(score, list):
        return cut(f"[{', '.join(map(shown_score, score))}]")
    if isinstance(score, dict):
        return cut(", ".join(f"{name} {shown_score(part)}" for name, part in score.items()))
    return cut(one_line(shown(score)))


def is_number(score: Any) -> bool:
    """Return whether a mean can be taken of it."""
    return isinstance(score, numbers.Real) and not isinstance(score, bool)
