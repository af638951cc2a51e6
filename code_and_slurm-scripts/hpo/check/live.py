"""What changes from epoch to epoch in a trial that runs, and is lost when the trial is interrupted.

    seen = snapshot(frame)    called from trial.report: what the functions above it hold

    scheduler                 schedulers, GradScalers, averaged models, whoever holds them
    loader's generator        generators of random numbers
    best, stopper.counter     numbers in variables, and in objects of the script's own classes

Two trials that compute the same have the same; lost(…) names what an interrupted one has not.
"""

from __future__ import annotations

import gc
import hashlib
import numbers
import random
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from types import FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple

from hpo.words import HPO, own_file

# Of a scheduler's state: how often it was stepped is not where it stands.
BOOKKEEPING = {"_step_count", "_get_lr_called_within_step", "_is_initial", "verbose"}


class Seen(NamedTuple):
    """One thing that may change: whether it is an object, or a number in a variable."""

    is_object: bool
    state: Any  # compared with ==
    identity: int = 0  # of an object in the trial that runs


def lost(
    first: Mapping[str, Seen],
    second: Mapping[str, Seen],
    again: Mapping[str, Seen],
    resumed: Mapping[str, Seen],
    kept: Container[int] = (),
) -> dict[str, bool]:
    """Return what a resumed trial has lost: name → is it an object?

    Args:
        first: a snapshot at the first report of an uninterrupted trial.
        second: at its second report.
        again: at the first report of a trial that is interrupted then; what differs from `first`
            is never the same (the time).
        resumed: at its next report, after it was resumed.
        kept: identities (`identity_of`) of what is in the checkpoint, and so not lost.
    """
    return {
        name: seen.is_object
        for name, seen in second.items()
        if name in first and first[name].state != seen.state  # it changes
        if name in again and first[name].state == again[name].state  # in the same way each time
        if name in resumed and resumed[name].state != seen.state
        if resumed[name].identity not in kept
    }


def snapshot(frame: FrameType) -> dict[str, Seen]:
    """Return what the functions that led to `frame` hold, and what else the trial made, by name."""
    seen: dict[str, Seen] = {}
    names: dict[int, str] = {}
    for name, value in _variables(frame):
        if isinstance(value, numbers.Real):
            seen.setdefault(name, Seen(False, float(value)))
        elif (state := _state(value, modules=True)) is not None:
            names.setdefault(id(value), name)
            seen.setdefault(
                f"{name} ({type(value).__name__})", Seen(True, state, identity_of(value))
            )
    for value in alive():
        state = _state(value) if id(value) not in names else None
        if state is not None:
            seen.setdefault(type(value).__name__, Seen(True, state, identity_of(value)))
    seen["Python's random numbers"] = Seen(True, _digest(random.getstate()))
    if "numpy" in sys.modules:
        state = sys.modules["numpy"].random.get_state()
        seen["NumPy's random numbers"] = Seen(True, _digest(state))
    return seen


def identity_of(value: Any) -> int:
    """Return what tells an object from others; a model in a wrapper (DDP) is the same model."""
    if hasattr(value, "parameters") and hasattr(value, "state_dict"):
        return id(next(iter(value.parameters()), value))
    return id(value)


def alive() -> Iterator[Any]:
    """Yield the schedulers, scalers, averaged models and generators made since gc's last freeze."""
    if "torch" not in sys.modules:
        return
    wanted = _classes()
    loaders = (sys.modules["torch"].utils.data.DataLoader, sys.modules["torch"].utils.data.Sampler)
    for value in gc.get_objects():
        kind = type(value)
        if issubclass(kind, wanted):
            yield value
        elif issubclass(kind, loaders) and getattr(value, "generator", None) is not None:
            yield value.generator  # torch.Generator itself is not among gc's objects


def _classes() -> tuple[type, ...]:
    torch = sys.modules["torch"]
    return (
        torch.optim.lr_scheduler.LRScheduler,
        torch.amp.GradScaler,
        torch.optim.swa_utils.AveragedModel,
    )


def _variables(frame: FrameType | None) -> Iterator[tuple[str, Any]]:
    """Yield the variables of the user's functions above a frame, and what their objects hold."""
    while frame is not None and not frame.f_code.co_filename.startswith(f"{HPO}/trial.py"):
        if own_file(frame.f_code.co_filename) and frame.f_code.co_name != "<module>":
            for name, value in [*frame.f_locals.items(), *_globals(frame)]:
                yield name, value
                for attribute, inner in _inside(value):
                    yield f"{name}.{attribute}", inner
        frame = frame.f_back


def _globals(frame: FrameType) -> Iterator[tuple[str, Any]]:
    """Yield the names of its module that a function uses."""
    for name in frame.f_code.co_names:
        if name in frame.f_globals and not isinstance(frame.f_globals[name], ModuleType):
            yield name, frame.f_globals[name]


def _inside(value: Any) -> Iterable[tuple[str, Any]]:
    """Return what a class or a function of the user's has, or an object; a loader's generator."""
    if not hasattr(value, "__dict__"):
        return []
    kind = value if isinstance(value, (type, FunctionType)) else type(value)
    module = sys.modules.get(kind.__module__)
    if own_file(getattr(module, "__file__", None)):
        return list(vars(value).items())
    if isinstance(value, type):
        return []
    return [(n, v) for n, v in vars(value).items() if n == "generator" and v is not None]


def _state(value: Any, modules: bool = False) -> Any:
    """Return a state that can be compared, of what has one that changes; None otherwise."""
    if isinstance(value, random.Random):
        return _digest(value.getstate())
    if "numpy" in sys.modules:
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.random.Generator):
            return _digest(value.bit_generator.state)
        if isinstance(value, numpy.random.RandomState):
            return _digest(value.get_state())
    if "torch" not in sys.modules:
        return None
    torch = sys.modules["torch"]
    if isinstance(value, torch.Generator):
        return _digest(value.get_state())
    kinds = (*_classes(), torch.nn.Module, torch.optim.Optimizer) if modules else _classes()
    if isinstance(value, kinds):
        state: Any = value.state_dict()  # type: ignore[union-attr]
        return _digest({k: v for k, v in state.items() if k not in BOOKKEEPING})
    return None


def _digest(state: Any) -> str:
    found = hashlib.blake2b(digest_size=16)
    for part in _parts(state):
        found.update(part)
    return found.hexdigest()


def _parts(state: Any) -> Iterator[bytes]:
    """Yield a state as bytes; functions and unknown objects say nothing."""
    if isinstance(state, Mapping):
        for key, value in state.items():
            if key not in BOOKKEEPING:
                yield str(key).encode()
                yield from _parts(value)
    elif isinstance(state, (list, tuple)):
        for value in state:
            yield from _parts(value)
    elif hasattr(state, "detach"):
        yield repr(totals([state])).encode()
    elif hasattr(state, "tobytes"):
        yield state.tobytes()
    elif isinstance(state, (int, float, str, bool, type(None))):
        yield repr(state).encode()


def totals(tensors: Iterable[Any]) -> list[float]:
    """Return two numbers for each tensor of numbers, which tell it from another."""
    found = []
    for tensor in tensors:
        if not hasattr(tensor, "detach") or not tensor.numel() or tensor.is_complex():
            continue
        flat = tensor.detach().double().flatten()
        weights = flat.new_tensor(range(1, 8)).repeat(len(flat) // 7 + 1)[: len(flat)]
        found += [float(flat.sum()), float((flat * weights).sum())]
    return found
