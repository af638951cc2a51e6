#!/usr/bin/env python3
"""Hyperparameter optimisation of a CNN on MNIST: one worker.  COPY AND EDIT THIS FILE.

    python optuna_mnist.py                  one worker, until the study has TOTAL_TRIALS trials
    python optuna_mnist.py --check          in a minute: does it do what a study needs?
    bash run-optuna-local.sh                one worker per GPU (or core) of this machine
    sbatch run-optuna-multinode_Turpan.sh   one worker per GPU on several nodes

You should see one line when a trial starts and one when it has finished:

    … worker 0 on node1: trial 7 started
    … worker 0 on node1: trial 7 complete: 0.0391 after 12.3 s (lr=0.0012 batch_size=64 …); …

Then `python check_best_model.py` shows the best model.

To optimise a model of your own, copy this file (my_model.py), edit the four parts below, run
`python my_model.py --check`, and submit with PY_SCRIPT=my_model.py STUDY_NAME=my_study.  Keep the
three calls that make a trial visible to Optuna after each epoch (trial.report, checkpoint.save,
trial.should_prune).
"""

from __future__ import annotations

from typing import Any

import optuna
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo import Settings, checkpoint, chosen, run_script, run_worker, space_form
from hpo.train import mnist
from hpo.train.training import Trainer, evaluate, fused_adam, pick_device

# ---------- 1. The search space: EDIT ----------


def search_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return one configuration; every `suggest_*` call of the study is in this part.

    Some samplers need another form of the same space; with those that you do not use, leave
    their two functions out.
    """
    if space_form() == "finite":
        return finite_space(trial)
    if space_form() == "numeric":
        return numeric_space(trial)
    return {
        "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True),
        "batch_size": trial.suggest_categorical("batch_size", [16, 32, 64, 128]),
        "conv1_channels": trial.suggest_categorical("conv1_channels", [8, 16, 32, 64]),
        "conv2_channels": trial.suggest_categorical("conv2_channels", [16, 32, 64, 128]),
        "kernel1": trial.suggest_categorical("kernel1", [3, 5, 7]),
        "kernel2": trial.suggest_categorical("kernel2", [3, 5, 7]),
        "fc_dim": trial.suggest_categorical("fc_dim", [64, 128, 256, 512]),
        "epochs": trial.suggest_categorical("epochs", [2, 3, 5]),
        "num_classes": 10,
    }


def finite_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Lists alone, for SAMPLER=grid and bruteforce: these make 3 × 2⁶ = 192 combinations."""
    return {
        "lr": trial.suggest_categorical("lr", [3e-4, 1e-3, 3e-3]),
        "batch_size": trial.suggest_categorical("batch_size", [32, 128]),
        "conv1_channels": trial.suggest_categorical("conv1_channels", [16, 32]),
        "conv2_channels": trial.suggest_categorical("conv2_channels", [32, 64]),
        "kernel1": trial.suggest_categorical("kernel1", [3, 5]),
        "kernel2": trial.suggest_categorical("kernel2", [3, 5]),
        "fc_dim": trial.suggest_categorical("fc_dim", [128, 256]),
        "epochs": trial.suggest_categorical("epochs", [3]),
        "num_classes": 10,
    }


def numeric_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Numbers alone, for SAMPLER=cmaes and gp, which move along an axis from good to better."""
    return {
        "lr": trial.suggest_float("lr", 1e-4, 5e-3, log=True),
        "batch_size": trial.suggest_int("batch_size", 16, 128, step=16),
        "conv1_channels": trial.suggest_int("conv1_channels", 8, 64, step=8),
        "conv2_channels": trial.suggest_int("conv2_channels", 16, 128, step=16),
        "kernel1": trial.suggest_int("kernel1", 3, 7, step=2),
        "kernel2": trial.suggest_int("kernel2", 3, 7, step=2),
        "fc_dim": trial.suggest_int("fc_dim", 64, 512, step=64),
        "epochs": trial.suggest_int("epochs", 2, 5),
        "num_classes": 10,
    }


def known_good() -> list[dict[str, Any]]:
    """What is known to do well: the study's first trials.  Any part of a configuration will do."""
    widths = {"conv1_channels": 32, "conv2_channels": 64, "kernel1": 3, "kernel2": 3, "fc_dim": 128}
    return [{"lr": 1e-3, "batch_size": 128, "epochs": 3, **widths}]


# ---------- 2. The model: EDIT ----------


class CNN(nn.Module):
    """Two convolutions and two linear layers: (n, 1, 28, 28) float32 → (n, num_classes) logits."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        conv1, conv2 = config["conv1_channels"], config["conv2_channels"]
        self.conv1 = nn.Conv2d(1, conv1, config["kernel1"], padding="same")
        self.conv2 = nn.Conv2d(conv1, conv2, config["kernel2"], padding="same")
        self.fc1 = nn.Linear(conv2 * 7 * 7, config["fc_dim"])
        self.fc2 = nn.Linear(config["fc_dim"], config["num_classes"])

    def forward(self, images: Tensor) -> Tensor:
        # Pool first, then ReLU: the same function (both only compare), on a quarter of the values.
        x = functional.relu(functional.max_pool2d(self.conv1(images), 2))
        x = functional.relu(functional.max_pool2d(self.conv2(x), 2))
        x = functional.relu(self.fc1(x.flatten(1)))
        return self.fc2(x)  # type: ignore[no-any-return]


def build_model(config: dict[str, Any]) -> nn.Module:
    """Return the untrained net of one configuration; an exported model is loaded with it, too."""
    return CNN(config)


# ---------- 3. Training one configuration: EDIT ----------


def prepare() -> None:
    """Unpack and check the images: before the first trial, and on every node of a job."""
    mnist.prepare()


def train_model(config: dict[str, Any], trial: optuna.Trial | None = None) -> float:
    """Train one configuration and return its validation loss after the last epoch.

    Args:
        config: what `search_space` returns.
        trial: reports every epoch to Optuna; None trains without it, e.g. in a notebook.

    Raises:
        optuna.TrialPruned: the pruner sees no chance for this configuration.
    """
    device = pick_device()
    torch.manual_seed(trial.number if trial else 0)
    training, validation = mnist.load_training(device, Settings.from_env().train_images)
    model = CNN(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = fused_adam(model, config["lr"])
    trainer = Trainer(model, optimizer, training, config["batch_size"])

    # A trial that was interrupted goes on where it stopped: its finished epochs are in `losses`.
    losses = checkpoint.load(trial, model, optimizer)
    for epoch in range(len(losses), config["epochs"]):
        trainer.train_epoch()
        loss, _ = evaluate(model, validation)
        losses.append(loss)
        if trial:
            trial.report(loss, epoch)
            checkpoint.save(trial, model, optimizer, losses)
            if trial.should_prune():
                raise optuna.TrialPruned
    return losses[-1]


def train_final(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Train on all images that the trials trained on or were judged by; return the weights.

    For check_best_model.py --retrain: once the configuration is chosen, no image is left out.
    """
    device = pick_device()
    torch.manual_seed(seed)
    parts = mnist.load_training(device, Settings.from_env().train_images)
    images = mnist.Images(*(torch.cat(both) for both in zip(*parts, strict=True)))
    model = CNN(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = fused_adam(model, config["lr"])
    trainer = Trainer(model, optimizer, images, config["batch_size"])
    for _ in range(config["epochs"]):
        trainer.train_epoch()
    return dict(model.state_dict())


# ---------- 4. The objective: EDIT ----------


OBJECTIVES = ("loss", "parameters")  # what OBJECTIVES=loss,parameters may name; the first alone


def objective(trial: optuna.Trial) -> float | tuple[float, ...]:
    """Return the number that the study minimises; with OBJECTIVES=loss,parameters, both.

    It is the loss on 10 000 validation images, not the training loss of the published guide: the
    training loss falls with every further epoch and every further channel, so its best trial is
    the one that has learnt its images by heart.  The test images stay unseen until the end.
    """
    config = search_space(trial)
    with torch.device("meta"):  # counts parameters without making them
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    return chosen({"loss": train_model(config, trial), "parameters": parameters})


def test_model(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, float]:
    """Return the scores of trained weights on the test images, for check_best_model.py alone."""
    device = pick_device()
    model = CNN(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.load_state_dict(weights)
    loss, accuracy = evaluate(model, mnist.load_test(device))
    return {"test loss": loss, "test accuracy": accuracy}


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
