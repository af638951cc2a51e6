"""Hugging Face's Trainer as an objective: it reports, is pruned, and resumes at the right step.

    arguments = TrainingArguments(
        checkpoint.folder(trial), eval_strategy="epoch", save_strategy="epoch",
        save_only_model=True, save_total_limit=2, …
    )
    callback = StudyCallback(trial, "eval_loss")
    trainer = Trainer(model, arguments, …, callbacks=[callback])
    trainer.train(resume_from_checkpoint=last_checkpoint(trial))
    return callback.value

After each evaluation the metric is reported; after the saving that follows, the trial may be
pruned, or go back to the queue because its worker has to stop.  So evaluate and save at the same
times.  The Trainer saves the model, the callback what else changes (optimiser, schedule, random
numbers): that of the Trainer is not read again with a torch older than 2.6, as in Turpan's image.
Of the checkpoints two at least are kept: one that was being written when the worker died does not
count.  The weights that are kept of a good trial are those at the end of the training; with
load_best_model_at_end=True the best, whose metric is then trainer.state.best_metric.

With several GPUs to a trial the same lines are in a function that ddp.together runs: in each of its
processes the Trainer finds itself as it does under torchrun.

On a CPU a trial that goes on ends with the same value to the last digit.  With fp16 the scale of
the loss begins anew; bf16 has none.  The script needs NEEDS = ("transformers", "accelerate").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import distributed
from transformers import TrainerCallback

from hpo import checkpoint
from hpo.files import whole
from hpo.saving.states import pack, put_back, put_back_random, random_states, state_of, unpack
from hpo.settings import UserError

STATE = "study.pt"  # in a checkpoint's folder: written last, so that the folder is whole with it
CHANGES = ("optimizer", "lr_scheduler")  # what the Trainer shows of itself to a callback


def last_checkpoint(trial: optuna.Trial) -> str | None:
    """Return the newest whole checkpoint in the trial's folder; None for a trial that is new."""
    found = [path.parent for path in checkpoint.folder(trial).glob(f"checkpoint-*/{STATE}")]
    newest = max(found, key=lambda path: int(path.name.split("-")[1]), default=None)
    return str(newest) if newest else None


class StudyCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Connects a Trainer with a trial; `value` is the last metric that was reported."""

    def __init__(
        self,
        trial: optuna.Trial,
        metric: str = "eval_loss",
        weights: Callable[[Any], Mapping[str, Any]] | None = None,
    ) -> None:
        """Prepare.

        Args:
            trial: the one that runs.
            metric: one of those that the Trainer's evaluation returns.
            weights: what to keep of the model, e.g. peft's get_peft_model_state_dict; by default
                its state_dict.
        """
        self.trial, self.metric, self.value = trial, metric, math.nan
        self._weights = weights or (lambda model: model.state_dict())
        self._reported: dict[int, float] = {}  # step → metric
        self._random: dict[str, Any] | None = None  # to be put back when the training goes on
        self._amid_an_epoch = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Go on from the last checkpoint.

        Raises:
            UserError: with these arguments no trial could.
        """
        _check(args, state)
        if not state.global_step:
            return
        path = Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE
        saved = unpack(torch.load(path, map_location="cpu", weights_only=True))
        for name in CHANGES:
            put_back(name, others[name], saved[name])
        self._reported = saved["reported"]
        self.value = self._reported[max(self._reported)]  # there may be nothing left to do
        randoms = saved["random"]
        self._random = randoms[min(checkpoint.processes()[1], len(randoms) - 1)]
        self._amid_an_epoch = not float(state.epoch).is_integer()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Draw on from where the last epoch ended, before the order of the data is drawn."""
        if not self._amid_an_epoch:
            self._draw_on()

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """The same in mid-epoch, after the data that were seen have been left out."""
        self._draw_on()

    def _draw_on(self) -> None:
        if self._random:
            put_back_random(self._random)
        self._random = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Report the metric, at the number of the evaluation: steps depend on the batch size."""
        metrics = others["metrics"]
        if self.metric not in metrics:
            raise UserError(f"{self.metric}: the evaluation returns {', '.join(sorted(metrics))}")
        self.value = float(metrics[self.metric])
        by_steps = _name(args.eval_strategy) == "steps"
        times = state.global_step / state.eval_steps if by_steps else state.epoch
        step = max(1, round(times)) - 1
        if step not in self._reported:
            self._reported[step] = self.value
            self.trial.report(self.value, step)

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Save what the Trainer has not; then prune the trial, or let its worker stop."""
        content = {name: state_of(name, others[name]) for name in CHANGES}
        content |= {"reported": self._reported, "random": _of_all_processes(random_states())}
        if checkpoint.processes()[1] == 0:
            with whole(Path(args.output_dir) / f"checkpoint-{state.global_step}" / STATE) as path:
                torch.save(pack(content), path)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Keep the weights, as of any other trial."""
        checkpoint.save(self.trial, weights=self._weights(others["model"]))


def _check(args: Any, state: Any) -> None:
    at = {_name(args.eval_strategy), _name(args.save_strategy)}
    wrong = ""
    if len(at) > 1 or "no" in at or state.eval_steps != state.save_steps:
        wrong = "evaluate and save at the same times, e.g. eval_strategy and save_strategy “epoch”"
    elif args.save_total_limit == 1:
        wrong = "save_total_limit must be 2 at least, or None"
    elif not args.save_only_model:
        wrong = "save_only_model=True; StudyCallback saves the rest"
    if wrong:
        raise UserError(f"TrainingArguments: {wrong}")


def _of_all_processes(state: dict[str, Any]) -> list[Any]:
    """Return the state of each process: their random numbers differ."""
    number, _ = checkpoint.processes()
    found: list[Any] = [state]
    if number > 1:
        found = [None] * number
        distributed.all_gather_object(found, state)
    return found


def _name(strategy: Any) -> str:
    return str(getattr(strategy, "value", strategy))
