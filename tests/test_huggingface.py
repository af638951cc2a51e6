"""Hugging Face's Trainer as an objective: the same result after each interruption."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy
import optuna
import pytest
import torch
from optuna.trial import TrialState
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from hpo import checkpoint
from hpo.drain import Drain, Drained
from hpo.loops.huggingface import StudyCallback, last_checkpoint
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study
from hpo.trial import run_trial

EPOCHS = 4


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    """Return the test's study."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return create_or_open_study(Settings.from_env())


class Texts(torch.utils.data.Dataset[dict[str, Any]]):
    """Sequences of eight tokens, each the next number after the last."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.number:
            raise IndexError
        tokens = torch.arange(index, index + 8) % 32
        return {"input_ids": tokens, "labels": tokens}


def train(trial: optuna.Trial, **changes: Any) -> float:
    """Train a tiny language model with dropout, a schedule and gradient accumulation."""
    torch.manual_seed(0)
    sizes: Any = {"vocab_size": 32, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    options: dict[str, Any] = {
        "num_train_epochs": EPOCHS,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "save_only_model": True,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(checkpoint.folder(trial)), **{**options, **changes})
    callback = StudyCallback(trial, "eval_loss")
    trainer = Trainer(
        model, arguments, train_dataset=Texts(64), eval_dataset=Texts(32), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=last_checkpoint(trial))
    return callback.value


STEPS = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3}


@pytest.mark.parametrize("changes", [{}, {**STEPS, "max_steps": 12}], ids=["epochs", "mid-epoch"])
def test_trial_that_is_interrupted_at_each_saving(
    changes: dict[str, Any], study: optuna.Study
) -> None:
    def objective(trial: optuna.Trial) -> float:
        return train(trial, **changes)

    whole = study.ask()
    whole.suggest_float("x", 0, 1)
    run_trial(study, whole, objective, Drain(float("inf")))
    first = study.get_trials()[0]
    assert first.state == TrialState.COMPLETE, first.user_attrs
    assert list(first.intermediate_values) == list(range(EPOCHS))
    assert len(set(first.intermediate_values.values())) == EPOCHS
    assert first.value == first.intermediate_values[EPOCHS - 1]

    study.ask().suggest_float("x", 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        for seed in range(EPOCHS):
            torch.manual_seed(seed)
            numpy.random.seed(seed)
            random.seed(seed)
            with pytest.raises(Drained):
                objective(optuna.Trial(study, 2))
            found = study.get_trials()[1].intermediate_values
            assert list(found) == list(range(seed + 1))
    run_trial(study, optuna.Trial(study, 2), objective, Drain(float("inf")))
    second = study.get_trials()[1]
    assert second.intermediate_values == first.intermediate_values
    assert second.value == first.value
    paths = [checkpoint.weights_path(Settings.from_env(), number) for number in (0, 1)]
    one, other = (torch.load(path, weights_only=True) for path in paths)
    assert all(torch.equal(one[name], other[name]) for name in one)


def drained(trial: optuna.Trial) -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def test_pruned(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    run_trial(study, trial, train, Drain(float("inf")))
    [found] = study.get_trials()
    assert found.state == TrialState.PRUNED
    assert list(found.intermediate_values) == [0]
    assert not list(Settings.from_env().checkpoints.iterdir())


def test_half_written_checkpoint_does_not_count(study: optuna.Study) -> None:
    trial = study.ask()
    assert last_checkpoint(trial) is None
    for step, complete in ((8, True), (12, True), (100, False)):
        folder = checkpoint.folder(trial) / f"checkpoint-{step}"
        folder.mkdir()
        if complete:
            (folder / "study.pt").touch()
    assert Path(last_checkpoint(trial) or "").name == "checkpoint-12"


def test_steps_count_evaluations(study: optuna.Study) -> None:
    """Not steps of the optimiser, of which a trial with small batches has more."""
    trial = study.ask()
    at = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    train(trial, max_steps=6, **at)
    assert list(study.get_trials()[0].intermediate_values) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"save_strategy": "no"}, "evaluate and save at the same times"),
        ({"save_strategy": "steps", "save_steps": 5}, "evaluate and save at the same times"),
        ({"save_total_limit": 1}, "save_total_limit must be 2 at least"),
        ({"save_only_model": False}, "save_only_model=True"),
    ],
)
def test_arguments_with_which_no_trial_goes_on(
    changes: dict[str, Any], says: str, study: optuna.Study
) -> None:
    with pytest.raises(UserError, match=says):
        train(study.ask(), **changes)
