"""A training whose result depends on everything that changes from epoch to epoch.

Run by test_checkpoint.py.  INTERRUPT=1 asks the worker to stop in each epoch; LEAVE_OUT names what
is not given to the checkpoint.
"""

from __future__ import annotations

import math
import os
import random
import signal
from typing import Any

import numpy
import optuna
import torch
from torch import nn

from hpo import checkpoint, run_script, run_worker

EPOCHS = 4
CHANGES = (
    *("cosine", "momentum", "step", "average", "scaler"),
    *("generator", "numbers", "dice", "progress"),
)


def everything(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the objects that training changes, by name, as they are at its start."""
    momentum = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return {
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS),
        "momentum": momentum,
        "step": torch.optim.lr_scheduler.MultiStepLR(momentum, [2]),
        "average": torch.optim.swa_utils.AveragedModel(model),
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "generator": torch.Generator().manual_seed(1),
        "numbers": numpy.random.default_rng(1),
        "dice": random.Random(1),
        "progress": {"best": math.inf, "since": 0, "sums": numpy.zeros(2, numpy.float32)},
    }


def epoch_of(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> float:
    """Train for an epoch; every random source and every object takes part in the loss."""
    shift = random.random() + float(numpy.random.rand())
    shift += float(state["numbers"].random()) + state["dice"].random()
    for _ in range(3):
        images = torch.randn(8, 4, generator=state["generator"])
        optimizer.zero_grad()
        loss = (model(images) - shift).square().mean()
        state["scaler"].scale(loss).backward()
        state["scaler"].step(optimizer)
        state["scaler"].update()
    state["average"].update_parameters(model)
    state["cosine"].step()
    state["momentum"].step()
    state["step"].step()
    progress = state["progress"]
    better = loss.item() < progress["best"]
    progress.update(best=min(progress["best"], loss.item()), since=progress["since"] + better)
    progress["sums"] += shift
    average = sum(parameter.sum().item() for parameter in state["average"].parameters())
    rates = state["step"].get_last_lr()[0] + state["cosine"].get_last_lr()[0]
    return float(loss.item() + average + rates + progress["best"] + progress["sums"].sum())


def train_model(config: dict[str, Any], trial: optuna.Trial) -> float:
    """Train, and return a number that any difference on the way has changed."""
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=config["lr"])
    state = everything(model, optimizer)
    kept = {name: thing for name, thing in state.items() if name != os.environ.get("LEAVE_OUT")}
    losses = checkpoint.load(trial, model, optimizer, **kept)
    for epoch in range(len(losses), EPOCHS):
        losses.append(epoch_of(model, optimizer, state))
        if os.environ.get("INTERRUPT"):
            os.kill(os.getpid(), signal.SIGUSR1)
        trial.report(losses[-1], epoch)
        checkpoint.save(
            trial, model, optimizer, losses, weights=state["average"].module.state_dict(), **kept
        )
        if trial.should_prune():
            raise optuna.TrialPruned
    return losses[-1]


def objective(trial: optuna.Trial) -> float:
    """Train with the one parameter."""
    return train_model({"lr": trial.suggest_float("lr", 0.01, 0.1)}, trial)


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
