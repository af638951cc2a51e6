"""A script as people write them.  HOW: what its trial 1 does that a CUDA graph, or a GPU, minds.

item, mask, tensor   its forward pass waits for the GPU, so that it cannot be recorded
adamw                its optimiser counts on the host
memory, assert       it asks for too much memory; it makes the GPU fail for good
die                  its first process is killed after the first epoch
"""

from __future__ import annotations

import os
import signal
from typing import Any

import optuna
import torch
from torch import Tensor, nn

from hpo import Settings, checkpoint, run_script, run_worker
from hpo.train import mnist
from hpo.train.training import Trainer, evaluate, fused_adam, pick_device
from optuna_mnist import CNN

CONFIG = {
    "conv1_channels": 8,
    "conv2_channels": 16,
    "kernel1": 3,
    "kernel2": 3,
    "fc_dim": 64,
    "batch_size": 64,
    "num_classes": 10,
    "epochs": 3,
}


def search_space(trial: optuna.Trial) -> dict[str, Any]:
    """Return one configuration."""
    return {
        **CONFIG,
        "lr": trial.suggest_float("lr", 5e-4, 2e-3, log=True),
        "dropout": trial.suggest_categorical("dropout", [0.1]),
    }


class Net(nn.Module):
    """The example's net with dropout, and with what HOW says in its forward pass."""

    def __init__(self, config: dict[str, Any], how: str) -> None:
        super().__init__()
        self.how, self.dropout, self.cnn = how, nn.Dropout(config["dropout"]), CNN(config)

    def forward(self, images: Tensor) -> Tensor:
        if self.training and self.how == "item":
            images = images * (1 + 0 * images.mean().item())
        if self.training and self.how == "mask":
            images = images[images.amax((1, 2, 3)) > -1e9]
        if self.training and self.how == "tensor":
            images = images * torch.tensor(1.0, device=images.device)
        if self.training and self.how == "memory":
            torch.empty(10**13, device=images.device)
        if self.training and self.how == "assert":
            beyond = images.flatten()[:1].long() + 10**6
            images = images + torch.zeros(3, device=images.device)[beyond]
        return self.cnn(self.dropout(images))  # type: ignore[no-any-return]


def train_model(config: dict[str, Any], trial: optuna.Trial) -> float:
    """Train one configuration; return its validation loss."""
    how = os.environ.get("HOW", "") if trial.number == 1 else ""
    device = pick_device()
    torch.manual_seed(trial.number)
    training, validation = mnist.load_training(device, Settings.from_env().train_images)
    model = Net(config, how).to(device)
    optimizer: torch.optim.Optimizer = fused_adam(model, config["lr"])
    if how == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    trainer = Trainer(model, optimizer, training, config["batch_size"])
    losses = checkpoint.load(trial, model, optimizer)
    for epoch in range(len(losses), config["epochs"]):
        trainer.train_epoch()
        losses.append(evaluate(model, validation)[0])
        trial.report(losses[-1], epoch)
        checkpoint.save(trial, model, optimizer, losses)
        if trial.should_prune():
            raise optuna.TrialPruned
        if how == "die" and epoch == 0:
            os.kill(os.getpid(), signal.SIGTERM)  # returns the trial; the job goes on elsewhere
    print(f"recorded: {trainer.captured.graph is not None}", flush=True)
    return losses[-1]


def objective(trial: optuna.Trial) -> float:
    """Return the validation loss."""
    return train_model(search_space(trial), trial)


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
