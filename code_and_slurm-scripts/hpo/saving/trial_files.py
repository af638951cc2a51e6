"""The files that a trial leaves beside study.db: their names, written, read and removed.

What each of them is, hpo/checkpoint.py says.  Each is written whole or not at all.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from hpo.files import leftover_of, whole
from hpo.saving import background
from hpo.saving.states import pack, unpack
from hpo.settings import Settings, UserError
from hpo.words import logger

State = dict[str, Any]  # losses, states by name, random, and weights where the script names some
log = logger("hpo.worker")


# ---------- Names ----------


def weights_path(settings: Settings, number: int) -> Path:
    """Return where the weights of trial `number` are, or would be."""
    return settings.checkpoints / f"trial-{number:05d}.weights.pt"


def folder_path(settings: Settings, number: int) -> Path:
    """Return where the own folder of trial `number` is, or would be."""
    return settings.checkpoints / f"trial-{number:05d}"


def state_path(number: int) -> Path:
    """Return where the state of trial `number` is, or would be, if its script uses torch."""
    return Settings.from_env().checkpoints / f"trial-{number:05d}.state.pt"


def _state_paths(number: int) -> tuple[Path, Path]:
    path = state_path(number)
    return path, path.with_suffix(".json")


def state_file(number: int) -> Path | None:
    """Return the newer one of the two that are there, if any: a script may begin to use torch.

    What is being written counts: raises what background.wait() does.
    """
    background.wait()
    there = [path for path in _state_paths(number) if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


# ---------- Read and written ----------


def read_state(path: Path) -> State:
    """Return what write_state has written."""
    if path.suffix == ".json":
        state: State = unpack(json.loads(path.read_text()))
        return state
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    if "states" in state:
        return {name: unpack(value) for name, value in state.items()}
    # As it was written before there were states with names.
    random = {"torch": state["cpu_rng"]}
    if "cuda_rng" in state:
        random.update(cuda=[state["cuda_rng"]], device=0)
    states = {name: state[name] for name in ("model", "optimizer")}
    return {"losses": state["losses"], "states": states, "random": random}


def write_state(state: State, number: int, aside: bool = False) -> None:
    """Write the state of trial `number`; JSON where its script does not use torch.

    With `aside` it is copied to the memory of the CPU, and written while the trial goes on.

    Raises:
        UserError: part of it cannot be kept.
        OSError: it, or the one before, cannot be written; what was there is there still.
    """
    background.wait()  # also before there is a second copy
    tensors, plain = _state_paths(number)
    if "torch" in sys.modules:
        packed = {name: pack(value, name) for name, value in state.items()}
        if aside:
            background.begin(_writer_of_copy(packed, tensors, plain))
            return
        background.timed(lambda: write_tensors(packed, tensors))
        plain.unlink(missing_ok=True)
        return
    if "weights" in state:
        raise UserError(
            "checkpoint.save: weights=… is for tensors; without torch, save the model in "
            "checkpoint.folder(trial)"
        )
    with whole(plain) as temporary:
        temporary.write_text(json.dumps(pack(state, with_tensors=False)))
    tensors.unlink(missing_ok=True)


def _writer_of_copy(content: Mapping[str, Any], path: Path, other: Path) -> Callable[[], int]:
    """Return what writes `content` as it is now to `path`, and removes `other`.

    The copy is the bytes of the file: what is left for the thread is done without Python's lock.
    """
    import torch

    copy = io.BytesIO()
    torch.save(content, copy)

    def write() -> int:
        with whole(path) as temporary, copy.getbuffer() as data:
            size = temporary.write_bytes(data)
        copy.close()
        other.unlink(missing_ok=True)
        return size

    return write


def write_tensors(content: Mapping[str, Any], path: Path) -> int:
    """Write tensors and plain data, for torch.load with weights_only=True; return its bytes.

    Raises OSError.
    """
    import torch

    with whole(path) as temporary:
        torch.save(content, temporary)
        return temporary.stat().st_size


# ---------- Removed ----------


def remove_all(number: int) -> None:
    """Remove the state and the folder of trial `number`."""
    for path in _state_paths(number):
        path.unlink(missing_ok=True)
    _remove_folder(folder_path(Settings.from_env(), number))


def tidy(finished: Container[int], keep: Container[int]) -> None:
    """Remove what finished trials (their numbers) have left, but for the weights of those to keep.

    Another worker may be about to finish a better trial: files of unfinished trials stay.  The
    half-written files of a worker that was killed go with the others of its trial.
    """
    for path in Settings.from_env().checkpoints.glob("*trial-*"):
        name = leftover_of(path.name)
        match = re.fullmatch(r"trial-(\d+)(?:\.(state|weights)\.(?:pt|json))?", name)
        if not match or int(match[1]) not in finished:
            continue
        if name == path.name and match[2] != "state" and int(match[1]) in keep:
            continue
        if match[2]:
            path.unlink(missing_ok=True)
        else:
            _remove_folder(path)


def _remove_folder(path: Path) -> None:
    """Remove a trial's folder; what cannot be removed is no reason to lose a trial."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another worker may be removing it, too
        if path.exists():
            log.warning("%s cannot be removed: not wanted any more, remove it by hand", path)
