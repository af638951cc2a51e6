"""The best model, to take away: an export that loads without the study, and a final training.

    python check_best_model.py --export DIR     weights, configuration, scores, code
    python check_best_model.py --retrain 5      five seeds on all images: mean ± deviation

An exported folder needs torch and Optuna (which its script imports), and nothing else of this
machine:

    weights.pt       the state_dict                     config.json    what search_space returned
    metrics.json     the trial's value, test scores     versions.json  Python, torch, Optuna, study
    code/            the study's script and hpo/        load_model.py  python load_model.py
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.checkpoint import weights_path
from hpo.script import Script, load
from hpo.settings import SCRIPTS, Settings, UserError, use
from hpo.study.trials import best_trials, complete, without_best
from hpo.words import one_line, plain, shown, to_json

LOAD_MODEL = '''"""Load the exported model.  python load_model.py"""

import importlib.util
import json
import sys
from pathlib import Path

import torch

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "code"))
spec = importlib.util.spec_from_file_location("exported_script", here / "code" / {script!r})
script = sys.modules["exported_script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

model = script.build_model(json.loads((here / "config.json").read_text()))
model.load_state_dict(torch.load(here / "weights.pt", map_location="cpu", weights_only=True))
model.eval()

if __name__ == "__main__":
    print(model)
    print(sum(parameter.numel() for parameter in model.parameters()), "parameters")
'''


def chosen_trial(study: optuna.Study, number: int | None) -> FrozenTrial:
    """Return trial `number`, or the best one.

    Raises:
        UserError: there is no such complete trial, or several are best and none was chosen.
    """
    known = {trial.number: trial for trial in complete(study)}
    if number is not None:
        if number not in known:
            raise UserError(f"--trial {number}: there is no complete trial of that number")
        return known[number]
    best = best_trials(study)
    if not best:
        raise UserError(f"study {study.study_name!r}: {without_best(study)}")
    if len(study.directions) > 1:
        front = ", ".join(str(trial.number) for trial in best)
        raise UserError(f"several objectives: choose a trial with --trial, of the front {front}")
    return best[0]


def load_script(study: optuna.Study, settings: Settings) -> Script:
    """Import the study's script, which sees the study's own settings.

    Raises:
        UserError: the script, a package that it needs, or its DATA is missing.
    """
    remembered = study.user_attrs
    inputs = remembered.get("inputs", {})
    data = SCRIPTS / inputs["DATA"] if "DATA" in inputs else settings.data
    if data and not data.is_file():
        raise UserError(f"DATA: there is no file {data}")
    use(
        replace(
            settings,
            # Its search space takes the form that the study's sampler needs.
            sampler=str(remembered.get("sampler", settings.sampler)),
            small=inputs.get("SMALL", "0") == "1" or settings.small,
            data=data,
            train_images=int(inputs.get("TRAIN_IMAGES", settings.train_images)),
            script_args=tuple(remembered.get("script_args", settings.script_args)),
        )
    )
    return load(str(remembered.get("py_script", settings.py_script)))


def configuration(script: Script, trial: FrozenTrial) -> Any:
    """Return what search_space gives for the parameters of a trial.

    Raises:
        UserError: the script has none, or has been changed since.
    """
    search_space = script.need("search_space", "the configuration of a trial")
    try:
        return search_space(trial)
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{script.py_script} no longer fits trial {trial.number}: {one_line(error)}; "
            "was search_space edited since?"
        ) from error


def load_weights(settings: Settings, number: int) -> dict[str, Any]:
    """Return the state_dict of a trial, on the CPU.

    Raises:
        UserError: the file is not there.
    """
    path = weights_path(settings, number)
    if not path.exists():
        raise UserError(f"the weights of trial {number} are not here ({path})")
    import torch

    weights: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return weights


def export(study: optuna.Study, settings: Settings, trial: FrozenTrial, folder: Path) -> None:
    """Write the model of a trial into a new folder, whole or not at all.

    Raises:
        UserError: the folder exists, or something is missing; nothing was written.
    """
    if folder.exists():
        raise UserError(f"--export: {folder} exists already; name a new folder")
    if not folder.absolute().parent.is_dir():
        raise UserError(f"--export: {folder.absolute().parent} does not exist; create it first")
    script = load_script(study, settings)
    script.need("build_model", "--export")
    weights, config = load_weights(settings, trial.number), configuration(script, trial)
    import torch

    files = {
        "config.json": config,
        "metrics.json": {
            "trial": trial.number, "values": trial.values, **scores(script, config, weights)
        },
        "versions.json": {
            "python": platform.python_version(), "torch": torch.__version__,
            "optuna": optuna.__version__, "study": study.study_name, "params": trial.params,
        },
    }  # fmt: skip
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(SCRIPTS / "hpo", temporary / "code" / "hpo",
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        (temporary / "code" / script.py_script).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(SCRIPTS / script.py_script, temporary / "code" / script.py_script)
        torch.save(weights, temporary / "weights.pt")
        for name, content in files.items():
            (temporary / name).write_text(to_json(content, indent=2) + "\n")
        (temporary / "load_model.py").write_text(LOAD_MODEL.format(script=script.py_script))
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def retrain(
    study: optuna.Study, settings: Settings, trial: FrozenTrial, seeds: int
) -> dict[str, list[float]]:
    """Train a trial's configuration with seeds 0 … seeds−1 on all images.

    Returns each score of the test images, with one number per seed.

    Raises:
        UserError: the study's script cannot do it.
    """
    script = load_script(study, settings)
    train_final = script.need("train_final", "--retrain")
    script.need("test_model", "--retrain")
    config = configuration(script, trial)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, score in scores(script, config, train_final(config, seed)).items():
            found.setdefault(name, []).append(score)
        line = ", ".join(f"{name} {shown(numbers[-1])}" for name, numbers in found.items())
        print(f"seed {seed}: {line}", flush=True)
    return found


def scores(script: Script, config: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Return what the script's test_model says, by name; nothing without one."""
    test_model = script.offers("test_model")
    if test_model is None:
        return {}
    found = test_model(config, weights)
    named = found if isinstance(found, dict) else {"test score": found}
    return {str(name): plain(score) for name, score in named.items()}


def mean_and_deviation(values: list[float]) -> str:
    """Return "mean ± standard deviation" (of the sample); the mean alone for one value."""
    mean = shown(statistics.mean(values))
    return f"{mean} ± {shown(statistics.stdev(values))}" if len(values) > 1 else mean
