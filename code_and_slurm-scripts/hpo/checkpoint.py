"""What a trial leaves on disk: its state after each epoch, and at the end its weights.

    losses = checkpoint.load(trial, model, optimizer)     [] for a trial that starts afresh
    checkpoint.save(trial, model, optimizer, losses)      after each epoch, behind trial.report

Everything lies in checkpoints/study.db/STUDY_NAME/ beside study.db:

    trial-00012.state.pt      while trial 12 is not finished: model, optimiser, torch's random
                              states, losses; a trial that was interrupted goes on from here
    trial-00012.weights.pt    the state_dict of one of the KEEP_BEST best trials so far (of several
                              objectives: of the Pareto front), and nothing else

Each file is written whole or not at all (hpo/files.py).  Only tensors and numbers are stored, and
files are read with `weights_only=True`: reading one cannot run code.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna

from hpo.files import leftover_of, whole
from hpo.settings import Settings

if TYPE_CHECKING:
    import torch


def load(
    trial: optuna.Trial | None, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> list[float]:
    """Restore an interrupted trial in place and return the losses of its finished epochs.

    A trial that has no checkpoint is left as it is, and `[]` returned.  Because torch's random
    states are restored too, a resumed trial takes the same steps as an uninterrupted one; on a CPU
    of the same kind its result is the same to the last bit.
    """
    path = _state_path(trial.number) if trial else None
    if not trial or not path or not path.exists():
        return []
    import torch

    state = torch.load(path, map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    # How a step is computed is this machine's business: a trial may go on from GPU to CPU.
    for saved, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True):
        saved.update({key: own[key] for key in ("fused", "capturable", "foreach") if key in own})
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["cpu_rng"])
    if "cuda_rng" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda_rng"])
    losses: list[float] = state["losses"]
    return losses


def save(
    trial: optuna.Trial | None,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    losses: Sequence[float],
) -> None:
    """Write the state of a trial after `len(losses)` epochs; nothing where `trial` is None.

    Report first: a worker that was frozen, and whose trial another worker goes on with, is told
    so by `trial.report`, and then does not overwrite the other's checkpoint.
    """
    if not trial:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized() and distributed.get_rank():
        return  # of several processes with the same weights (hpo/train/ddp.py) the first writes
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "losses": list(losses),
    }
    if torch.cuda.is_available():
        state["cuda_rng"] = torch.cuda.get_rng_state()
    _write(state, _state_path(trial.number))


def discard(number: int) -> None:
    """Remove the checkpoint of a trial that is new: a study left it that is no longer there."""
    _state_path(number).unlink(missing_ok=True)


def keep_weights(number: int) -> None:
    """Turn the last checkpoint of a trial into its weights file.

    Called before the trial is told to be complete, so that a best trial always has its weights.
    An objective that saves no checkpoint has none.
    """
    state = _state_path(number)
    if state.exists():
        import torch

        weights = torch.load(state, map_location="cpu", weights_only=True)["model"]
        _write(weights, weights_path(Settings.from_env(), number))


def tidy(finished: Container[int], keep: Container[int]) -> None:
    """Remove what finished trials (their numbers) have left, but for the weights of those to keep.

    Another worker may be about to finish a better trial: files of unfinished trials stay.  The
    half-written files of a worker that was killed go with the others of its trial.
    """
    for path in Settings.from_env().checkpoints.glob("*trial-*"):
        match = re.fullmatch(r"trial-(\d+)\.(state|weights)\.pt", leftover_of(path.name))
        if not match or int(match[1]) not in finished:
            continue
        if leftover_of(path.name) != path.name or match[2] == "state" or int(match[1]) not in keep:
            path.unlink(missing_ok=True)


def weights_path(settings: Settings, number: int) -> Path:
    """Return where the weights of trial `number` are, or would be."""
    return settings.checkpoints / f"trial-{number:05d}.weights.pt"


def _state_path(number: int) -> Path:
    return Settings.from_env().checkpoints / f"trial-{number:05d}.state.pt"


def _write(content: dict[str, Any], path: Path) -> None:
    import torch

    with whole(path) as temporary:
        torch.save(content, temporary)
