"""The best model, to take away: an export that loads without the study, and a final training.

    python check_best_model.py --export DIR     weights, configuration, scores, code
    python check_best_model.py --retrain 5      five seeds on all images: mean ± deviation

An exported folder needs the packages of its requirements.txt (torch, Optuna, and what the script
imports), and nothing else of this machine:

    weights.pt       the state_dict                     config.json    what search_space returned
    metrics.json     the trial's value, test scores     versions.json  Python, torch, Optuna, study
    code/            the script, its modules, hpo/      load_model.py  python load_model.py
    requirements.txt what pip installs for it

Of a framework that has written a file of its own it is that file (hpo/show/model_file.py).

Before it has its name, it is loaded once in another Python process, in another folder.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.script import Script
from hpo.settings import Settings, UserError
from hpo.show.code import copy_code, requirements
from hpo.show.model_file import model_file, write_model_file
from hpo.show.results import (
    asked,
    configuration,
    is_number,
    load_script,
    load_weights,
    scores,
    shown_score,
)
from hpo.words import cut, one_line, plain, shown, to_json

LOAD_MODEL = '''"""Load the exported model.

    python load_model.py            prints it
    from load_model import model    in a program beside this file

It needs Python {python} or one like it, and: pip install -r requirements.txt
"""

import json
import sys
from pathlib import Path

import torch

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "code"))

from hpo.script import as_if_launched, load
from hpo.settings import DEFAULTS, Settings

# The settings of the study, whatever the environment says here.
Settings.from_env(**{{**DEFAULTS, **{given!r}}})
script = load({script!r})  # runs no trial
config = json.loads((here / "config.json").read_text(encoding="utf-8"))
with as_if_launched(script.py_script):
    model = script.need("build_model", "load_model.py")(config)
model.load_state_dict(torch.load(here / "weights.pt", map_location="cpu", weights_only=True))
model.eval()

if __name__ == "__main__":
    print(model)
    print(sum(parameter.numel() for parameter in model.parameters()), "parameters")
'''


class ExportFailed(Exception):
    """The folder was complete, but could not be written to its end, or does not load."""


def export(study: optuna.Study, settings: Settings, trial: FrozenTrial, folder: Path) -> str:
    """Write the model of a trial into a new folder, whole or not at all; return what was tried.

    Raises:
        UserError: the folder exists or cannot be made, or something is missing.
        ExportFailed: the disk is full, or the model cannot be loaded.
    """
    with _new_folder(folder) as temporary:
        own = model_file(settings, trial.number)
        try:
            if own:
                write_model_file(own, temporary, study, trial)
            else:
                _write_model(temporary, study, settings, trial)
            said = _loaded_once(temporary)
            os.rename(temporary, folder)
        except (OSError, RuntimeError) as error:  # the latter is torch's word for a full disk
            raise ExportFailed(f"--export: {folder}: {one_line(error)}") from error
        except ExportFailed as error:
            if not own:
                raise
            raise ExportFailed(f"{error}; as it was written it is {own}") from error
    return said


def _write_model(folder: Path, study: optuna.Study, settings: Settings, trial: FrozenTrial) -> None:
    """Write the model of a script of one's own, with the code that builds it."""
    weights = load_weights(settings, trial.number)
    script = load_script(study, settings)
    script.need("build_model", "--export")
    config = configuration(script, study, trial)
    files = {
        "config.json": _as_json(config),
        "metrics.json": to_json(_metrics(script, trial, config, weights), indent=2),
        "versions.json": to_json(_versions(study, trial), indent=2),
    }
    asked(script, "build_model", config)  # it may import more
    placed = copy_code(script.py_script, folder / "code")
    _write(folder, files, placed, weights)
    if script.offers("export_model"):
        asked(script, "export_model", config, weights, folder)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder beside `folder`, which goes at the end unless it has been renamed."""
    parent = folder.absolute().parent
    temporary = parent / f".export-{os.getpid()}.tmp"
    try:
        if os.path.lexists(folder):
            raise UserError(f"--export: {folder} exists already; name a new folder")
        if not parent.is_dir():
            raise UserError(f"--export: {parent} does not exist; create it first")
        (parent / folder.name).mkdir()  # now: before anything is computed
        (parent / folder.name).rmdir()
        temporary.mkdir()
    except OSError as error:
        why = error.strerror
        raise UserError(f"--export: {cut(str(folder))} cannot be written: {why}") from error
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _as_json(config: Any) -> str:
    """Return a configuration as JSON. Raises UserError if it could not be read back."""

    def default(value: Any) -> Any:
        found = plain(value)
        if found is value:
            raise TypeError(one_line(repr(value), 60))
        return found

    try:
        return json.dumps(config, default=default, indent=2)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--export: search_space returns what config.json cannot hold: {one_line(error)}; "
            "let it return a word, and look up in build_model what that stands for"
        ) from error


def _metrics(
    script: Script, trial: FrozenTrial, config: Any, weights: dict[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try:
        found = scores(script, config, weights)
    except UserError as error:  # the model can be taken away all the same
        print(f"metrics.json has no test score: {error}")
    return {"trial": trial.number, "values": trial.values, **found}


def _versions(study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
    import torch

    return {
        "python": platform.python_version(), "torch": torch.__version__,
        "optuna": optuna.__version__, "study": study.study_name, "params": trial.params,
    }  # fmt: skip


def _write(folder: Path, files: dict[str, str], script: str, weights: dict[str, Any]) -> None:
    """Write all but the code; `script` is the path of the script from the folder code/."""
    import torch

    torch.save(weights, folder / "weights.pt")
    for name, content in files.items():
        (folder / name).write_text(content + "\n", encoding="utf-8")
    (folder / "requirements.txt").write_text("\n".join(requirements(folder / "code")) + "\n")
    mine = Settings.from_env()  # those of the study, since load_script
    given = {"SAMPLER": mine.sampler, "SMALL": str(int(mine.small))}
    given |= {"TRAIN_IMAGES": str(mine.train_images), "SCRIPT_ARGS": shlex.join(mine.script_args)}
    text = LOAD_MODEL.format(script=script, given=given, python=platform.python_version())
    (folder / "load_model.py").write_text(text, encoding="utf-8")


def _loaded_once(folder: Path) -> str:
    """Load a folder in a fresh Python, elsewhere; return what it said. Raises ExportFailed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(folder / "load_model.py")],
        cwd="/",
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        errors="replace",
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode == 0 and lines:
        return lines[-1]
    said = [line for line in done.stderr.splitlines() if line.strip()]
    begins = [at for at, line in enumerate(said) if not line[0].isspace()]  # the traceback's end
    why = " ".join(map(str.strip, said[begins[-1] :])) if begins else f"status {done.returncode}"
    if "cannot be imported" in why:
        why = f"{cut(why, 240)} (the script reads data when it is imported? do so in a function)"
    raise ExportFailed(f"--export: it does not load in a fresh Python: {cut(why, 330)}")


def retrain(
    study: optuna.Study, settings: Settings, trial: FrozenTrial, seeds: int
) -> dict[str, list[float]]:
    """Train a trial's configuration with seeds 0 … seeds−1 on all images.

    Returns each score of the test images that is a number, with one per seed.

    Raises:
        UserError: the study's script cannot do it.
    """
    script = load_script(study, settings)
    script.need("train_final", "--retrain")
    script.need("test_model", "--retrain")
    config = configuration(script, study, trial)
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        named = scores(script, config, asked(script, "train_final", config, seed))
        for name, score in named.items():
            if is_number(score):
                found.setdefault(name, []).append(score)
        line = ", ".join(f"{name} {shown_score(score)}" for name, score in named.items())
        print(f"seed {seed}: {line}", flush=True)
    return found


def mean_and_deviation(values: list[float]) -> str:
    """Return "mean ± standard deviation" (of the sample); the mean alone for one value."""
    mean = shown(statistics.mean(values))
    return f"{mean} ± {shown(statistics.stdev(values))}" if len(values) > 1 else mean
