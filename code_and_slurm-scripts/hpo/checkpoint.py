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
a number goes that changes: progress["best"].  All that can be kept: hpo/saving/states.py.  Random
numbers that are drawn from torch (CPU and GPUs), NumPy or random themselves need no name.

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

On a GPU of its own, a trial goes on while its state is being written, if the writing before took
more than half a second: what is written is a copy in the CPU's memory, of 4 GB at most.  The next
call, and the end of the trial, wait for it, and raise what has gone wrong.

Each file is written whole or not at all (hpo/files.py).  Only tensors and plain values are stored,
and files are read with `weights_only=True`: reading one cannot run code.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from hpo.drain import asked_to_stop
from hpo.saving import background, trial_files
from hpo.saving.states import put_back, put_back_random, random_states, state_of
from hpo.saving.trial_files import State, folder_path, tidy, weights_path
from hpo.settings import Settings, UserError
from hpo.study.upkeep import put_back_reports, waiting_reports, write_at_once
from hpo.words import logger

if TYPE_CHECKING:
    import torch

__all__ = [  # some of hpo/saving/trial_files.py, too: nobody else need know it
    "discard",
    "folder",
    "folder_path",
    "keep_weights",
    "let_end",
    "load",
    "processes",
    "release",
    "save",
    "tidy",
    "wait",
    "weights_path",
]
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
    path = trial_files.state_file(trial.number)
    if not path:
        return []
    state = trial_files.read_state(path)
    things = _named(model, optimizer, others)
    _compare(trial.number, set(things), set(state["states"]))
    for name, thing in things.items():
        put_back(name, thing, state["states"][name])
    put_back_random(state["random"])
    put_back_reports(trial, state.get("reports", {}))
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
        OSError: this state, or the one before, cannot be written; an older one is there still.
    """
    if not trial:
        return
    number, rank = processes()
    if rank:
        return  # of several processes with the same weights (hpo/train/ddp.py) the first writes
    things, epochs = _named(model, optimizer, others), list(losses)

    def content() -> State:
        states = {name: state_of(name, thing) for name, thing in things.items()}
        # What is in no database yet: a worker that is killed would leave a gap in the curve.
        reports = waiting_reports(trial)
        found = {"losses": epochs, "states": states, "random": random_states(), "reports": reports}
        return found if weights is None else {**found, "weights": weights}

    recent = _Clock.number == trial.number and time.monotonic() - _Clock.seconds < every
    if recent and number == 1 and not asked_to_stop():
        _Clock.unsaved = content
        return
    # The worker ends the processes of a trial on several GPUs without asking what they write.
    aside = number == 1 and background.worth_it()
    trial_files.write_state(content(), trial.number, aside)
    _saved(trial.number, None)


def folder(trial: optuna.Trial) -> Path:
    """Return the trial's own folder, made if need be, with what an interrupted run left in it.

    It goes when the trial is finished, but for the best trials (KEEP_BEST).
    """
    write_at_once(trial)
    path = folder_path(Settings.from_env(), trial.number)
    path.mkdir(parents=True, exist_ok=True)
    return path


# ---------- What the plumbing calls ----------


def discard(number: int) -> None:
    """Remove what a trial of a study that is no longer there has left: this one is new."""
    trial_files.remove_all(number)


def wait() -> None:
    """Wait until the last state of the trial is written.  Raises what the writing has raised."""
    background.wait()


def let_end() -> None:
    """The same for a trial that ends otherwise than well: why it does is known already."""
    try:
        background.wait()
    except Exception as error:
        log.warning("the last checkpoint was not written, an older one stays: %s", error)


def keep_weights(number: int) -> None:
    """Turn the last checkpoint of a trial into its weights file.

    Called before the trial is told to be complete, so that a best trial always has its weights.
    An objective that saves no checkpoint, or no tensors, has none.
    """
    if _Clock.unsaved and _Clock.number == number:
        state = _Clock.unsaved()
    elif (path := trial_files.state_file(number)) and path.suffix == ".pt":
        state = trial_files.read_state(path)
    else:
        return
    weights = state.get("weights") or state["states"].get("model")
    if weights is not None and "torch" in sys.modules:
        trial_files.write_tensors(weights, weights_path(Settings.from_env(), number))


def release() -> None:
    """Let go of the objects of the trial that has ended, and of the GPU memory that they hold."""
    _saved(-1, None)


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
