"""How a number, a time, a configuration and a line of a log are shown to people: alike."""

from __future__ import annotations

import json
import logging
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HPO = str(Path(__file__).resolve().parent)
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")})

# The plumbing's loggers have a manager of their own.  A script's `logging.disable`, `dictConfig` or
# logger class reaches those of logging's, and a worker that says nothing seems to do nothing.
_manager = logging.Manager(logging.root)
_manager.setLoggerClass(logging.Logger)
_manager.getLogger("hpo").setLevel(logging.INFO)


def logger(name: str) -> logging.Logger:
    """Return a logger of the plumbing: "hpo", or one below it, as "hpo.worker"."""
    return _manager.getLogger(name)


def shown(value: object) -> str:
    """Return a value as a person reads it: four digits of a float, everything else as it is."""
    if not isinstance(value, float):
        return str(value)
    if 1e4 <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.4g}"


def values(numbers: Sequence[float]) -> str:
    """Return the value of a trial, or the values of several objectives."""
    return ", ".join(map(shown, numbers))


def parameters(params: Mapping[str, object]) -> str:
    """Return a configuration on one line."""
    return " ".join(f"{name}={shown(value)}" for name, value in params.items())


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def text_of(value: object) -> str:
    """Return str(value); of a user's error whose text itself fails, that it does."""
    try:
        return str(value)
    except Exception as error:
        return f"<a {type(value).__name__} whose text fails: {type(error).__name__}>"


def one_line(text: object, most: int = 500) -> str:
    """Return the first line of a text that has one; "" otherwise."""
    lines = [line.strip() for line in text_of(text).splitlines() if line.strip()]
    return lines[0][:most] if lines else ""


def own_file(file: str | None) -> bool:
    """Return whether a source file is the user's: not Python's, a package's or the plumbing's."""
    text = str(file or "")
    installed = "/site-packages/" in text or "/dist-packages/" in text  # also pip install --user
    return bool(text) and not installed and not text.startswith((HPO, *LIBRARIES, "<frozen"))


def raised(error: BaseException) -> str:
    """Return what the user's code has raised, and where: "KeyError: 'x' (my.py, line 7)"."""
    text = f"{type(error).__name__}: {one_line(error)}".removesuffix(": ")
    return f"{text} {place_of(error)}".rstrip()


def place_of(error: BaseException) -> str:
    """Return where in the user's files it was raised: "(my.py, line 7)"; "" if nowhere there."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if own_file(frame.filename)]
    return f"({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def cut(text: str, most: int = 100) -> str:
    """Return a text of at most `most` characters; the sign … says that there is more."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plain(value: Any) -> Any:
    """Return NumPy's numbers and arrays, and tensors, as numbers and lists; others as they are."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def with_tuples(value: Any) -> Any:
    """Return a choice as search_space has it: tuples where JSON has made lists of them."""
    value = plain(value)
    return tuple(map(with_tuples, value)) if isinstance(value, (list, tuple)) else value


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON; NumPy's and torch's numbers are numbers, what is no data its text."""

    def default(other: Any) -> Any:
        found = plain(other)
        return (
            list(other)
            if isinstance(other, (set, frozenset))
            else (str(other) if found is other else found)
        )

    return json.dumps(value, default=default, indent=indent)
