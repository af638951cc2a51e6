"""What pip has to install: which packages are missing, and the one command that installs them.

    python -s -m hpo.packages        numpy and torch of the image, for pip install --user -c

The versions are those of requirements-container.txt in the scripts' folder, and stand nowhere else.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from importlib import metadata

from hpo.settings import SCRIPTS, UserError, run_script

REQUIREMENTS = SCRIPTS / "requirements-container.txt"


def pinned() -> dict[str, str]:
    """Return the tested packages: name → requirement, e.g. "optuna" → "optuna==5.0.0"."""
    lines = REQUIREMENTS.read_text().splitlines() if REQUIREMENTS.exists() else []
    lines = [line.split("#")[0].strip() for line in lines]
    return {name_of(line): line for line in lines if line}


def version_of(package: str) -> str:
    """Return the tested version of a package in requirements-container.txt; "" without one."""
    return pinned().get(package, "").partition("==")[2]


def name_of(requirement: str) -> str:
    """Return the name in a requirement as pip knows it: "numpy" of "numpy>=1.20"."""
    return re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0].lower()


def installed(package: str) -> str:
    """Return the version of an installed package, or ''."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def missing(requirements: Iterable[str]) -> list[str]:
    """Return those of the requirements, as pip knows them, that this Python does not meet.

    Raises:
        UserError: one is no requirement.
    """
    from packaging.requirements import InvalidRequirement, Requirement  # Optuna brings it

    found = []
    for text in requirements:
        try:
            wanted = Requirement(text)
        except InvalidRequirement as error:
            raise UserError(f"{text!r} is no requirement of pip's: {error}") from error
        if wanted.marker and not wanted.marker.evaluate():
            continue
        version = installed(wanted.name)
        # A package that an image has built itself may be importable without pip's knowledge.
        module = wanted.name.replace("-", "_")
        if not version and importlib.util.find_spec(module):
            continue
        if not version or not wanted.specifier.contains(version, prereleases=True):
            found.append(text)
    return found


def need(purpose: str, *requirements: str) -> None:
    """Raise UserError, with the command that installs them, if packages are missing."""
    if absent := missing(requirements):
        raise UserError(
            f"{purpose} needs {' and '.join(absent)}, which this Python has not; once:\n"
            f"    {pip_command(*absent)}"
        )


def pip_command(*requirements: str) -> str:
    """Return the command that installs packages where this Python runs: image, or machine.

    A bare name is given its tested version.
    """
    known = pinned()
    words = [
        known.get(name_of(text), text) if re.fullmatch(r"[\w.-]+(\[\w+\])?", text) else text
        for text in requirements
    ]
    words = [f"'{word}'" if re.search(r"[<>;\s*\[]", word) else word for word in words]
    for launcher in ("apptainer", "singularity"):
        if image := os.environ.get(f"{launcher.upper()}_CONTAINER"):
            # Where there is a network: that is on the login node.
            binds = os.environ.get("BINDS", "/tmpdir,/work")
            seen = f"{launcher} exec {f'--bind {binds} ' if binds else ''}{image}"
            command = f"{seen} pip install --user -c image.txt {' '.join(words)}"
            if (SCRIPTS / "image.txt").exists():
                return command
            return f"{seen} python -s -m hpo.packages > image.txt\n    {command}"
    return f"{sys.executable} -m pip install {' '.join(words)}"


def check_optuna() -> None:
    """Raise UserError for an Optuna that was not tested.

    The storage uses names of Optuna that are not public (hpo/study/optuna_private.py): with
    another version they may be gone, or mean something else, in the middle of a study.
    """
    tested, found = version_of("optuna"), installed("optuna")
    if found != tested:
        raise UserError(
            f"Optuna {found or 'is not installed'}: this bundle was tested with {tested} alone; "
            f"once:\n    {pip_command('optuna')}"
        )


def print_image() -> int:
    """Print the constraints that keep pip from replacing what the image alone can give.

    A newer numpy or torch in ~/.local would hide the image's, which were built for its GPUs and for
    each other.  Asked with `python -s`, which does not see ~/.local.
    """
    for name in ("numpy", "torch", "torchvision", "torchaudio", "triton"):
        if version := installed(name):
            print(f"{name}=={version}")
    return 0


if __name__ == "__main__":
    run_script(print_image)
