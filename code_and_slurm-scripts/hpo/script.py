"""The user's script: which one it is, what it offers (the table in hpo/__init__.py), its arguments.

declared("my_model.py", "NEEDS")    read without running it: init_optuna_db.py is quick
check("my_model.py")                it is there, is Python, and calls run_worker
running(objective)                  in a worker: the script that was launched
load("my_model.py")                 in check_best_model.py: imported, and no trial is run
"""

from __future__ import annotations

import ast
import importlib.util
import os
import shlex
import sys
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hpo import packages, settings
from hpo.callables import check_objective, check_returns, globals_of
from hpo.files import AWAY
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.words import one_line, raised

NOTEBOOK = "notebook.py"  # the name of a script that is a notebook
# What a module of hpo/loops needs, for a script that imports it and says nothing.
LOOPS = {
    "huggingface": ("transformers", "accelerate"),
    "keras": ("keras",),
    "lightgbm": ("lightgbm",),
    "lightning": ("lightning>=2.6",),
    "xgboost": ("xgboost",),
}


# What is called, if the script has such a name.
CALLED = (
    *("search_space", "known_good", "prepare", "build_model", "export_model"),
    *("train_model", "test_model", "train_final"),
)


class Script(NamedTuple):
    """A script that is running, or was imported."""

    py_script: str  # as in Settings
    names: Mapping[str, Any]  # all that it defines

    def offers(self, name: str) -> Any:
        """Return what the script offers under a name of the contract; None without it.

        Raises:
            UserError: it cannot be called, or not as a function that returns a value.
        """
        found = self.names.get(name)
        if found is not None and name in CALLED:
            check_returns(found, name)
        return found

    def need(self, name: str, purpose: str) -> Any:
        """Return what it offers. Raises UserError if that is missing."""
        if self.offers(name) is None:
            raise UserError(f"{purpose} needs a function {name} in {self.py_script}")
        return self.offers(name)


# ---------- Read, not run ----------


def check(py_script: str) -> None:
    """Raise UserError if a script is not there, is no Python, or would run no trial."""
    tree = _parse(py_script)
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if "run_worker" not in words and not _imports_a_neighbour(tree):
        raise UserError(
            f"{py_script} never calls run_worker; end it with:\n"
            '    if __name__ == "__main__": run_script(lambda: run_worker(objective))'
        )


def declared(py_script: str, name: str) -> tuple[str, ...]:
    """Return the words in a script's line `name` = …; none without it, or without the script.

    Raises:
        UserError: the line holds something else.
    """
    if not (SCRIPTS / py_script).is_file():
        return ()
    for node in _parse(py_script).body:
        if name in _assigned(node):
            return _words(node.value, name, py_script)  # type: ignore[attr-defined]
    return ()


def defines(py_script: str, name: str) -> bool:
    """Return whether a script has a function (or anything else) of that name at its top level."""
    if not (SCRIPTS / py_script).is_file():
        return False
    for node in _parse(py_script).body:
        if getattr(node, "name", "") == name or name in _assigned(node):
            return True
        aliases = node.names if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if any((alias.asname or alias.name) == name for alias in aliases):
            return True
    return False


def _assigned(node: ast.stmt) -> set[str]:
    """Return the names that a statement like NAME = …, or NAME: str = …, gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        targets = [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def check_needs(py_script: str) -> None:
    """Raise UserError, with the command that installs them, if packages in NEEDS are missing.

    Without NEEDS: those of the loops that the script imports.
    """
    packages.need(py_script, *(declared(py_script, "NEEDS") or _of_loops(py_script)))


def end_without_needs() -> None:
    """End a script that was launched, with that line and status 2, if packages are missing.

    Called when hpo.worker is imported: before the script imports them, if it does so afterwards.
    """
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    if settings.imported_by_another or not file.endswith(".py"):
        return

    def checked() -> int:
        check_needs(os.path.relpath(os.path.abspath(file), SCRIPTS))
        return 0

    try:
        checked()
    except UserError:
        settings.run_script(checked)


def _of_loops(py_script: str) -> list[str]:
    if not (SCRIPTS / py_script).is_file():
        return []
    nodes = [node for node in ast.walk(_parse(py_script)) if isinstance(node, ast.ImportFrom)]
    modules = [(node.module or "").rpartition(".") for node in nodes]
    names = [name for package, _, name in modules if package == "hpo.loops"]
    return [package for name in names for package in LOOPS.get(name, ())]


def _parse(py_script: str) -> ast.Module:
    path = SCRIPTS / py_script
    try:
        return ast.parse(path.read_bytes())  # bytes: Python finds the encoding by itself
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise UserError(f"{py_script}{line}: {one_line(error)}") from error
    except OSError as error:
        raise UserError(f"PY_SCRIPT={py_script!r}: {path}: {error.strerror}") from error


def _words(node: ast.expr, name: str, py_script: str) -> tuple[str, ...]:
    try:
        value = ast.literal_eval(node)
    except ValueError:
        value = None
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, (tuple, list)) or not all(isinstance(word, str) for word in value):
        raise UserError(f'{py_script}: {name} must be words, e.g. {name} = ("one", "two")')
    return tuple(value)


def _imports_a_neighbour(tree: ast.Module) -> bool:
    """Whether the script imports a module of the user's own, which may call run_worker."""
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    modules = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    modules += [a.name for node in imports if isinstance(node, ast.Import) for a in node.names]
    roots = {module.split(".")[0] for module in modules} - {"hpo"}
    return any((SCRIPTS / root).is_dir() or (SCRIPTS / f"{root}.py").is_file() for root in roots)


# ---------- The one that runs ----------


def running(objective: Callable[..., Any]) -> Script:
    """Return the script that was launched with this objective, which may be any callable.

    A notebook has no file: there it is PY_SCRIPT, or "notebook.py".

    Raises:
        UserError: it cannot be called with a trial, or would return no value; or another name that
            the bundle calls is no function.
    """
    check_objective(objective)
    own = globals_of(objective)
    main: dict[str, Any] = vars(sys.modules["__main__"])
    if own.get("__name__") != "__main__" and any(value is objective for value in main.values()):
        own, main = main, own  # launched here, defined in a module of its own
        names: Mapping[str, Any] = ChainMap(own, main)
    else:
        names = own
    file = own.get("__file__")
    py_script = os.environ.get("PY_SCRIPT") or NOTEBOOK
    if file and Path(file).is_file():
        py_script = os.path.relpath(os.path.abspath(file), SCRIPTS)
    me = Script(py_script, names)
    for name in CALLED:
        me.offers(name)
    return me


_taken: list[list[str]] = []  # the words before `--`, once they were taken off the command line


def take_arguments() -> None:
    """Leave the script its own arguments, those after `--`, or SCRIPT_ARGS; keep the worker's.

    Called when hpo.worker is imported, that is before the script looks at its arguments.  Those
    after `--` are SCRIPT_ARGS from here on: the study remembers them.
    """
    if settings.imported_by_another:  # they are its own already
        return
    words = sys.argv[1:]
    if "--" in words:
        at = words.index("--")
        _taken[:] = [words[:at]]
        sys.argv[1:] = words[at + 1 :]
        os.environ["SCRIPT_ARGS"] = shlex.join(words[at + 1 :])
    elif words in ([], ["--check"]) and os.environ.get("SCRIPT_ARGS"):
        _taken[:] = [words]
        sys.argv[1:] = Settings.from_env().script_args
    elif words == ["--check"]:
        _taken[:] = [words]
        del sys.argv[1:]


def workers_arguments() -> list[str]:
    """Return the words of the command line that are for the worker."""
    if in_a_notebook():
        return []  # its own
    return _taken[0] if _taken else sys.argv[1:]


def prepare(me: Script) -> None:
    """Let a script prepare its data, if it offers that.

    Raises:
        UserError: it cannot.  OSError: a disk is away.
    """
    if (ready := me.offers("prepare")) is None:
        return
    try:
        ready()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        if isinstance(error, OSError) and error.errno in AWAY:
            raise
        raise UserError(f"{me.py_script}: prepare() fails: {raised(error)}") from error


def in_a_notebook() -> bool:
    """Return whether the script is a notebook's cell."""
    launcher = Path(sys.argv[0]).name  # ipykernel_launcher.py, colab_kernel_launcher.py
    return launcher.endswith("kernel_launcher.py") or "ipykernel" in sys.modules


# ---------- Imported, to use its functions ----------


def load(py_script: str) -> Script:
    """Import a script, which runs no trial; it sees none of this program's arguments.

    Raises:
        UserError: the script, a package that it needs, or its DATA is missing; or it raises, or
            ends before its last line with a status that is not 0.
    """
    path = SCRIPTS / py_script
    _parse(py_script)
    check_needs(py_script)
    name = path.stem if path.stem not in sys.modules else f"script_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # processes of a trial find its functions by this name
    with as_if_launched(py_script):
        try:
            spec.loader.exec_module(module)
        except SystemExit as error:  # at its end, without a line `if __name__ == "__main__":`
            if error.code:  # e.g. of its parser, which does not know these arguments
                words = shlex.join(sys.argv[1:]) or "no arguments"
                raise UserError(
                    f"{py_script} cannot be imported: with {words} it ends itself "
                    f"({one_line(error.code, 100)})"
                ) from error
        except UserError:
            raise
        except Exception as error:
            why = raised(error)
            if isinstance(error, ModuleNotFoundError) and error.name:
                why = f"it needs {error.name}; once:\n    {packages.pip_command(error.name)}"
            raise UserError(f"{py_script} cannot be imported: {why}") from error
    return Script(py_script, vars(module))


@contextmanager
def as_if_launched(py_script: str) -> Iterator[None]:
    """Give a script the folder and the arguments that it would have; run_worker does nothing.

    For its import, and for each call of one of its functions.
    """
    path = SCRIPTS / py_script
    arguments, was = sys.argv, settings.imported_by_another
    for folder in (str(SCRIPTS), str(path.parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    sys.argv = [str(path), *Settings.from_env().script_args]
    settings.imported_by_another = True
    try:
        yield
    finally:
        sys.argv, settings.imported_by_another = arguments, was
