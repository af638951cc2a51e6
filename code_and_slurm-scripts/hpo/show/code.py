"""The code of an exported model: the script, the modules of the user's own that it needs, hpo/.

A module belongs to it if it has been imported and lies in the scripts' folder; of a package of the
user's own, all modules do.  For a script that lies elsewhere, it is the script's own folder.
"""

from __future__ import annotations

import ast
import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from hpo import packages
from hpo.settings import SCRIPTS


def copy_code(py_script: str, target: Path) -> str:
    """Copy a script that has been imported, its modules and hpo/ to the new folder `target`.

    Returns the path of the script from there.

    Raises:
        OSError: it cannot be written.
    """
    shutil.copytree(SCRIPTS / "hpo", target / "hpo", ignore=shutil.ignore_patterns("__pycache__"))
    if packages.REQUIREMENTS.exists():
        shutil.copy(packages.REQUIREMENTS, target)
    script = Path(os.path.abspath(SCRIPTS / py_script))
    root = SCRIPTS if script.is_relative_to(SCRIPTS) else script.parent
    for file in {script, *_own_modules(root)}:
        place = target / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)
    return str(script.relative_to(root))


def _own_modules(root: Path) -> set[Path]:
    """Return the files of all imported modules below `root` but those of hpo."""
    found: set[Path] = set()
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not isinstance(file, str) or name == "__main__":
            continue
        path = Path(os.path.abspath(file))
        if path.is_relative_to(SCRIPTS / "hpo") or not _is_own(path, root) or not path.is_file():
            continue
        found.add(path)
        package = root / path.relative_to(root).parts[0]
        if (package / "__init__.py").is_file():  # it may import more of itself later
            found |= {other for other in package.rglob("*.py") if _is_own(other, root)}
    return found


def _is_own(path: Path, root: Path) -> bool:
    """Whether a file lies below `root`, and is none that pip has installed there."""
    if not path.is_relative_to(root):
        return False
    parts = path.relative_to(root).parts
    return not any(part.startswith(".") or part == "site-packages" for part in parts)


def requirements(code: Path) -> list[str]:
    """Return what pip has to install for the code of an export, as installed here."""
    provided = metadata.packages_distributions()
    names = {"torch", "optuna"}
    for file in code.rglob("*.py"):
        if not file.is_relative_to(code / "hpo"):
            names |= _imported(file)
    found = {name: provided[name][0] for name in names if name in provided}
    return sorted(
        f"{package}=={metadata.version(package).partition('+')[0]}" for package in found.values()
    )


def _imported(file: Path) -> set[str]:
    """Return the names of the top-level modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found
