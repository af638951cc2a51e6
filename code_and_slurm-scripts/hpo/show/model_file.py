"""The model that a framework has written itself, to take away: it loads with the framework alone.

    check_best_model.py --export DIR     of a trial whose folder holds one of these

    model.keras   Keras      model.ubj   XGBoost      model.txt   LightGBM      (hpo/loops)

DIR then holds that file as it is, metrics.json (the trial's value), versions.json (with the trial's
parameters), requirements.txt, and load_model.py: three lines that need no Optuna, no code of the
study, and no hpo/.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import optuna
from optuna.trial import FrozenTrial

from hpo import packages
from hpo.checkpoint import folder_path, weights_path
from hpo.settings import Settings
from hpo.words import to_json


class _Framework(NamedTuple):
    module: str
    load: str  # reads the file `path`
    said: str  # what load_model.py prints of `model`


FRAMEWORKS = {
    "model.keras": _Framework(
        "keras", "keras.models.load_model(path)", "{model.count_params()} parameters"
    ),
    "model.ubj": _Framework(
        "xgboost", "xgboost.Booster(model_file=path)", "{model.num_boosted_rounds()} rounds"
    ),
    "model.txt": _Framework(
        "lightgbm", "lightgbm.Booster(model_file=path)", "{model.num_trees()} trees"
    ),
}
BACKENDS = ("torch", "jax", "tensorflow")  # of Keras
# The word is looked for when Keras is imported; without one it takes TensorFlow.
BACKEND_LINE = 'os.environ.setdefault("KERAS_BACKEND", "{backend}")  # or another that is installed'
LOAD_MODEL = '''"""Load the exported model, with {module} alone.

    python load_model.py            prints what it is
    from load_model import model    in a program beside this file

It needs: pip install -r requirements.txt
"""

import os

{backend}import {module}

path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "{name}")
model = {load}

if __name__ == "__main__":
    print(f"{module}: {said}")
'''


def model_file(settings: Settings, number: int) -> Path | None:
    """Return the file that a framework has written of a trial; None if there is none.

    Nor is there where weights are kept as of a loop of one's own.
    """
    if weights_path(settings, number).exists():
        return None
    found = (folder_path(settings, number) / name for name in FRAMEWORKS)
    return next((path for path in found if path.is_file()), None)


def write_model_file(path: Path, folder: Path, study: optuna.Study, trial: FrozenTrial) -> None:
    """Write the file, and what belongs to it, into an empty folder.

    Raises:
        UserError: the framework is missing.
        OSError: the folder cannot be written.
    """
    framework = FRAMEWORKS[path.name]
    modules = [framework.module]
    if framework.module == "keras":
        modules.append(_backend())
    packages.need(f"--export of {path.name}", *modules)
    provided = metadata.packages_distributions()
    needed = {package: metadata.version(package) for package in _packages(modules, provided)}
    backend = BACKEND_LINE.format(backend=modules[-1]) + "\n" if len(modules) > 1 else ""
    text = LOAD_MODEL.format(name=path.name, backend=backend, **framework._asdict())
    versions = {
        "python": platform.python_version(), **needed, "optuna": optuna.__version__,
        "study": study.study_name, "params": trial.params,
    }  # fmt: skip
    metrics = {"trial": trial.number, "values": trial.values}
    shutil.copy(path, folder)
    (folder / "load_model.py").write_text(text, encoding="utf-8")
    (folder / "versions.json").write_text(to_json(versions, indent=2) + "\n", encoding="utf-8")
    (folder / "metrics.json").write_text(to_json(metrics, indent=2) + "\n", encoding="utf-8")
    lines = [f"{package}=={version.partition('+')[0]}\n" for package, version in needed.items()]
    (folder / "requirements.txt").write_text("".join(lines))


def _backend() -> str:
    """Return the package with which Keras computes here: as it is told, or the first there is."""
    told = os.environ.get("KERAS_BACKEND", "")
    return told or next((name for name in BACKENDS if find_spec(name)), BACKENDS[0])


def _packages(modules: list[str], provided: Mapping[str, list[str]]) -> list[str]:
    """Return the names by which pip knows modules: xgboost may be of xgboost-cpu."""
    return [provided[name][0] for name in modules if name in provided]
