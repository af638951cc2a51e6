"""What a script gives to be called: whether it can be, and where it was written."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

from hpo.values import UserError
from hpo.words import one_line


def check_returns(function: Any, what: str) -> None:
    """Raise UserError for what is no function, or none that returns a value."""
    if not callable(function):
        raise UserError(f"{what}: {one_line(repr(function), 60)} is no function")
    for each in (function, getattr(function, "__call__", None)):  # noqa: B004
        if inspect.iscoroutinefunction(each) or inspect.isasyncgenfunction(each):
            raise UserError(f"{what} is async: write def, without async")
        if inspect.isgeneratorfunction(each):
            raise UserError(f"{what} has a yield, and so returns no value: use return")


def check_objective(objective: Any) -> None:
    """Raise UserError for what no trial could be run with; whatever else is called and seen."""
    check_returns(objective, "the objective")
    try:
        signature = inspect.signature(objective)
    except (TypeError, ValueError):  # of a callable that was not written in Python
        return
    try:
        signature.bind(None)
    except TypeError as error:
        raise UserError(
            f"the objective takes one argument, as in def objective(trial): here, {one_line(error)}"
        ) from error


def globals_of(objective: Any) -> dict[str, Any]:
    """Return the names of the module in which a callable was written."""
    while isinstance(objective, functools.partial):
        objective = objective.func
    if not hasattr(objective, "__globals__") and not hasattr(objective, "__wrapped__"):
        objective = getattr(objective, "__func__", type(objective).__call__)  # method or instance
    found = getattr(inspect.unwrap(objective), "__globals__", None)
    return found if found is not None else vars(sys.modules["__main__"])
