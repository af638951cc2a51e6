"""Lightning's Trainer as an objective: it reports, is pruned, and resumes at the right epoch.

    callback = StudyCallback(trial, "val_loss")
    trainer = Trainer(
        max_epochs=10, default_root_dir=checkpoint.folder(trial), callbacks=[callback],
        **devices(),
    )
    trainer.fit(model, training, validation, **resume(trial))
    return callback.value

The metric is one that the module logs, and is reported at the end of each epoch with a validation.
Then Lightning saves all that it keeps (the model, optimisers, schedules, callbacks such as
EarlyStopping) in the trial's folder, and when the next epoch begins the callback saves what has
changed since: the random numbers, and a schedule that looks at the metric.  Now the trial may be
pruned, or go back to the queue because its worker has to stop.  The weights that are kept of a good
trial are those at the end of the training.

On a CPU a trial that goes on ends with the same value to the last digit.  Lightning does not give
away the states of the workers of DataLoader(persistent_workers=True), which begin anew.

Several GPUs per trial (GPUS_PER_TRIAL=2): run the lines above by hpo.ddp.together, as in
optuna_mnist.py, and log the metric with sync_dist=True; devices() tells the Trainer the rest.  All
processes go on with the random numbers of the first one.

Lightning looks for Slurm's variables when it is imported, which is before the worker hides them:
the callback tells it that this process has no rank, or only the first worker would write logs.  So
make the callback before the Trainer.  The script needs NEEDS = ("lightning>=2.6",).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch import utilities
from lightning.pytorch.callbacks import Checkpoint
from torch import distributed

from hpo import checkpoint
from hpo.files import whole
from hpo.saving.states import pack, put_back, put_back_random, random_states, state_of, unpack
from hpo.settings import UserError

LATE = (
    ".late"  # the second part of a checkpoint: what changes between its saving and the next epoch
)


def last_checkpoint(trial: optuna.Trial) -> str | None:
    """Return the newest checkpoint in the trial's folder; None for a trial that is new."""
    found = checkpoint.folder(trial).glob(f"epoch-*{LATE}")
    return max((str(path.with_suffix(".ckpt")) for path in found), default=None)


def resume(trial: optuna.Trial) -> dict[str, Any]:
    """Return the arguments of Trainer.fit with which a trial goes on; reading runs no code."""
    return {"ckpt_path": last_checkpoint(trial), "weights_only": True}


def devices() -> dict[str, Any]:
    """Return the arguments of a Trainer for the processes that run this trial."""
    if not distributed.is_initialized():
        return {"devices": 1}
    together = _Together()
    return {"devices": together.world_size(), "strategy": "ddp", "plugins": [together]}


class StudyCallback(Checkpoint):  # type: ignore[misc, unused-ignore]
    """Connects a Trainer with a trial; `value` is the last metric that was reported.

    Lightning calls what is a Checkpoint after all other callbacks, and saves nothing itself then.
    """

    def __init__(self, trial: optuna.Trial, metric: str = "val_loss") -> None:
        """Prepare, for a metric that the module logs."""
        self.trial, self.metric, self.value = trial, metric, math.nan
        self._validated = False
        self._saved = 0  # epochs that were finished when Lightning saved last
        self._late: dict[str, Any] | None = None  # to be put back when the training goes on
        _show_rank()

    def state_dict(self) -> dict[str, Any]:
        """Return what Lightning's checkpoint keeps of this callback."""
        return {"value": self.value, "saved": self._saved}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it from there, and read the second part."""
        self.value, self._saved = state_dict["value"], state_dict["saved"]
        path = _path(self.trial, self._saved).with_suffix(LATE)
        self._late = unpack(torch.load(path, map_location="cpu", weights_only=True))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw on from where the last epoch ended, before Lightning draws the order of the data."""
        if self._late:
            put_back_random(self._late["random"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the schedules as they were when the next epoch began."""
        if not self._late:
            return
        for at, config in enumerate(trainer.lr_scheduler_configs):
            put_back("scheduler", config.scheduler, self._late["schedulers"][at])
        for optimizer, rates in zip(trainer.optimizers, self._late["rates"], strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Note that there are new values."""
        self._validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report the metric, unless it is that of an earlier epoch; let Lightning save."""
        if self._validated or not trainer.enable_validation:
            metrics = trainer.callback_metrics
            if self.metric not in metrics:
                found = ", ".join(sorted(metrics)) or "nothing"
                raise UserError(f"{self.metric}: the LightningModule logs {found}")
            self.value = float(metrics[self.metric])
            self.trial.report(self.value, trainer.current_epoch)
        self._validated = False
        self._saved = trainer.current_epoch + 1
        if self._saved == trainer.max_epochs:
            return  # nothing would be left to do
        path = _path(self.trial, self._saved)
        if _rank():  # Lightning wants to be called by all processes; the first one writes
            trainer.save_checkpoint(path)
            return
        with whole(path) as temporary:
            trainer.save_checkpoint(temporary)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Save what has changed since; then prune the trial, or let its worker stop."""
        goes_on, self._late = self._late is not None, None
        if goes_on or trainer.current_epoch == 0:
            return
        if not _rank():
            _save_late(trainer, _path(self.trial, self._saved))
        if self.trial.should_prune():
            raise optuna.TrialPruned

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Keep the weights, as of any other trial."""
        checkpoint.save(self.trial, weights=pl_module.state_dict())


def _save_late(trainer: Any, path: Path) -> None:
    """Write the second part of a checkpoint, with which it counts; remove older ones."""
    configs = trainer.lr_scheduler_configs
    content = {
        "schedulers": [state_of("scheduler", config.scheduler) for config in configs],
        "rates": [[group["lr"] for group in each.param_groups] for each in trainer.optimizers],
        "random": random_states(),
    }
    with whole(path.with_suffix(LATE)) as temporary:
        torch.save(pack(content), temporary)
    for other in path.parent.glob("epoch-*"):
        if other.stem != path.stem:
            other.unlink()


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
        _show_rank()

    def local_rank(self) -> int:
        return _rank()

    def node_rank(self) -> int:
        return 0


def _show_rank() -> None:
    rank_zero_only: Any = utilities.rank_zero_only
    rank_zero_only.rank = _rank()


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _path(trial: optuna.Trial, epochs: int) -> Path:
    return checkpoint.folder(trial) / f"epoch-{epochs:06d}.ckpt"
