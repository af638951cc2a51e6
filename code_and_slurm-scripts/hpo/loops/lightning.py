"""Lightning's Trainer as an objective: it reports, is pruned, and resumes at the right epoch.

    callback = StudyCallback(trial, "val_loss")
    trainer = Trainer(
        max_epochs=10, default_root_dir=checkpoint.folder(trial), callbacks=[callback],
        enable_checkpointing=False, **devices(),
    )
    trainer.fit(model, training, validation, ckpt_path=last_checkpoint(trial))
    return callback.value

The metric is one that the module logs, and is reported at the end of each epoch with a validation.
Before the next one the callback lets Lightning save all that it keeps (optimisers, schedules,
callbacks such as EarlyStopping, loops) and the random numbers, in the trial's folder; then the
trial may be pruned, or go back to the queue because its worker has to stop.  The weights that are
kept of a good trial are those at the end of the training.

On a CPU a trial that goes on ends with the same value to the last digit.  Lightning does not give
away the states of the workers of DataLoader(persistent_workers=True), which begin anew.

Several GPUs per trial (GPUS_PER_TRIAL=2): run the lines above by hpo.ddp.together, as optuna_mnist.py
does, and log the metric with sync_dist=True; devices() is what the Trainer has to know of it.  All
processes go on with the random numbers of the first one.

Lightning looks for Slurm's variables when it is imported, which is before the worker hides them:
the callback tells it that this process has no rank, or only the first worker would write logs.  So
make the callback before the Trainer.  The script needs NEEDS = ("lightning",).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
from lightning.fabric.plugins.environments import ClusterEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import distributed

from hpo import checkpoint
from hpo.files import whole
from hpo.settings import UserError
from hpo.states import pack, put_back_random, random_states, unpack


def last_checkpoint(trial: optuna.Trial) -> str | None:
    """Return the newest checkpoint in the trial's folder; None for a trial that is new."""
    return max(map(str, _checkpoints(trial)), default=None)


def devices() -> dict[str, Any]:
    """Return the arguments of a Trainer for the processes that run this trial."""
    if not distributed.is_initialized():
        return {"devices": 1}
    together = _Together()
    return {"devices": together.world_size(), "strategy": "ddp", "plugins": [together]}


class StudyCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Connects a Trainer with a trial; `value` is the last metric that was reported."""

    def __init__(self, trial: optuna.Trial, metric: str = "val_loss") -> None:
        """Prepare, for a metric that the module logs."""
        self.trial, self.metric, self.value = trial, metric, math.nan
        self._validated = False
        self._random: dict[str, Any] | None = None  # to be put back when the training goes on
        self._goes_on = False
        rank_zero_only.rank = _rank()

    # ---------- What Lightning keeps of this callback ----------

    def state_dict(self) -> dict[str, Any]:
        """Return what is saved in Lightning's checkpoint."""
        found: dict[str, Any] = pack({"value": self.value, "random": random_states()})
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from there."""
        found = unpack(state_dict)
        self.value, self._random = found["value"], found["random"]

    # ---------- When it is called ----------

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw on from where the last epoch ended, before Lightning draws the order of the data."""
        self._goes_on = self._random is not None
        if self._random is not None:
            put_back_random(self._random)
        self._random = None

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note that there are new values."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the metric, unless it is that of an earlier epoch."""
        if trainer.enable_validation and not self._validated:
            return
        self._validated = False
        metrics = trainer.callback_metrics
        if self.metric not in metrics:
            found = ", ".join(sorted(metrics)) or "nothing"
            raise UserError(f"{self.metric}: the LightningModule logs {found}")
        self.value = float(metrics[self.metric])
        self.trial.report(self.value, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Save what was reached; then prune the trial, or let its worker stop.

        Not at the end of an epoch: some schedules are brought up to date after that.
        """
        if trainer.current_epoch == 0 or self._goes_on:
            self._goes_on = False  # it has just been read
            return
        self._save(trainer)
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def _save(self, trainer: Any) -> None:
        path = checkpoint.folder(self.trial) / f"epoch-{trainer.current_epoch:06d}.ckpt"
        if _rank():  # Lightning wants to be called by all processes; the first one writes
            trainer.save_checkpoint(path)
            return
        with whole(path) as temporary:
            trainer.save_checkpoint(temporary)
        for other in _checkpoints(self.trial):
            if other != path:
                other.unlink()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the weights, as of any other trial."""
        checkpoint.save(self.trial, weights=pl_module.state_dict())


class _Together(ClusterEnvironment):  # type: ignore[misc, unused-ignore]
    """Tells Lightning of the processes that hpo.ddp.together has started, and connected."""

    creates_processes_externally = True
    main_address = "localhost"  # not used: they are connected
    main_port = 0

    @staticmethod
    def detect() -> bool:
        return distributed.is_initialized()

    def world_size(self) -> int:
        return distributed.get_world_size()

    def set_world_size(self, size: int) -> None:
        pass

    def global_rank(self) -> int:
        return _rank()

    def set_global_rank(self, rank: int) -> None:
        rank_zero_only.rank = rank

    def local_rank(self) -> int:
        return _rank()

    def node_rank(self) -> int:
        return 0


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _checkpoints(trial: optuna.Trial) -> list[Path]:
    return list(checkpoint.folder(trial).glob("epoch-*.ckpt"))
