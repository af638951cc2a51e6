"""The state of anything: taken from it, put back into it, and written without code in it.

    state = state_of("scheduler", scheduler)      what has to be kept of it, as plain data
    put_back("scheduler", scheduler, state)       the same object is then as it was

    plain = pack(state)                           what JSON, or torch with weights_only, can hold
    state = unpack(plain)

These can be kept:

    what has state_dict() and load_state_dict()   models, optimisers, schedulers, GradScaler, …
    torch.Generator, numpy.random.Generator and RandomState, random.Random
    a dict, a list, a SimpleNamespace, a dataclass: of numbers, words, True, False, None, lists,
    tuples, sets, dicts, NumPy arrays and tensors (which come back on the CPU)

Nothing here imports torch or NumPy: what holds a tensor or an array has done so.
"""

from __future__ import annotations

import base64
import copy
import inspect
import random
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

from hpo.settings import UserError
from hpo.words import one_line

TAG = "what it is"  # the key that tells a packed value from a dict of the script's own
SEQUENCES: dict[str, type[Any]] = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": deque,
}
# A defaultdict comes back as a dict: what it makes by default is code.
MAPPINGS: dict[str, Callable[[Any], Any]] = {
    "dict": dict,
    "Counter": lambda pairs: Counter(dict(pairs)),
    "OrderedDict": OrderedDict,
}


# ---------- Taken, and put back ----------


def state_of(name: str, thing: Any) -> Any:
    """Return the state of what a script calls `name`.

    Raises:
        UserError: it has none that could be put back.
    """
    if _has(thing, "state_dict", "load_state_dict"):
        return _without_functions(thing.state_dict())
    if _has(thing, "get_state", "set_state"):  # torch.Generator, numpy.random.RandomState
        return thing.get_state()
    if _has(thing, "getstate", "setstate"):  # random.Random
        return thing.getstate()
    if hasattr(thing, "bit_generator"):  # numpy.random.Generator
        return thing.bit_generator.state
    if isinstance(thing, (dict, list, deque)):
        return thing
    if _has_fields(thing):
        return dict(vars(thing))
    raise UserError(_cannot(name, thing))


def put_back(name: str, thing: Any, state: Any) -> None:
    """Make `thing` what it was when its state was taken.

    Raises:
        UserError: nothing can be put into it.
    """
    if _has(thing, "state_dict", "load_state_dict"):
        thing.load_state_dict(_for_this_machine(thing, state))
    elif _has(thing, "get_state", "set_state"):
        thing.set_state(state)
    elif _has(thing, "getstate", "setstate"):
        thing.setstate(state)
    elif hasattr(thing, "bit_generator"):
        thing.bit_generator.state = state
    elif isinstance(thing, dict):
        thing.clear()
        thing.update(state)
    elif isinstance(thing, (list, deque)):
        thing.clear()
        thing.extend(state)
    elif _has_fields(thing):
        vars(thing).clear()
        vars(thing).update(state)
    else:
        raise UserError(_cannot(name, thing))


def _without_functions(state: Any) -> Any:
    """Leave out what is code, as OneCycleLR of torch 2.3 has it: the new object has its own."""
    if not isinstance(state, dict) or not any(inspect.isroutine(each) for each in state.values()):
        return state
    return {key: each for key, each in state.items() if not inspect.isroutine(each)}


def _has(thing: Any, *methods: str) -> bool:
    return all(callable(getattr(thing, method, None)) for method in methods)


def _has_fields(thing: Any) -> bool:
    if isinstance(thing, type):
        return False
    return isinstance(thing, SimpleNamespace) or (
        is_dataclass(thing) and hasattr(thing, "__dict__")
    )


def _cannot(name: str, thing: Any) -> str:
    what = f"{name}={one_line(repr(thing), 40)} ({type(thing).__name__}) cannot come back"
    if isinstance(thing, (bool, int, float, str, tuple)) or thing is None:
        return f'checkpoint: {what}; put it into a dict: progress = {{"{name}": …}}'
    return f"checkpoint: {what}; give what has state_dict and load_state_dict, or a dict"


def _for_this_machine(thing: Any, state: Any) -> Any:
    """How a step is computed is this machine's business: a trial may go on from GPU to CPU."""
    own = getattr(thing, "param_groups", None)
    if not isinstance(own, list) or not isinstance(state, dict) or "param_groups" not in state:
        return state
    keys = ("fused", "capturable", "foreach")
    groups = [
        {**saved, **{key: mine[key] for key in keys if key in mine}}
        for saved, mine in zip(state["param_groups"], own, strict=True)
    ]
    return {**state, "param_groups": groups}


# ---------- Random numbers that a script draws from without naming their source ----------


def random_states() -> dict[str, Any]:
    """Return the states of random, and of NumPy and torch (CPU, each GPU) where they are used."""
    found: dict[str, Any] = {"python": random.getstate()}
    if "numpy" in sys.modules:
        found["numpy"] = sys.modules["numpy"].random.get_state(legacy=False)
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            found["cuda"] = torch.cuda.get_rng_state_all()
            found["device"] = torch.cuda.current_device()
    return found


def put_back_random(found: dict[str, Any]) -> None:
    """Draw on from where random_states() was called."""
    if "python" in found:
        random.setstate(found["python"])
    if "numpy" in found:
        import numpy

        numpy.random.set_state(found["numpy"])
    if "torch" in found:
        import torch

        torch.set_rng_state(found["torch"])
        if "cuda" in found and torch.cuda.is_available():
            _put_back_gpus(torch, found["cuda"], found["device"])


def _put_back_gpus(torch: Any, states: list[Any], used: int) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # The first process of the trial has written it; all of them draw what it draws.
        torch.cuda.set_rng_state(states[used])
        return
    for device, state in enumerate(states[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


# ---------- Plain data ----------


def pack(value: Any, where: str = "state", with_tensors: bool = True) -> Any:
    """Return a value as plain data; a file that holds no tensors is JSON, which knows less.

    Raises:
        UserError: part of it is no data; `where` says which.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return _number(value)
    if isinstance(value, list):
        return [pack(item, f"{where}[{at}]", with_tensors) for at, item in enumerate(value)]
    if isinstance(value, dict):
        return _pack_dict(value, where, with_tensors)
    if with_tensors and _is_torchs(value):
        return value
    if isinstance(value, tuple) and with_tensors:
        return tuple(pack(item, f"{where}[{at}]") for at, item in enumerate(value))
    for kind, its_type in SEQUENCES.items():
        if isinstance(value, its_type):
            items = [pack(item, where, with_tensors) for item in value]
            return {TAG: kind, "items": items, "most": getattr(value, "maxlen", None)}
    if isinstance(value, (bytes, bytearray)):
        return {TAG: "bytes", "data": base64.b64encode(value).decode()}
    if (numpy := sys.modules.get("numpy")) and isinstance(value, (numpy.ndarray, numpy.generic)):
        return _pack_array(numpy, value, where, with_tensors)
    raise UserError(
        f"checkpoint: {where} is a {type(value).__name__}, which is no data; give an object that "
        "has state_dict and load_state_dict by a name of its own: save(…, name=object)"
    )


def _number(value: Any) -> Any:
    for kind in (bool, int, float, str):  # NumPy's float64 is a float, too
        if isinstance(value, kind):
            return kind(value)
    return None


def _is_torchs(value: Any) -> bool:
    torch: Any = sys.modules.get("torch")
    kinds = (torch.Tensor, torch.Size, torch.dtype, torch.device) if torch else ()
    return isinstance(value, kinds)


def _pack_dict(value: dict[Any, Any], where: str, with_tensors: bool) -> Any:
    packed = {key: pack(item, f"{where}[{key!r}]", with_tensors) for key, item in value.items()}
    known = (str, int) if with_tensors else (str,)  # JSON has no other keys, and no order
    ordered = type(value) is OrderedDict
    simple = all(type(key) in known for key in packed) and not isinstance(value, Counter)
    if simple and TAG not in packed and (with_tensors or not ordered):
        if not ordered:
            return packed
        whole = copy.copy(value)  # torch notes versions in its attributes
        whole.update(packed)
        return whole
    kind = "Counter" if isinstance(value, Counter) else "OrderedDict" if ordered else "dict"
    pairs = [[pack(key, where, with_tensors), item] for key, item in packed.items()]
    return {TAG: kind, "items": pairs}


def _pack_array(numpy: Any, value: Any, where: str, with_tensors: bool) -> Any:
    if value.dtype.hasobject:
        raise UserError(f"checkpoint: {where} is an array of objects, which are no data")
    array = numpy.ascontiguousarray(value).reshape(-1)
    raw = array.view(numpy.uint8) if array.size else numpy.zeros(0, numpy.uint8)
    if with_tensors and (torch := sys.modules.get("torch")):
        data = torch.tensor(raw)
    else:
        data = base64.b64encode(raw.tobytes()).decode()
    kind = "array" if isinstance(value, numpy.ndarray) else "scalar"
    return {TAG: kind, "dtype": value.dtype.str, "shape": list(value.shape), "data": data}


def unpack(value: Any) -> Any:
    """Return what was packed."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if type(value) is tuple:
        return tuple(unpack(item) for item in value)
    if not isinstance(value, dict):
        return value
    if TAG not in value:
        whole = copy.copy(value)
        whole.update({key: unpack(item) for key, item in value.items()})
        return whole
    kind = value[TAG]
    if kind in MAPPINGS:
        return MAPPINGS[kind]([(unpack(key), unpack(item)) for key, item in value["items"]])
    if kind == "deque":
        return deque(map(unpack, value["items"]), value["most"])
    if kind in SEQUENCES:
        return SEQUENCES[kind](map(unpack, value["items"]))
    if kind == "bytes":
        return base64.b64decode(value["data"])
    return _unpack_array(value)


def _unpack_array(value: dict[str, Any]) -> Any:
    import numpy

    data = value["data"]
    raw = base64.b64decode(data) if isinstance(data, str) else data.numpy().tobytes()
    array = numpy.frombuffer(raw, dtype=value["dtype"]).reshape(value["shape"]).copy()
    return array if value[TAG] == "array" else array[()]
