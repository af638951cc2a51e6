#!/usr/bin/env python3
"""Hyperparameter optimisation of fine-tuning a language model (LoRA): one worker.  COPY AND EDIT.

MODEL is a folder with a causal language model as transformers saves it: config.json, *.safetensors
and its tokenizer.  Nothing is fetched, so put it where all nodes see it, before the job.  Its own
weights stay as they are; a small adapter is trained beside them.  README.txt (chapter 1) defines
in_image.

    export MODEL=/tmpdir/$USER/my-model DATA=texts.jsonl PY_SCRIPT=optuna_llm.py STUDY_NAME=llm
    sbatch run-optuna-multinode_Turpan.sh
    in_image python check_best_model.py

DATA is UTF-8 with one object per line: {"text": "…"}, or {"prompt": "…", "answer": "…"}, of which
the answer alone is learnt.  80 % of the lines are for training, 10 % for validation, 10 % for the
test, drawn by a hash.  Without DATA the model learns to spell out numbers in French.

What is minimised is the loss per token of the validation's texts, or answers; a trial's value and
its weights are those of its best evaluation.  At the end you should see

    test loss       …
    perplexity      …

and `in_image python check_best_model.py --export best` writes the best adapter to best/adapter/:

    AutoModelForCausalLM.from_pretrained("best/adapter")     with transformers and peft

On a laptop SMALL=1 takes a tiny model of random weights, made here, and a small space.  These six
trials take about two minutes on two cores:

    SMALL=1 PY_SCRIPT=optuna_llm.py STUDY_NAME=llm TOTAL_TRIALS=6 bash run-optuna-local.sh

A trial that runs out of memory is FAIL, and says what to lower.  micro_batch of batch_size is
computed at once, so that a smaller one needs less of it.  The search space is made for a model of
7 billion parameters and a GPU with 80 GB; neither its memory nor its time is measured yet.
GPUS_PER_TRIAL=2 trains each model on both GPUs of a node (OWN_MODEL.txt, chapter 6).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
import torch
from torch import Tensor

from hpo import Settings, checkpoint, ddp, run_script, run_worker
from hpo.train import base_model, causal
from hpo.train.texts import Row, load_texts
from hpo.train.training import gpu_has_bf16, pick_device

NEEDS = ("transformers", "peft", "accelerate")  # what pip installs beside torch

# ---------- 1. The search space: EDIT ----------


def search_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return one configuration; every `suggest_*` call of the study is in this part."""
    settings = Settings.from_env()
    space = small_space(trial) if settings.small else large_space(trial)
    return {**space, "model": str(base_model.base_folder(settings)), "targets": "all-linear"}


def large_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Without SMALL."""
    return {
        "rank": trial.suggest_categorical("rank", [4, 8, 16, 32, 64]),
        "alpha": trial.suggest_categorical("alpha", [8, 16, 32, 64]),
        "lr": trial.suggest_float("lr", 1e-5, 1e-3, log=True),
        "warmup": trial.suggest_float("warmup", 0.0, 0.1),  # share of all steps
        "dropout": trial.suggest_float("dropout", 0.0, 0.1, step=0.05),  # of the adapter's input
        "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.3),
        "length": 1024,  # tokens of an example, at most
        "epochs": 3,
        "evaluations": 12,  # in all; after each one the trial may be pruned, or interrupted
        "validation": 1000,  # examples, at most
        "batch_size": 16,  # of every trial …
        "micro_batch": 4,  # … and what a GPU computes at once
        "checkpointing": True,  # computes a part twice, to need less memory
    }


def small_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """SMALL=1: a study for two CPU cores and a few minutes."""
    return {
        "rank": trial.suggest_categorical("rank", [2, 4, 8, 16]),
        "alpha": trial.suggest_categorical("alpha", [8, 16, 32]),
        "lr": trial.suggest_float("lr", 1e-3, 3e-2, log=True),
        "warmup": trial.suggest_float("warmup", 0.05, 0.2),
        "dropout": trial.suggest_float("dropout", 0.0, 0.1, step=0.05),
        "weight_decay": trial.suggest_float("weight_decay", 0.0, 0.3),
        "length": 96,
        "epochs": 1,
        "evaluations": 4,
        "validation": 200,
        "batch_size": 32,
        "micro_batch": 16,
        "checkpointing": False,
    }


# ---------- 2. The model, and what it is given: EDIT ----------


def build_model(config: dict[str, Any]) -> Any:
    """Return the model with a new adapter; an exported one is loaded with it, too."""
    from peft import LoraConfig

    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config["rank"],
        lora_alpha=config["alpha"],
        lora_dropout=config["dropout"],
        target_modules=config["targets"],
    )
    return base_model.with_adapter(
        base_model.load_base(config["model"], config["checkpointing"]), lora
    )


def tokens(row: Row, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that the model is given, and those that it has to write.

    Where the tokenizer has a template for chats, the prompt is a user's message in it.
    """
    answer = row.get("text") or row["answer"]
    written = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    prompt, in_template = row.get("prompt", ""), bool("prompt" in row and tokenizer.chat_template)
    if in_template:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(prompt, add_special_tokens=not in_template)["input_ids"], written


def part(name: str, config: dict[str, Any]) -> list[causal.Example]:
    """Return the examples of "training", "validation" or "test", tokenised once per worker."""
    return causal.examples(name, tokens, config["model"], config["length"])


# ---------- 3. Training one configuration: EDIT ----------


def prepare() -> None:
    """Check what can be wrong before the first trial: GPUs, the model's folder, and the texts.

    Raises:
        UserError: something is.
    """
    ddp.check_gpus()
    base_model.prepare_base(Settings.from_env())
    load_texts(Settings.from_env())


def make_trainer(
    config: dict[str, Any],
    folder: Path | str,
    training: list[causal.Example],
    seed: int = 0,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Return the Trainer of one configuration; it evaluates and saves if it is given callbacks."""
    from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainingArguments

    # An evaluation stands for the same share of all steps, whatever the data.
    examples = config["batch_size"] * config["evaluations"]
    each = math.ceil(config["epochs"] * len(training) / examples)
    steps = each * config["evaluations"]
    gpu_batch = config["batch_size"] // ddp.processes()
    arguments = TrainingArguments(
        str(folder),
        seed=seed,
        max_steps=steps,
        learning_rate=config["lr"],
        lr_scheduler_type="cosine",
        warmup_steps=round(config["warmup"] * steps),
        weight_decay=config["weight_decay"],
        per_device_train_batch_size=min(config["micro_batch"], gpu_batch),
        per_device_eval_batch_size=config["micro_batch"],
        gradient_accumulation_steps=max(1, gpu_batch // config["micro_batch"]),
        bf16=gpu_has_bf16(pick_device()),
        eval_strategy="steps" if callbacks else "no",
        save_strategy="steps" if callbacks else "no",
        eval_steps=each,
        save_steps=each,
        load_best_model_at_end=bool(callbacks),
        metric_for_best_model="eval_loss_per_token",
        greater_is_better=False,
        **causal.TRAINER_OPTIONS,
    )
    trainer = Trainer(
        build_model(config),
        arguments,
        DataCollatorForSeq2Seq(base_model.tokenizer_of(config["model"])),
        training,
        part("validation", config)[: config["validation"]],
        callbacks=list(callbacks),
        compute_metrics=causal.loss_per_token,
        preprocess_logits_for_metrics=causal.token_losses,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_model(config: dict[str, Any], trial: optuna.Trial) -> float:
    """Fine-tune one configuration and return its best validation loss per token.

    Raises:
        optuna.TrialPruned: the pruner sees no chance for this configuration.
    """
    from hpo.loops.huggingface import StudyCallback, last_checkpoint

    seed, folder = trial.number, checkpoint.folder(trial)
    torch.manual_seed(seed)
    callback = StudyCallback(trial, "eval_loss_per_token", weights=base_model.adapter_of)
    with causal.says_what_to_lower(config, "micro_batch", "length", "rank"):
        trainer = make_trainer(config, folder, part("training", config), seed, [callback])
        trainer.train(resume_from_checkpoint=last_checkpoint(trial))
    return float(trainer.state.best_metric)


def train_final(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Fine-tune on all texts but the test's; return the adapter.  For --retrain."""
    torch.manual_seed(seed)
    texts = part("training", config) + part("validation", config)
    with TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder, texts, seed)
        trainer.train()
    return base_model.adapter_of(trainer.model)


# ---------- 4. The objective: EDIT ----------


def objective(trial: optuna.Trial) -> float:
    """Return the number that the study minimises."""
    return ddp.together(train_model, search_space(trial), trial)


def test_model(config: dict[str, Any], weights: dict[str, Tensor]) -> dict[str, float]:
    """Return the scores of a trained adapter on unseen texts, for check_best_model.py alone."""
    with TemporaryDirectory() as folder:
        trainer = make_trainer(config, folder, part("training", config))
        trainer.model.load_state_dict(weights)
        loss = trainer.evaluate(part("test", config)[:1000])["eval_loss_per_token"]
    return {"test loss": loss, "perplexity": math.exp(loss)}


def export_model(config: dict[str, Any], weights: dict[str, Tensor], folder: Path) -> None:
    """Write the adapter as peft and transformers load it, with the tokenizer, for --export."""
    model = build_model(config)
    model.load_state_dict(weights)
    model.save_pretrained(folder / "adapter")
    base_model.tokenizer_of(config["model"]).save_pretrained(folder / "adapter")


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
