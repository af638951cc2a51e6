"""A state that is written while its trial goes on: whole, one at a time, and waited for in time."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.trial import TrialState
from torch import nn

from common import SCRIPTS
from hpo import checkpoint
from hpo.drain import Drain, Drained
from hpo.saving import background, trial_files
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study
from hpo.trial import Outcome, run_trial

LONG = 300.0  # seconds; nothing here takes so long


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study, made as init_optuna_db.py makes it."""
    return create_or_open_study(Settings.from_env())


@pytest.fixture
def trial(study: optuna.Study) -> optuna.Trial:
    """Return its first trial."""
    return study.ask()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Let all states be written by threads, which go on when this gate is open."""
    opened = threading.Event()
    timed = background.timed

    def gated(write: Callable[[], int]) -> None:
        assert opened.wait(LONG)
        timed(write)

    monkeypatch.setattr(background, "worth_it", lambda: True)
    monkeypatch.setattr(background, "timed", gated)
    yield opened
    opened.set()
    background.wait()


def save(trial: optuna.Trial, epochs: int) -> nn.Linear:
    """Report and save an epoch of a net whose one weight is the number of the epochs."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, epochs)
    trial.report(1.0, epochs)
    checkpoint.save(trial, model, losses=[1.0] * epochs)
    return model


def loaded(trial: optuna.Trial) -> list[float]:
    """Return how many epochs are kept, and the weight that is."""
    model = nn.Linear(1, 1, bias=False)
    return [len(checkpoint.load(trial, model)), model.weight.item()]


def run(study: optuna.Study, trial: optuna.Trial, then: Callable[[], float]) -> Outcome:
    """Run a trial that saves one epoch."""

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        save(trial, 1)
        return then()

    return run_trial(study, trial, objective, Drain(float("inf")))


@pytest.mark.parametrize(
    ("gpu", "seconds", "gigabytes", "worth"),
    [(True, 0.6, 1, True), (True, 0.4, 1, False), (True, 0.6, 5, False), (False, 9.0, 1, False)],
)
def test_when_it_is_worth_it(
    gpu: bool, seconds: float, gigabytes: int, worth: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: gpu)
    monkeypatch.setattr(background._Last, "seconds", seconds)
    monkeypatch.setattr(background._Last, "size", gigabytes * 2**30)
    assert background.worth_it() == worth


def test_each_writing_is_timed(trial: optuna.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background._Last, "size", 0)
    monkeypatch.setattr(background._Last, "seconds", -1.0)
    save(trial, 1)
    assert background._Last.size == trial_files.state_path(0).stat().st_size
    assert background._Last.seconds >= 0
    monkeypatch.setattr(background, "worth_it", lambda: True)
    monkeypatch.setattr(background._Last, "seconds", -1.0)
    save(trial, 2)
    background.wait()
    assert background._Last.seconds >= 0


def test_what_is_written_is_what_was_saved(trial: optuna.Trial, gate: threading.Event) -> None:
    model = save(trial, 1)
    nn.init.zeros_(model.weight)  # the training goes on
    assert not trial_files.state_path(0).exists()
    gate.set()
    assert loaded(trial) == [1, 1.0]
    assert [path.name for path in Settings.from_env().checkpoints.iterdir()] == [
        "trial-00000.state.pt"
    ]


def test_never_two_writings_at_a_time(trial: optuna.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    running: list[int] = []
    most: list[int] = []
    timed = background.timed

    def counted(write: Callable[[], int]) -> None:
        running.append(1)
        time.sleep(0.1)  # much longer than from one saving to the next
        most.append(len(running))
        timed(write)
        running.pop()

    monkeypatch.setattr(background, "worth_it", lambda: True)
    monkeypatch.setattr(background, "timed", counted)
    for epochs in range(1, 6):
        save(trial, epochs)
    assert loaded(trial) == [5, 5.0]
    assert most == [1] * 5


@pytest.mark.parametrize("end", ["complete", "pruned", "failed", "SIGTERM"])
def test_the_end_of_a_trial_waits(
    end: str, study: optuna.Study, trial: optuna.Trial, gate: threading.Event
) -> None:
    def then() -> float:
        threading.Timer(0.5, gate.set).start()
        if end == "pruned":
            raise optuna.TrialPruned
        if end == "failed":
            raise ValueError
        if end == "SIGTERM":
            signal.raise_signal(signal.SIGTERM)
        return 1.0

    outcome = run(study, trial, then)
    assert gate.is_set()
    assert outcome.state.name == {"SIGTERM": "WAITING", "failed": "FAIL"}.get(end, end.upper())
    left = [path.name for path in Settings.from_env().checkpoints.iterdir()]
    kept = {"complete": ["trial-00000.weights.pt"], "SIGTERM": ["trial-00000.state.pt"]}
    assert left == kept.get(end, [])
    if end == "SIGTERM":
        assert loaded(study.ask()) == [1, 1.0]


def test_signal_while_a_trial_waits(
    study: optuna.Study,
    trial: optuna.Trial,
    gate: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            signal.raise_signal(signal.SIGTERM)  # raises Drained
        gate.set()
        time.sleep(seconds)

    with_signal = SimpleNamespace(sleep=sleep, monotonic=time.monotonic)
    monkeypatch.setattr(background, "time", with_signal)
    outcome = run(study, trial, lambda: float(save(trial, 2).training))
    assert outcome.state == TrialState.WAITING
    assert len(looks) > 1
    assert loaded(study.ask()) == [1, 1.0]


def test_signal_while_a_thread_starts(
    trial: optuna.Trial, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.set()
    with monkeypatch.context() as patch:

        def interrupted(writing: background._Writing) -> None:
            raise Drained

        patch.setattr(background._Writing, "start", interrupted)
        with pytest.raises(Drained):
            save(trial, 1)
    assert loaded(trial) == [1, 1.0]


@pytest.mark.parametrize("seen", ["by the next saving", "at the end", "after SIGTERM"])
def test_full_disk_is_the_site_s_fault(
    seen: str,
    study: optuna.Study,
    trial: optuna.Trial,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trial.suggest_float("x", 0, 1)
    save(trial, 3)

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def then() -> float:
        if seen == "after SIGTERM":
            raise Drained
        return save(trial, 2).weight.item() if seen == "by the next saving" else 1.0

    monkeypatch.setattr(background, "worth_it", lambda: True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        outcome = run(study, trial, then)
    assert outcome.state == TrialState.WAITING
    if seen == "after SIGTERM":  # it goes back anyway
        assert "an older one stays: [Errno 28] No space left on device" in caplog.text
    else:
        assert "No space left on device" in outcome.site
    assert loaded(study.ask()) == [3, 3.0]


def test_several_gpus_wait_for_each_writing(
    trial: optuna.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker ends their processes without asking what is being written there."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr(background, "worth_it", lambda: True)
    monkeypatch.setattr(background, "begin", None)
    save(trial, 1)
    assert trial_files.state_path(0).exists()


KILLED = """
import os
from pathlib import Path
import optuna
import torch
from hpo import checkpoint
from hpo.saving import background
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study

def half(path, data):
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        os._exit(9)

trial = create_or_open_study(Settings.from_env()).ask()
weights = {"weight": torch.ones(1000)}
checkpoint.save(trial, losses=[1.0], weights=weights)
background.worth_it = lambda: True
Path.write_bytes = half
checkpoint.save(trial, losses=[1.0, 2.0], weights=weights)
background.wait()
"""


def test_half_written_state_of_a_killed_worker_never_counts(study: optuna.Study) -> None:
    env = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=env, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    [half, whole] = sorted(Settings.from_env().checkpoints.iterdir())
    assert (half.suffix, whole.name) == (".tmp", "trial-00000.state.pt")
    trial = optuna.trial.Trial(study, 1)
    assert checkpoint.load(trial) == [1.0]
    checkpoint.tidy({0}, set())
    assert list(Settings.from_env().checkpoints.iterdir()) == []
