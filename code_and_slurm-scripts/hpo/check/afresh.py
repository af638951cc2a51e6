"""What a script keeps outside of its functions, made what it is in a process that has just started.

    kept = Kept(objective)           before the first short trial
    kept.put_back(new_process)       before each

A trial that was interrupted goes on in another process.  There, a number that a script counts in a
global variable, in a class or in an object of its own begins anew, and so does a list or a dict.
"""

from __future__ import annotations

import copy
import functools
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from hpo.words import own_file

MOST_ITEMS, DEEPEST = 100, 3  # of a list or a dict: more are data
CONTAINERS = (list, dict, set, deque)


class _Place(NamedTuple):
    """A name of a module, a class or an object, and what it had when the check began."""

    holder: Any
    name: str
    value: Any
    content: Any  # a copy


class Kept:
    """The numbers, lists and dicts that a script holds, as they are now; what is None, too."""

    def __init__(self, objective: Any) -> None:
        """Look at the user's own modules, and at an objective that is an object."""
        self._holders = [(holder, set(vars(holder))) for holder in _holders(objective)]
        self._places = [
            _Place(holder, name, value, copy.deepcopy(value))
            for holder, names in self._holders
            for name, value in ((name, vars(holder)[name]) for name in names)
            if not name.startswith("__") and (value is None or _is_plain(value))
        ]

    def put_back(self, new_process: bool) -> None:
        """Make them what they were; where none is meant, what was loaded since may stay."""
        for holder, names in self._holders:
            for name in [n for n in vars(holder) if n not in names and not n.startswith("__")]:
                if new_process or _is_plain(vars(holder)[name]):
                    delattr(holder, name)
        for place in self._places:
            now = vars(place.holder).get(place.name)
            if now is place.value and not isinstance(now, CONTAINERS):
                continue
            if not new_process and (place.value is None or not _is_plain(now)):
                continue
            if isinstance(place.value, CONTAINERS):
                _fill(place.value, copy.deepcopy(place.content))
            if now is not place.value and isinstance(place.holder, type):
                setattr(place.holder, place.name, place.value)
            elif now is not place.value:
                vars(place.holder)[place.name] = place.value


def _fill(container: Any, content: Any) -> None:
    container.clear()
    add = container.extend if isinstance(container, (list, deque)) else container.update
    add(content)


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether it is a number, or holds nothing but plain values; True and False are switches."""
    if isinstance(value, (*CONTAINERS, tuple)) and depth < DEEPEST:
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else list(value)
        return len(items) <= MOST_ITEMS and all(_is_plain(item, depth + 1) for item in items)
    if depth:
        return value is None or isinstance(value, (bool, int, float, str))
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _holders(objective: Any) -> Iterator[Any]:
    """Yield the user's modules, and the classes, functions and objects that these hold."""
    todo = [m for m in list(sys.modules.values()) if own_file(getattr(m, "__file__", None))]
    seen: set[int] = set()
    todo.append(objective)
    for value in todo:  # it grows
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, functools.partial):
            todo += [value.func, _named(*value.args, *value.keywords.values())]
        elif isinstance(value, MethodType):
            todo.append(value.__self__)
        elif _is_the_users(value):
            yield value
            todo += vars(value).values()
            if isinstance(value, FunctionType):
                todo.append(_named(*(value.__defaults__ or ()), *_enclosed(value)))


def _named(*values: Any) -> SimpleNamespace:
    """Give values a holder: a list among them can be filled again."""
    return SimpleNamespace(**{str(at): value for at, value in enumerate(values)})


def _enclosed(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it has none yet
            yield cell.cell_contents


def _is_the_users(value: Any) -> bool:
    if isinstance(value, ModuleType):
        return own_file(getattr(value, "__file__", None))
    if not hasattr(value, "__dict__") or hasattr(type(value), "state_dict"):  # a model holds itself
        return False
    kind = value if isinstance(value, (type, FunctionType)) else type(value)
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return own_file(file) or isinstance(value, (SimpleNamespace, Namespace))
