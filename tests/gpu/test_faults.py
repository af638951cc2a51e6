"""On a GPU: what a graph freezes, recordings that fail, errors that stay, MPS, resume, memory."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

import optuna_mnist
from common import BUNDLE, SCRIPTS, SMALL
from hpo.settings import Settings
from hpo.study.opening import open_study
from hpo.train import mnist
from hpo.train.training import Trainer, evaluate, fused_adam, pick_device

Run = Callable[..., str]
CONFIG = {**SMALL, "num_classes": 10}


def make_trainer(images: int = 10_000, **changes: Any) -> Trainer:
    """Return a trainer of the smallest net, on the GPU."""
    torch.manual_seed(0)
    model = optuna_mnist.CNN({**CONFIG, **changes})
    model = model.to(pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
    data, _ = mnist.load_training(pick_device(), images)
    return Trainer(model, fused_adam(model, 1e-3), data, 64)


def weights(trainer: Trainer) -> Tensor:
    """Return all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    return open_study(Settings.from_env()).get_trials()


def names() -> list[str]:
    """Return the states of the trials."""
    return [trial.state.name for trial in trials()]


def test_the_suite_passes_on_this_machine(python: Run) -> None:
    files = ("training", "capture", "gpu", "optuna_mnist", "optuna_t5", "ddp", "check_cluster")
    paths = [BUNDLE / "tests" / f"test_{name}.py" for name in files]
    python("-m", "pytest", "-q", "-x", "--rootdir", BUNDLE, *paths, OMP_NUM_THREADS="1")


def test_steps_are_counted_and_train_like_eager_ones(row: Callable[[str], None]) -> None:
    losses = {}
    for recorded in (True, False):
        trainer = make_trainer()
        trainer.captured.wanted = recorded
        losses[recorded] = [float(trainer.train_epoch()) for _ in range(2)]
        assert (trainer.captured.graph is not None) == recorded
        (steps, *_) = {float(state["step"]) for state in trainer.optimizer.state.values()}
        assert steps == 2 * trainer.steps
        validation = mnist.load_training(pick_device(), 10_000)[1]
        assert evaluate(trainer.model, validation)[1] > 0.9
    row(f"losses {losses[True][-1]:.4f}, eager {losses[False][-1]:.4f}")
    assert losses[True] == pytest.approx(losses[False], rel=0.02)  # sums in another order


def test_rate_of_zero_in_epoch_two_leaves_the_weights_alone() -> None:
    trainer = make_trainer()
    trainer.train_epoch()
    before = weights(trainer)
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    trainer.train_epoch()
    assert trainer.captured.graph
    assert torch.equal(weights(trainer), before)


def test_200_trials_need_no_more_memory_than_the_first_ones(row: Callable[[str], None]) -> None:
    used = []
    for number in range(200):
        trainer = make_trainer(1000, conv1_channels=8 << number % 4)
        trainer.train_epoch()
        trainer.train_epoch()
        assert trainer.captured.graph
        del trainer
        gc.collect()  # as hpo/trial.py does between two trials
        torch.cuda.empty_cache()
        used.append(torch.cuda.memory_reserved())
    row(f"{max(used[:4]) / 2**20:.0f} MiB reserved at first, {max(used[4:]) / 2**20:.0f} later")
    assert max(used[4:]) <= max(used[:4])


@pytest.mark.parametrize("how", ["item", "mask", "tensor", "adamw"])
def test_a_recording_that_fails_costs_no_trial(
    how: str, worker: Run, row: Callable[[str], None]
) -> None:
    said = worker(HOW=how, TOTAL_TRIALS="3", TRAIN_IMAGES="5000")
    assert names() == ["COMPLETE"] * 3, said
    assert said.count("no CUDA graph, training eagerly: ") == 1 + said.count("spoilt by that")
    assert how == "adamw" or "user_script.py:" in said  # the line that cannot be recorded
    # After a failure nothing is recorded; another optimiser is no failure.
    assert said.count("recorded: True") == (2 if how == "adamw" else 1), said
    row("in the same process" if said.count("device: ") == 1 else "in a new process")


@pytest.mark.parametrize(("how", "starts"), [("memory", 1), ("assert", 2)])
def test_an_error_costs_its_trial_alone(how: str, starts: int, worker: Run) -> None:
    said = worker(HOW=how, TOTAL_TRIALS="3", TRAIN_IMAGES="5000")
    assert names() == ["COMPLETE", "FAIL", "COMPLETE"], said
    assert ("out of memory" in trials()[1].user_attrs["fail_reason"]) == (how == "memory")
    assert said.count("device: ") == starts, said


@pytest.mark.parametrize(("first", "then"), [("", ""), ("", "-1"), ("-1", "")])
def test_a_trial_goes_on_elsewhere(
    first: str, then: str, worker: Run, row: Callable[[str], None]
) -> None:
    """GPU → GPU, GPU → CPU, CPU → GPU, with dropout."""
    hidden = {"": {}, "-1": {"CUDA_VISIBLE_DEVICES": "-1"}}
    worker(HOW="die", TOTAL_TRIALS="2", TRAIN_IMAGES="5000", **hidden[first])
    assert names() == ["COMPLETE", "WAITING"]
    worker(TOTAL_TRIALS="2", TRAIN_IMAGES="5000", **hidden[then])
    assert names() == ["COMPLETE"] * 2
    curve = trials()[1].intermediate_values
    row(" ".join(f"{loss:.4f}" for loss in curve.values()))
    assert list(curve) == [0, 1, 2]
    assert curve[2] < curve[0]


def daemons() -> list[str]:
    """Return the MPS processes of this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [name for name in [path.read_text()] if name.startswith("nvidia-cuda-mps")]
        except OSError:
            continue
    return found


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_share_the_gpu_and_leave_no_daemon(
    workers: int, python: Run, row: Callable[[str], None]
) -> None:
    """One MPS server; one worker is killed, then SIGTERM comes to all."""
    env = {
        **{"WORKERS_PER_GPU": str(workers), "SLURM_PROCID": "0", "TOTAL_TRIALS": "1000"},
        **{"PRUNER": "none", "TRAIN_IMAGES": "10000"},
    }
    python("init_optuna_db.py", **env)
    task = subprocess.Popen(
        ["bash", "hpo/job/mps.sh", "bash", "hpo/job/keep_running.sh", "optuna_mnist.py",
         sys.executable],
        cwd=SCRIPTS,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(done()) >= 2 * workers, task)
    victim = next(trial for trial in trials() if trial.state == TrialState.RUNNING)
    listed = subprocess.check_output(["pgrep", "-s", str(task.pid), "-f", "optuna_mnist.py"])
    python_pids = [
        int(pid) for pid in listed.split()
        if b"python" in Path(f"/proc/{int(pid)}/exe").resolve().name.encode()
    ]  # fmt: skip
    os.kill(python_pids[-1], signal.SIGKILL)
    finished = len(done())
    wait_for(lambda: len(done()) >= finished + 2 * workers, task)
    os.killpg(task.pid, signal.SIGTERM)
    said, _ = task.communicate(timeout=120)
    assert TrialState.RUNNING not in {trial.state for trial in trials()}, said
    assert TrialState.FAIL not in {trial.state for trial in trials()}, said
    assert "starting it again (1 of 3)" in said
    assert victim.number < len(trials())
    wait_for(lambda: not daemons(), None)
    row("through MPS" if "through NVIDIA MPS" in said else "without MPS")


def done() -> list[FrozenTrial]:
    """Return the complete trials; none before there is a study."""
    path = Settings.from_env().sqlite_path
    if not path or not path.exists():
        return []
    return [trial for trial in trials() if trial.state == TrialState.COMPLETE]


def wait_for(condition: Callable[[], bool], task: subprocess.Popen[str] | None) -> None:
    """Wait until the condition holds, three minutes at most, or the task has ended."""
    end = time.monotonic() + 180
    while not condition():
        assert time.monotonic() < end
        assert task is None or task.poll() is None, task.communicate()[0]
        time.sleep(0.2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_trial_on_two_gpus(python: Run) -> None:
    names_of_t5 = {"PY_SCRIPT": "optuna_t5.py", "GPUS_PER_TRIAL": "2", "SMALL": "1"}
    python("optuna_t5.py", TOTAL_TRIALS="1", **names_of_t5)
    assert names() == ["COMPLETE"]
