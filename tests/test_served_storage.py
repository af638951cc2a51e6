"""A study that one process serves: what a job does where locks do not hold between nodes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from common import HELPERS, SCRIPTS, Run
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study, open_study
from hpo.study.served import ServedStorage, find_server, server_path
from hpo.study.storage import SQLiteStorage
from hpo.study.trials import is_final

OBJECTIVE = HELPERS / "objective_for_tests.py"
WORKERS = 3


@pytest.fixture
def server(own_study: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """Serve the test's study, as hpo/job/job.sh does in job 77."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("TOTAL_TRIALS", "12")
    monkeypatch.setenv("FINAL_SEEDS", "2")
    monkeypatch.setenv("LEASE_GRACE", "2")
    monkeypatch.setenv("PRUNER", "none")
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("PY_SCRIPT", str(OBJECTIVE))
    create_or_open_study(Settings.from_env())._storage.remove_session()
    command = [sys.executable, "-m", "hpo.study.server", str(WORKERS)]
    process = subprocess.Popen(command, cwd=SCRIPTS, text=True, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not server_path(own_study).exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end, "the server does not start"
        time.sleep(0.1)
    yield process
    process.kill()
    process.communicate()


def start(rank: int, **env: str) -> subprocess.Popen[str]:
    """Start one worker of job 77."""
    return subprocess.Popen(
        [sys.executable, str(OBJECTIVE)],
        env={**os.environ, "SLURM_PROCID": str(rank), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_workers_share_a_served_study_and_none_opens_its_file(
    server: subprocess.Popen[str], own_study: Path
) -> None:
    assert isinstance(open_study(Settings.from_env())._storage, ServedStorage)
    workers = [start(rank, BEHAVIOUR="slow") for rank in range(WORKERS)]
    output = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, output
    assert all("complete" in text for text in output)
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == 0
    assert find_server(own_study) is None
    study = open_study(Settings.from_env())
    assert isinstance(study._storage, SQLiteStorage)
    trials = study.get_trials()
    assert [(trial.number, trial.state) for trial in trials] == [
        (number, TrialState.COMPLETE) for number in range(12)
    ]
    assert [is_final(trial) for trial in trials] == [False] * 7 + [True] * 5
    assert len({trial.user_attrs["final_of"] for trial in trials[7:]}) == 5


def test_trial_of_a_killed_worker_is_run_by_another(server: subprocess.Popen[str]) -> None:
    killed = start(0, BEHAVIOUR="sleep")
    study = open_study(Settings.from_env())
    end = time.monotonic() + 60
    while not study.get_trials():
        assert time.monotonic() < end
        time.sleep(0.1)
    killed.kill()
    killed.communicate()
    output = start(1).communicate(timeout=120)[0]
    assert "waiting for those that still run elsewhere" in output
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 12


def test_others_read_the_backup_and_other_jobs_are_refused(
    server: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, run: Run, own_study: Path
) -> None:
    with pytest.raises(UserError, match=r"job 77 of .* on .* serves"):
        open_study(Settings.from_env(SLURM_JOB_ID="78"))
    monkeypatch.delenv("SLURM_JOB_ID")
    end = time.monotonic() + 60
    while not own_study.with_name("study.db.backup").exists():
        assert time.monotonic() < end
        time.sleep(0.1)
    result = run("check_best_model.py")
    assert "owns the study, this is its backup" in result.stdout
    assert "no trial is complete yet" in result.stdout


def test_server_of_a_dead_job_is_forgotten(
    server: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, run: Run, own_study: Path
) -> None:
    server.kill()
    server.wait()
    assert run("init_optuna_db.py", SLURM_JOB_ID="78", ALIVE_JOBS="77 78").returncode == 2
    assert run("init_optuna_db.py", SLURM_JOB_ID="78", ALIVE_JOBS="78").returncode == 0
    assert find_server(own_study) is None
