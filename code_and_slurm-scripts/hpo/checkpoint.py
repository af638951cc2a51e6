"""What a trial leaves on disk: its state, from which it goes on, and at the end its weights.

    losses = checkpoint.load(trial, model, optimizer)     [] for a trial that starts afresh
    for epoch in range(len(losses), epochs):
        …
        trial.report(loss, epoch)
        checkpoint.save(trial, model, optimizer, losses)  after each epoch, behind trial.report

Whatever else changes from epoch to epoch is given by a name of your choice, to both alike:

    progress = {"best": math.inf, "patience": 5}
    losses = checkpoint.load(trial, model, optimizer, scheduler=scheduler, progress=progress)
    checkpoint.save(trial, model, optimizer, losses, scheduler=scheduler, progress=progress)

`load` fills these objects in place.  They may be anything with state_dict() and load_state_dict()
(schedulers, GradScaler, an averaged model, a second optimiser), generators of random numbers
(torch.Generator, numpy.random.Generator, random.Random), and dicts of plain values, which is where
a number goes that changes: progress["best"].  All that can be kept: hpo/states.py.  Random numbers
that are drawn from torch (CPU and GPUs), NumPy or random themselves need no name.

    weights=ema.state_dict()    the weights that are kept of a good trial; by default the model's
    every=600                   seconds between two savings, where one takes long.  A worker that is
                                asked to stop saves all the same; one that is killed loses so much.
                                With several GPUs per trial each epoch is saved
    losses=losses, progress=…   without torch: save(trial, losses=losses, progress=progress)

A framework that saves by itself is given a folder, and goes on from what it finds there:

    folder = checkpoint.folder(trial)

Everything lies in checkpoints/study.db/STUDY_NAME/ beside study.db:

    trial-00012.state.pt      while trial 12 is not finished: what was saved last; a trial that was
                              interrupted goes on from here, on any node
    trial-00012.state.json    the same of a script that does not use torch
    trial-00012/              the trial's own folder; kept as long as its weights would be
    trial-00012.weights.pt    the weights of one of the KEEP_BEST best trials so far (of several
                              objectives: of the Pareto front), and nothing else

Each file is written whole or not at all (hpo/files.py).  Only tensors and plain values are stored,
and files are read with `weights_only=True`: reading one cannot run code.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from hpo.drain import asked_to_stop
from hpo.files import leftover_of, whole
from hpo.settings import Settings, UserError
from hpo.states import pack, put_back, put_back_random, random_states, state_of, unpack
from hpo.words import logger

if TYPE_CHECKING:
    import torch

State = dict[str, Any]  # losses, states by name, random, and weights where the script names some
log = logger("hpo.worker")


class _Clock:
    """When the trial of this process was saved last, and what has not been saved since."""

    number = -1  # of the trial
    seconds = 0.0
    unsaved: Callable[[], State] | None = None


# ---------- What a script calls ----------


def load(
    trial: optuna.Trial | None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    **others: Any,
) -> list[float]:
    """Restore an interrupted trial in place and return the losses of its finished epochs.

    A trial that has no checkpoint is left as it is, and `[]` returned.  A resumed trial takes the
    same steps as an uninterrupted one; on a CPU of the same kind its result is the same to the
    last bit.

    Raises:
        UserError: the checkpoint lacks one of these objects, or holds another one.
    """
    if not trial:
        return []
    _saved(trial.number, None)
    path = _state_file(trial.number)
    if not path:
        return []
    state = _read(path)
    things = _named(model, optimizer, others)
    _compare(trial.number, set(things), set(state["states"]))
    for name, thing in things.items():
        put_back(name, thing, state["states"][name])
    put_back_random(state["random"])
    losses: list[float] = state["losses"]
    return losses


def save(
    trial: optuna.Trial | None,
    model: torch.nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    losses: Sequence[float] = (),
    *,
    weights: Mapping[str, Any] | None = None,
    every: float = 0.0,
    **others: Any,
) -> None:
    """Write the state of a trial after `len(losses)` epochs; nothing where `trial` is None.

    Report first: a worker that was frozen, and whose trial another worker goes on with, is told
    so by `trial.report`, and then does not overwrite the other's checkpoint.

    Args:
        trial: the one that runs.
        model: its state_dict is what is kept of a good trial, unless `weights` is given.
        optimizer: of the model.
        losses: of the finished epochs; `load` returns them.
        weights: a state_dict to keep instead of the model's.
        every: seconds between two savings; 0 for each call.
        others: as for `load`, and under the same names.

    Raises:
        UserError: one of these cannot be kept.
    """
    if not trial:
        return
    number, rank = processes()
    if rank:
        return  # of several processes with the same weights (hpo/train/ddp.py) the first writes
    things, epochs = _named(model, optimizer, others), list(losses)

    def content() -> State:
        states = {name: state_of(name, thing) for name, thing in things.items()}
        found = {"losses": epochs, "states": states, "random": random_states()}
        return found if weights is None else {**found, "weights": weights}

    recent = _Clock.number == trial.number and time.monotonic() - _Clock.seconds < every
    if recent and number == 1 and not asked_to_stop():
        _Clock.unsaved = content
        return
    _write(content(), trial.number)
    _saved(trial.number, None)


def folder(trial: optuna.Trial) -> Path:
    """Return the trial's own folder, made if need be, with what an interrupted run left in it.

    It goes when the trial is finished, but for the best trials (KEEP_BEST).
    """
    path = folder_path(Settings.from_env(), trial.number)
    path.mkdir(parents=True, exist_ok=True)
    return path


# ---------- What the plumbing calls ----------


def discard(number: int) -> None:
    """Remove what a trial of a study that is no longer there has left: this one is new."""
    for path in _state_paths(number):
        path.unlink(missing_ok=True)
    _remove_folder(folder_path(Settings.from_env(), number))


def keep_weights(number: int) -> None:
    """Turn the last checkpoint of a trial into its weights file.

    Called before the trial is told to be complete, so that a best trial always has its weights.
    An objective that saves no checkpoint, or no tensors, has none.
    """
    if _Clock.unsaved and _Clock.number == number:
        state = _Clock.unsaved()
    elif (path := _state_file(number)) and path.suffix == ".pt":
        state = _read(path)
    else:
        return
    weights = state.get("weights") or state["states"].get("model")
    if weights is not None and "torch" in sys.modules:
        _write_tensors(weights, weights_path(Settings.from_env(), number))


def release() -> None:
    """Let go of the objects of the trial that has ended, and of the GPU memory that they hold."""
    _saved(-1, None)


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


def weights_path(settings: Settings, number: int) -> Path:
    """Return where the weights of trial `number` are, or would be."""
    return settings.checkpoints / f"trial-{number:05d}.weights.pt"


def folder_path(settings: Settings, number: int) -> Path:
    """Return where the own folder of trial `number` is, or would be."""
    return settings.checkpoints / f"trial-{number:05d}"


# ---------- Names ----------


def _named(model: Any, optimizer: Any, others: dict[str, Any]) -> dict[str, Any]:
    both = {"model": model, "optimizer": optimizer}
    return {**{name: thing for name, thing in both.items() if thing is not None}, **others}


def _compare(number: int, asked: set[str], found: set[str]) -> None:
    for names, what in (
        (asked - found, "lacks {}, which checkpoint.load is given; give it to save, too"),
        (found - asked, "holds {}, which checkpoint.load is not given"),
    ):
        if names:
            what = what.format(" and ".join(sorted(names)))
            raise UserError(
                f"the checkpoint of trial {number} {what} (or was the script edited since?)"
            )


def processes() -> tuple[int, int]:
    """Return how many processes run this trial, and the number of this one."""
    distributed = getattr(sys.modules.get("torch"), "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


def _saved(number: int, unsaved: Callable[[], State] | None) -> None:
    _Clock.number, _Clock.seconds, _Clock.unsaved = number, time.monotonic(), unsaved


# ---------- Files ----------


def _state_path(number: int) -> Path:
    return Settings.from_env().checkpoints / f"trial-{number:05d}.state.pt"


def _state_paths(number: int) -> tuple[Path, Path]:
    path = _state_path(number)
    return path, path.with_suffix(".json")


def _state_file(number: int) -> Path | None:
    """Return the newer one of the two that are there, if any: a script may begin to use torch."""
    there = [path for path in _state_paths(number) if path.exists()]
    return max(there, key=lambda path: path.stat().st_mtime, default=None)


def _read(path: Path) -> State:
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


def _write(state: State, number: int) -> None:
    tensors, plain = _state_paths(number)
    if "torch" in sys.modules:
        _write_tensors({name: pack(value, name) for name, value in state.items()}, tensors)
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


def _write_tensors(content: Mapping[str, Any], path: Path) -> None:
    import torch

    with whole(path) as temporary:
        torch.save(content, temporary)


def _remove_folder(path: Path) -> None:
    """Remove a trial's folder; what cannot be removed is no reason to lose a trial."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)  # another worker may be removing it, too
        if path.exists():
            log.warning("%s cannot be removed: not wanted any more, remove it by hand", path)
