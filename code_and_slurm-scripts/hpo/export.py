"""The best model, to take away: an export that loads without the study, and a final training.

    python check_best_model.py --export DIR     weights, configuration, scores, code
    python check_best_model.py --retrain 5      five seeds on all images: mean ± deviation

An exported folder needs torch, and nothing else of this machine:

    weights.pt       the state_dict                     config.json    what search_space returned
    metrics.json     the trial's value, test scores     versions.json  Python, torch, Optuna, study
    code/            the study's script and hpo/        load_model.py  python load_model.py
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import platform
import shutil
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.checkpoint import weights_path
from hpo.objectives import check_needs
from hpo.settings import SCRIPTS, Settings, UserError, pip_command

LOAD_MODEL = '''"""Load the exported model.  python load_model.py"""

import json
import sys
from pathlib import Path

import torch

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "code"))
from {script} import build_model  # noqa: E402

model = build_model(json.loads((here / "config.json").read_text()))
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
    complete = {t.number: t for t in study.trials if t.values}
    if not complete:
        raise UserError(f"study {study.study_name!r} has no complete trial yet")
    if number is not None:
        if number not in complete:
            raise UserError(f"--trial {number}: there is no complete trial of that number")
        return complete[number]
    if len(study.directions) > 1:
        front = ", ".join(str(trial.number) for trial in study.best_trials)
        raise UserError(f"several objectives: choose a trial with --trial, of the front {front}")
    return study.best_trial


def load_script(study: optuna.Study, settings: Settings) -> ModuleType:
    """Import the study's script, which imports torch.

    Raises:
        UserError: torch, the script, a package that it needs, or its DATA is missing.
    """
    name = str(study.user_attrs.get("py_script", settings.py_script))
    if not importlib.util.find_spec("torch"):
        raise UserError(f"needs torch, which this Python has not: {pip_command('torch')}")
    if not (SCRIPTS / name).exists():
        raise UserError(f"{name} is not in {SCRIPTS}")
    check_needs(name)
    # Its search space takes the form that the study's sampler needs (hpo/samplers.py); its data
    # and its size are the study's, too.
    os.environ["SAMPLER"] = str(study.user_attrs.get("sampler", settings.sampler))
    os.environ.update(study.user_attrs.get("inputs", {}))
    Settings.from_env()  # DATA may be gone
    return importlib.import_module(Path(name).stem)


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
    _need(script, "build_model", "--export")
    weights, config = load_weights(settings, trial.number), script.search_space(trial)
    import torch

    scores = script.test_model(config, weights) if hasattr(script, "test_model") else {}
    files = {
        "config.json": config,
        "metrics.json": {"trial": trial.number, "values": trial.values, **scores},
        "versions.json": {
            "python": platform.python_version(), "torch": torch.__version__,
            "optuna": optuna.__version__, "study": study.study_name, "params": trial.params,
        },
    }  # fmt: skip
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        shutil.copytree(SCRIPTS / "hpo", temporary / "code" / "hpo",
                        ignore=shutil.ignore_patterns("__pycache__"))  # fmt: skip
        shutil.copy(SCRIPTS / f"{script.__name__}.py", temporary / "code")
        torch.save(weights, temporary / "weights.pt")
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        (temporary / "load_model.py").write_text(LOAD_MODEL.format(script=script.__name__))
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
    _need(script, "train_final", "--retrain")
    config = script.search_space(trial)
    scores: dict[str, list[float]] = {}
    for seed in range(seeds):
        for name, score in script.test_model(config, script.train_final(config, seed)).items():
            scores.setdefault(name, []).append(score)
        shown = ", ".join(f"{name} {values[-1]:.4f}" for name, values in scores.items())
        print(f"seed {seed}: {shown}", flush=True)
    return scores


def mean_and_deviation(values: list[float]) -> str:
    """Return "mean ± standard deviation" (of the sample); the mean alone for one value."""
    mean = f"{statistics.mean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _need(script: ModuleType, function: str, option: str) -> None:
    if not hasattr(script, function):
        raise UserError(f"{option} needs a function {function} in {script.__name__}.py")
