"""Lightning's Trainer as an objective: the same result after each interruption."""

from __future__ import annotations

import os
import signal
from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from hpo import checkpoint
from hpo.drain import Drain, Drained
from hpo.settings import Settings, UserError, forget
from hpo.study.opening import create_or_open_study
from hpo.train import ddp
from hpo.trial import run_trial
from plain import run_plain

if not os.environ.get("CI"):
    pytest.importorskip("lightning")
from lightning.pytorch import LightningModule, Trainer, utilities
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger

from hpo.loops.lightning import StudyCallback, devices, last_checkpoint, resume

EPOCHS = 4
QUIET: dict[str, Any] = {
    "enable_progress_bar": False, "enable_model_summary": False,
    "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study."""
    return create_or_open_study(Settings.from_env())


class Net(LightningModule):  # type: ignore[misc, unused-ignore]
    """A network with dropout, and a schedule that looks at the metric."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        return functional.cross_entropy(self.layers(batch[0]), batch[1])

    def validation_step(self, batch: Any, number: int) -> None:
        loss = functional.cross_entropy(self.layers(batch[0]), batch[1])
        self.log("val_loss", loss, sync_dist=True)

    def configure_optimizers(self) -> Any:
        adam = torch.optim.Adam(self.parameters(), lr=0.05)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(adam, patience=0, threshold=10.0)
        return {
            "optimizer": adam, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}
        }  # fmt: skip


def train(trial: optuna.Trial, metric: str = "val_loss", **changes: Any) -> float:
    """Train the network with shuffled data."""
    torch.manual_seed(0)
    rows = torch.randn(96, 4)
    data = TensorDataset(rows, (rows[:, 0] > 0).long())
    model, callback = Net(), StudyCallback(trial, metric)
    folder = checkpoint.folder(trial)
    # The loss falls, and so the training ends after EPOCHS epochs.
    callbacks = [callback, EarlyStopping("val_loss", mode="max", patience=EPOCHS - 1)]
    options = {"max_epochs": 9, "logger": False, "callbacks": callbacks, **QUIET, **changes}
    trainer = Trainer(default_root_dir=folder, **options, **devices())
    loaders = DataLoader(data, 16, shuffle=True), DataLoader(data, 96)
    trainer.fit(model, *loaders, **resume(trial))
    return callback.value


def drained(trial: optuna.Trial) -> bool:
    """Stand for should_prune() of a worker that drains."""
    raise Drained


def test_trial_that_is_interrupted_after_each_epoch(study: optuna.Study) -> None:
    study.ask().suggest_float("x", 0, 1)
    run_trial(study, optuna.Trial(study, 1), train, Drain(float("inf")))
    study.ask().suggest_float("x", 0, 1)
    trial = optuna.Trial(study, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        for epoch in range(EPOCHS - 1):
            torch.manual_seed(epoch)
            with pytest.raises(Drained):
                train(trial)
            found = sorted(path.name for path in checkpoint.folder(trial).iterdir())
            assert found == [f"epoch-00000{epoch + 1}{end}" for end in (".ckpt", ".late")]
            (checkpoint.folder(trial) / "epoch-000009.ckpt").touch()  # was not whole: it ends here
    run_trial(study, trial, train, Drain(float("inf")))
    one, other = study.get_trials()
    assert one.state == other.state == TrialState.COMPLETE, other.user_attrs
    assert list(one.intermediate_values) == list(range(EPOCHS))
    assert len(set(one.intermediate_values.values())) == EPOCHS
    assert one.intermediate_values == other.intermediate_values
    assert one.value == other.value == one.intermediate_values[EPOCHS - 1]
    paths = [checkpoint.weights_path(Settings.from_env(), number) for number in (0, 1)]
    first, second = (torch.load(path, weights_only=True) for path in paths)
    assert all(torch.equal(first[name], second[name]) for name in first)
    Net().load_state_dict(first)


def test_sigterm_in_mid_epoch(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning has a handler of its own for the signal; ours is called after it."""

    def objective(trial: optuna.Trial) -> float:
        return train(trial, max_epochs=2)

    class Killed(Net):
        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            if self.current_epoch == 1 and number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().training_step(batch, number)

    study.ask().suggest_float("x", 0, 1)
    run_trial(study, optuna.Trial(study, 1), objective, Drain(float("inf")))
    study.ask().suggest_float("x", 0, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(train.__globals__, "Net", Killed)
        outcome = run_trial(study, optuna.Trial(study, 2), objective, Drain(float("inf")))
    assert outcome.state == TrialState.WAITING
    run_trial(study, study.ask(), objective, Drain(float("inf")))
    one, other = study.get_trials()
    assert one.value == other.value


def test_checkpoint_with_code_in_it_is_not_read(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = study.ask()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "should_prune", drained)
        with pytest.raises(Drained):
            train(trial)
    path = last_checkpoint(trial)
    assert path
    torch.save({**torch.load(path, weights_only=True), "code": Fraction(1, 2)}, path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # only where nobody says how
    with pytest.raises(UnpicklingError, match="Fraction"):
        train(trial)


def test_pruned(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: True)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    run_trial(study, trial, train, Drain(float("inf")))
    [found] = study.get_trials()
    assert found.state == TrialState.PRUNED
    assert list(found.intermediate_values) == [0]
    assert not list(Settings.from_env().checkpoints.iterdir())


def test_logger_writes_for_every_worker(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning was imported by a process whose SLURM_PROCID was 1."""
    monkeypatch.setattr(utilities.rank_zero_only, "rank", 1)
    train(study.ask(), logger=CSVLogger(tmp_path), max_epochs=1)
    [path] = tmp_path.glob("lightning_logs/*/metrics.csv")
    assert "val_loss" in path.read_text()


def test_epochs_without_a_validation_report_nothing(study: optuna.Study) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Net, "configure_optimizers", lambda self: torch.optim.SGD(self.parameters()))
        train(study.ask(), check_val_every_n_epoch=2, max_epochs=EPOCHS)
    assert list(study.get_trials()[0].intermediate_values) == [1, 3]


def test_metric_that_is_not_logged(study: optuna.Study) -> None:
    with pytest.raises(UserError, match="val_accuracy: the LightningModule logs val_loss"):
        train(study.ask(), "val_accuracy")


def test_plain_script_and_its_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trial = run_plain("lightning")
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))
    assert len(trial.intermediate_values) == 5


def train_together(config: dict[str, Any], trial: optuna.Trial | None) -> float:
    """Train in one of two processes."""
    assert trial
    assert ddp.processes() == 2
    return train(trial, max_epochs=2)


def test_two_processes(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = study.ask()
    monkeypatch.setenv("GPUS_PER_TRIAL", "2")
    forget()
    value = ddp.together(train_together, {}, trial)
    [found] = study.get_trials()
    assert list(found.intermediate_values) == [0, 1]
    assert value == found.intermediate_values[1] < found.intermediate_values[0]
    assert last_checkpoint(trial)
    checkpoint.keep_weights(trial.number)
    assert checkpoint.weights_path(Settings.from_env(), trial.number).exists()
