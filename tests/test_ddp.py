"""One trial by two processes (GPUS_PER_TRIAL=2), on the CPU with gloo: the same result, no hang."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import optuna_t5
from common import SCRIPTS, TINY_T5, Run
from hpo import checkpoint, gpu
from hpo.drain import Drained
from hpo.saving import trial_files
from hpo.settings import Settings, UserError, forget
from hpo.study.opening import create_or_open_study
from hpo.train import ddp


@pytest.fixture
def study(tiny_pairs: Path, monkeypatch: pytest.MonkeyPatch) -> optuna.Study:
    """Return a study whose trials are trained by two processes each."""
    monkeypatch.setenv("GPUS_PER_TRIAL", "2")
    monkeypatch.setenv("PY_SCRIPT", "optuna_t5.py")
    return create_or_open_study(Settings.from_env())


def children() -> set[str]:
    """Return the processes that this one has started and that still run."""
    own = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in own if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()}


def test_two_processes_get_what_one_gets(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same batches, whatever their division: 32 pairs at once, or 2 × 2 × 8."""
    config = {**TINY_T5, "epochs": 3}
    trial = study.ask()
    two = ddp.together(optuna_t5.train_model, {**config, "micro_batch": 8}, trial)
    curve = study.get_trials()[0].intermediate_values
    assert children() == set()
    weights = trial_files.state_path(trial.number)
    assert weights.exists()
    checkpoint.keep_weights(trial.number)
    weights.unlink()

    monkeypatch.setenv("GPUS_PER_TRIAL", "1")
    with pytest.MonkeyPatch.context() as patch:
        other = study.ask()
        patch.setattr(optuna.Trial, "number", trial.number)  # its seed
        one = ddp.together(optuna_t5.train_model, config, other)
    assert one == pytest.approx(two, abs=1e-4)
    assert study.get_trials()[1].intermediate_values == pytest.approx(curve, abs=1e-4)
    assert curve[2] < curve[0] - 0.1  # it does learn


def failing(config: dict[str, Any], trial: optuna.Trial | None) -> float:
    """Fail in the way that the configuration names, while the other process waits for a word."""
    assert trial
    if ddp.rank() == 1:
        if config["how"] == "raise":
            raise MemoryError("no room")
        if config["how"] == "capture":
            raise gpu.Unusable("spoilt", gpu.NO_CAPTURE)
        if config["how"] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
    trial.report(1.0, 0)
    if trial.should_prune():
        raise optuna.TrialPruned
    return 0.0


@pytest.mark.parametrize(
    ("how", "error", "says"),
    [
        ("raise", MemoryError, "no room"),
        ("capture", gpu.Unusable, "spoilt"),
        ("die", RuntimeError, "process 1 of the trial died .exit status -9."),
        ("prune", optuna.TrialPruned, "^$"),
    ],
)
def test_what_happens_to_one_process_ends_the_trial(
    how: str,
    error: type[BaseException],
    says: str,
    study: optuna.Study,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: how == "prune")
    with pytest.raises(error, match=says):
        ddp.together(failing, {"how": how}, study.ask())
    assert children() == set()


def test_sigterm_while_a_process_starts_leaves_none_behind(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another thread takes the signal, as it may while the main thread blocks it."""
    original = SpawnProcess.start

    def take() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    def start(self: SpawnProcess) -> None:
        original(self)
        thread = threading.Thread(target=take)
        thread.start()
        thread.join()

    def stop(*_: object) -> None:
        raise Drained

    monkeypatch.setattr(SpawnProcess, "start", start)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(Drained):
            ddp.together(failing, {"how": "return"}, study.ask())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert children() == set()


def test_exception_that_cannot_be_pickled() -> None:
    class Local(Exception):
        """Known in this function alone."""

    mine, its = multiprocessing.Pipe()
    ddp._send(its, Local("why"))
    call, error = mine.recv()
    assert (call, type(error), str(error)) == ("raise", RuntimeError, "Local: why")


def test_worker_of_two_processes_drains_and_leaves_none_behind(
    study: optuna.Study, tiny_pairs: Path
) -> None:
    """SIGTERM, as from scancel to all processes of the step, and SIGKILL for the worker alone."""
    lines = (f"{number}\t{number:b}\n" for number in range(4000))  # seconds for an epoch
    tiny_pairs.write_text("".join(lines))
    for number, to_all, state in (
        (signal.SIGTERM, True, TrialState.WAITING),
        (signal.SIGKILL, False, TrialState.RUNNING),
    ):
        worker = subprocess.Popen(
            [sys.executable, str(SCRIPTS / "optuna_t5.py")],
            env={**os.environ, "TOTAL_TRIALS": "1"},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(lambda: trial_files.state_path(0).exists())
        in_group = processes_of(worker.pid)
        assert len(in_group) >= 3
        (os.killpg if to_all else os.kill)(worker.pid, number)
        output = worker.communicate(timeout=60)[0]
        assert worker.returncode == (0 if to_all else -9), output
        assert study.get_trials()[0].state == state, output
        wait_for(lambda pid=worker.pid: not processes_of(pid))
        trial_files.state_path(0).unlink()


def wait_for(condition: Any) -> None:
    """Wait until the condition holds, five minutes at most: processes start slowly under load."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_of(session: int) -> list[int]:
    """Return the processes of a session that are no zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_wrong_numbers_of_gpus(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    result = run("optuna_mnist.py", GPUS_PER_TRIAL="2")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "GPUS_PER_TRIAL: optuna_mnist.py trains on one GPU" in result.stderr
    monkeypatch.setenv("GPUS_PER_TRIAL", "2")
    forget()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"this worker sees 1 GPU.*--gpus-per-task=2"):
        ddp.check_gpus()
    monkeypatch.setenv("WORKERS_PER_GPU", "2")
    forget()
    with pytest.raises(UserError, match="only one of them can be more than 1"):
        Settings.from_env()
