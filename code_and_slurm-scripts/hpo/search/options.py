"""Options of Optuna's samplers and pruners, given as text: SAMPLER=tpe:n_startup_trials=20.

Optuna looks at few of them when it is given them; the others fail in the middle of a study.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from optuna.exceptions import ExperimentalWarning

from hpo.settings import UserError
from hpo.words import one_line

# What an option may be, by what Optuna says of it, and what people call that.
KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "str": "a word",
}


def construct(variable: str, kind: type, options: Mapping[str, Any], **defaults: Any) -> Any:
    """Return kind(**defaults, **options).

    Raises:
        UserError: an option is unknown, or its value is refused.
    """
    legal = _settable(kind)
    for name, value in options.items():
        if name not in legal:
            there = f"there are: {', '.join(legal)}" if legal else "there are none"
            raise UserError(f"{variable}: {name} is no option; {there}")
        if not _fits(value, legal[name]):
            kinds = " or ".join(KINDS[word] for word in legal[name] if word in KINDS)
            raise UserError(f"{variable}: {name}={value!r} is not {kinds}")
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    try:
        return kind(**{**defaults, **options})
    except (ValueError, TypeError) as error:
        raise UserError(f"{variable}: {one_line(error)}") from error


def _settable(kind: type) -> dict[str, list[str]]:
    """Return the options that a text can give, each with what its value may be."""
    found = {}
    for name, parameter in inspect.signature(kind).parameters.items():
        annotation = parameter.annotation
        said = annotation if isinstance(annotation, str) else annotation.__name__
        if name != "seed" and set(words := said.split(" | ")) <= {*KINDS, "None"}:
            found[name] = words
    return found


def _fits(value: object, kinds: list[str]) -> bool:
    kind = "None" if value is None else type(value).__name__
    return kind in kinds or (kind == "int" and "float" in kinds)
