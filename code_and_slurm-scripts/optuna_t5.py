#!/usr/bin/env python3
"""Hyperparameter optimisation of T5, an encoder-decoder transformer: one worker.  COPY AND EDIT.

The network, of 29 to 705 million parameters, is trained from nothing to spell out numbers in
French, byte by byte: 1984 → mille neuf cent quatre-vingt-quatre.  It has the four parts of
optuna_mnist.py, and besides them warm-up, dropout, gradient clipping, and bf16 where the GPU has
it.  What requirements-container.txt installs is all that it needs, and it fetches nothing: no
weights, no tokeniser.  README.txt (chapter 1) defines in_image.

    PY_SCRIPT=optuna_t5.py STUDY_NAME=t5 sbatch run-optuna-multinode_Turpan.sh
    STUDY_NAME=t5 in_image python check_best_model.py

You should see the same lines as of optuna_mnist.py, and at the end the share of unseen numbers
that the best network spells without a mistake:

    exact match     …

Give it more than ten minutes (--time in the script): the search space is made for an A100 with
80 GB (its largest nets need at most 41 GB, counted in float32 without a GPU), and the time is not
measured yet.  On a laptop SMALL=1 takes a small space:

    SMALL=1 PY_SCRIPT=optuna_t5.py STUDY_NAME=t5 TOTAL_TRIALS=6 bash run-optuna-local.sh

These six trials take three to four minutes on two free cores, and ended with 0.9970: of 1 000
unseen numbers below 10 000 it spelt 997 without a mistake.

Your own pairs of texts, UTF-8, one input<TAB>output per line, in this folder:

    DATA=pairs.tsv PY_SCRIPT=optuna_t5.py STUDY_NAME=pairs sbatch run-optuna-multinode_Turpan.sh

A pair's part (80 % for training, 10 % for validation, 10 % for the test) comes from a hash of its
input, so it is the same on every machine.  A study remembers DATA and SMALL, and refuses others.

batch_size is the same for every trial; micro_batch of it is computed at once, and the gradients
are added up, so that a smaller one needs less memory and changes no result.  GPUS_PER_TRIAL=2
trains each network on both GPUs of a node (OWN_MODEL.txt, chapter 6).
"""

from __future__ import annotations

from typing import Any

import optuna
import torch
from torch import Tensor, nn

from hpo import Settings, UserError, checkpoint, chosen, ddp, run_script, run_worker
from hpo.packages import pip_command
from hpo.train.pairs import Pair, load_pairs
from hpo.train.seq2seq import (
    VOCABULARY,
    batches,
    evaluate,
    exact_match,
    micro_batches,
    summed_loss,
    targets,
)
from hpo.train.training import fused_adam, pick_device

NEEDS = "transformers"  # what pip installs beside torch and Optuna

# ---------- 1. The search space: EDIT ----------


def search_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return one configuration; every `suggest_*` call of the study is in this part.

    As in every published T5 a head is `d_kv` wide, whatever the hidden size: so every number of
    heads fits every hidden size.
    """
    if Settings.from_env().small:
        return small_space(trial)
    d_model = trial.suggest_categorical("d_model", [512, 768, 1024])
    return {
        "d_model": d_model,
        "num_layers": trial.suggest_int("num_layers", 4, 24),  # in the encoder and in the decoder
        "num_heads": trial.suggest_categorical("num_heads", [8, 12, 16]),
        "lr": trial.suggest_float("lr", 1e-6, 1e-4, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.2, step=0.05),
        "warmup": trial.suggest_float("warmup", 0.02, 0.2),  # share of all steps
        "d_kv": 64,
        "epochs": 10,
        "batch_size": 256,  # of every trial …
        "micro_batch": {512: 256, 768: 128, 1024: 64}[d_model],  # … and what is computed at once
    }


def small_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """SMALL=1: a study for two CPU cores and a few minutes."""
    return {
        "d_model": trial.suggest_categorical("d_model", [64, 96, 128]),
        "num_layers": trial.suggest_int("num_layers", 1, 3),
        "num_heads": trial.suggest_categorical("num_heads", [2, 4, 8]),
        "lr": trial.suggest_float("lr", 1e-3, 1e-2, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.1, step=0.05),
        "warmup": trial.suggest_float("warmup", 0.05, 0.2),
        "d_kv": 16,
        "epochs": 5,
        "batch_size": 64,
        "micro_batch": 64,
    }


def known_good() -> list[dict[str, Any]]:
    """T5-small, but for its learning rate: the study's first trial; the small space has none."""
    t5_small = {"d_model": 512, "num_layers": 6, "num_heads": 8, "lr": 1e-4, "dropout": 0.1}
    return [] if Settings.from_env().small else [t5_small]


# ---------- 2. The model: EDIT ----------


def build_model(config: dict[str, Any]) -> nn.Module:
    """Return the untrained net of one configuration; an exported model is loaded with it, too.

    Raises:
        UserError: without `d_kv`, a head is d_model / num_heads wide, and that is no integer.
    """
    from transformers import T5Config, T5ForConditionalGeneration

    d_model, num_heads = config["d_model"], config["num_heads"]
    if "d_kv" not in config and d_model % num_heads:
        raise UserError(f"num_heads={num_heads} does not divide d_model={d_model}; give d_kv, too")
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY,
            d_model=d_model,
            d_kv=config.get("d_kv", d_model // num_heads),
            d_ff=4 * d_model,
            num_layers=config["num_layers"],
            num_heads=num_heads,
            dropout_rate=config["dropout"],
            decoder_start_token_id=0,  # type: ignore[call-arg]  # it is PAD
        )
    )


# ---------- 3. Training one configuration: EDIT ----------


def prepare() -> None:
    """Check what can be wrong before the first trial: packages, GPUs, and the pairs.

    Raises:
        UserError: something is.
    """
    from transformers.utils import is_torch_available  # type: ignore[attr-defined]

    if not is_torch_available():  # transformers 5 ignores a torch older than 2.4
        wanted = pip_command(NEEDS)
        raise UserError(f"this transformers is too new for torch {torch.__version__}; {wanted}")
    # Now, because torch 2.6 cannot import it where the parameters are counted, on device "meta".
    from transformers import T5ForConditionalGeneration  # noqa: F401

    ddp.check_gpus()
    load_pairs(Settings.from_env())


def train_model(config: dict[str, Any], trial: optuna.Trial | None = None) -> float:
    """Train one configuration and return its validation loss per token after the last epoch.

    Args:
        config: what `search_space` returns.
        trial: reports every epoch to Optuna; None trains without it, e.g. in a notebook.

    Raises:
        optuna.TrialPruned: the pruner sees no chance for this configuration.
    """
    pairs = load_pairs(Settings.from_env())
    seed = trial.number if trial else 0
    torch.manual_seed(seed)
    model = build_model(config).to(pick_device())
    optimizer = fused_adam(model, config["lr"])

    # A trial that was interrupted goes on where it stopped: its finished epochs are in `losses`.
    losses = checkpoint.load(trial, model, optimizer)
    parallel = ddp.parallel(model)
    for epoch in range(len(losses), config["epochs"]):
        train_epoch(parallel, optimizer, pairs.training, config, epoch, seed)
        losses.append(evaluate(model, pairs.validation))
        if trial:
            trial.report(losses[-1], epoch)
            checkpoint.save(trial, model, optimizer, losses)
            if trial.should_prune():
                raise optuna.TrialPruned
    return losses[-1]


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: list[Pair],
    config: dict[str, Any],
    epoch: int,
    seed: int,
) -> None:
    """Train on every pair once; each step is one batch of `batch_size` pairs, on all GPUs.

    The gradients of its micro-batches add up to those of the whole batch, however it is divided.
    """
    model.train()
    # Dropout must differ between the processes, and be the same after a resume.
    torch.manual_seed((seed * 1000 + epoch) * 100 + ddp.rank())
    epoch_batches = batches(training, config["batch_size"], seed, epoch)
    for step, batch in enumerate(epoch_batches, epoch * len(epoch_batches)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, config["epochs"] * len(epoch_batches))
        optimizer.zero_grad()
        scale = ddp.processes() / targets(batch)  # DDP takes the mean of the processes' gradients
        for micro, last in micro_batches(batch, config["micro_batch"]):
            with ddp.synchronised(model, last):
                (summed_loss(model, micro) * scale).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def learning_rate(config: dict[str, Any], step: int, steps: int) -> float:
    """Return the rate of a step: up to `lr` in the warm-up's steps, then down towards 0.

    Computed from the step's number alone, so that a resumed trial needs no scheduler's state.
    """
    warmup = max(1, round(config["warmup"] * steps))
    factor = min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    return float(config["lr"] * factor)


def train_final(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Train on all pairs that the trials trained on or were judged by; return the weights.

    For check_best_model.py --retrain: once the configuration is chosen, no pair is left out.
    """
    pairs = load_pairs(Settings.from_env())
    torch.manual_seed(seed)
    model = build_model(config).to(pick_device())
    optimizer = fused_adam(model, config["lr"])
    for epoch in range(config["epochs"]):
        train_epoch(model, optimizer, pairs.training + pairs.validation, config, epoch, seed)
    return dict(model.state_dict())


# ---------- 4. The objective: EDIT ----------


OBJECTIVES = ("loss", "parameters")  # what OBJECTIVES=loss,parameters may name; the first alone


def objective(trial: optuna.Trial) -> float | tuple[float, ...]:
    """Return the number that the study minimises; with OBJECTIVES=loss,parameters, both."""
    config = search_space(trial)
    with torch.device("meta"):  # counts parameters without making them
        parameters = sum(parameter.numel() for parameter in build_model(config).parameters())
    loss = ddp.together(train_model, config, trial)
    return chosen({"loss": loss, "parameters": parameters})


def test_model(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, float]:
    """Return the scores of trained weights on unseen pairs, for check_best_model.py alone."""
    model = build_model(config).to(pick_device())
    model.load_state_dict(weights)
    test = load_pairs(Settings.from_env()).test[:1000]
    return {"test loss": evaluate(model, test), "exact match": exact_match(model, test)}


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
