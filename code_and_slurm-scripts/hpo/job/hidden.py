"""Does a file beside the scripts hide a module that they need?  optuna.py, random.py, …

    python -I hpo/job/hidden.py        a line that names them, or nothing

Python looks for a module in the folder of the script first; with -I it does not.  So this program
runs where no other can, and imports nothing of the bundle's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent.parent.parent
OF_THE_IMAGE = {"torch", "torchvision", "numpy", "sqlalchemy"}


def main() -> None:
    """Say which files hide a module."""
    requirements = (SCRIPTS / "requirements-container.txt").read_text()
    packages = OF_THE_IMAGE | set(re.findall(r"^\w+", requirements, re.MULTILINE))
    found = {name for name in beside() if name.split(".")[0] in packages}
    of_python = {name for name in beside() if name.split(".")[0] in sys.stdlib_module_names}
    # Most of Python's modules are needed by nobody here: a file may have their names.
    if of_python and imports("optuna", Path("/")) and not imports("optuna, hpo.worker", SCRIPTS):
        found |= of_python
    if found:
        names = ", ".join(sorted(found))
        print(f"{names} in {SCRIPTS} hides the module of that name: rename it")


def beside() -> list[str]:
    """Return the modules and packages in the scripts' folder."""
    packages = [path.parent.name for path in SCRIPTS.glob("*/__init__.py")]
    return packages + [path.name for path in SCRIPTS.glob("*.py")]


def imports(names: str, folder: Path) -> bool:
    """Return whether a Python in this folder imports modules."""
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", f"import {names}"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    main()
