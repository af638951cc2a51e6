"""The worker's loop: budget, failures, signals; with an objective that needs no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

from common import BUNDLE, SCRIPTS, Run
from hpo.samplers import sampler_seed
from hpo.settings import Settings
from hpo.storage import open_study

OBJECTIVE = BUNDLE / "tests" / "objective_for_tests.py"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests/objective_for_tests.py import hpo, as a script in the scripts' folder can."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    return open_study(Settings.from_env()).get_trials()


def start(**env: str) -> subprocess.Popen[str]:
    """Start one worker in the background."""
    return subprocess.Popen(
        [sys.executable, str(OBJECTIVE)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_worker_stops_at_total_trials_and_a_larger_total_adds(run: Run) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="7")
    assert result.returncode == 0, result.stderr
    assert "the study has its 7 trials" in result.stdout
    assert run(OBJECTIVE, TOTAL_TRIALS="7").returncode == 0
    assert len(trials()) == 7
    run(OBJECTIVE, TOTAL_TRIALS="10")
    assert [trial.number for trial in trials()] == list(range(10))
    assert all(trial.state.is_finished() for trial in trials())


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raise once", "ValueError: no such layer"),
        ("memory", "out of memory (MemoryError: 8 GiB asked for)"),
        ("nan", "the objective returned NaN"),
    ],
)
def test_one_bad_trial_is_recorded_and_the_worker_goes_on(
    behaviour: str, reason: str, run: Run
) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="4", BEHAVIOUR=behaviour)
    assert result.returncode == 0
    found = trials()
    assert found[0].state == TrialState.FAIL
    assert found[0].user_attrs["fail_reason"] == reason
    assert all(trial.state != TrialState.FAIL for trial in found[1:])
    assert len(found) == 4


@pytest.mark.parametrize("behaviour", ["raise", "text"])
def test_broken_objective_stops_the_worker_with_its_traceback(behaviour: str, run: Run) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="50", BEHAVIOUR=behaviour)
    assert result.returncode == 1
    assert len(trials()) == 3
    assert "Traceback" in result.stdout
    assert "3 trials in a row failed" in result.stdout


def test_usr1_returns_the_trial_after_its_epoch(run: Run) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="6", BEHAVIOUR="usr1")
    assert result.returncode == 0
    assert "trial 2 back to the queue" in result.stdout
    returned = trials()[2]
    assert returned.state == TrialState.WAITING
    assert list(returned.intermediate_values) == [0]  # the epoch was reported first
    run(OBJECTIVE, TOTAL_TRIALS="6")
    assert trials()[2].params == returned.params
    assert Counter(trial.state.is_finished() for trial in trials()) == {True: 6}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_returns_the_trial_at_once(signum: signal.Signals, own_study: Path) -> None:
    worker = start(BEHAVIOUR="sleep")
    deadline = time.monotonic() + 60
    while not own_study.exists() or not [t for t in trials() if t.params]:
        assert time.monotonic() < deadline, "the worker has claimed no trial"
        time.sleep(0.1)
    params = trials()[0].params
    worker.send_signal(signum)
    output, _ = worker.communicate(timeout=30)
    assert worker.returncode == 0, output
    assert "trial 0 back to the queue" in output
    assert [(trial.state, trial.params) for trial in trials()] == [(TrialState.WAITING, params)]


def test_four_workers_share_the_study_and_suggest_different_trials() -> None:
    workers = [
        start(
            WORKER_RANK=str(rank), SEED="1", TOTAL_TRIALS="24", BEHAVIOUR="slow", SAMPLER="random"
        )
        for rank in range(4)
    ]
    output = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, output
    assert all(f"worker {rank} on" in text for rank, text in enumerate(output))
    found = trials()
    assert len(found) >= 24
    assert len({trial.params["x"] for trial in found}) == len(found)


def test_sampler_seeds_differ_between_workers_and_starts() -> None:
    seeds = {sampler_seed(1, rank, trials) for rank in range(8) for trials in (0, 4, 500)}
    assert len(seeds) == 24
    assert sampler_seed(1, 2, 3) == sampler_seed(1, 2, 3)
    assert sampler_seed(None, 0, 0) is None
