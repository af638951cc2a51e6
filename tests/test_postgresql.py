"""The same worker on a real PostgreSQL server, through Optuna's own storage."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from optuna.trial import TrialState

from common import HELPERS, SCRIPTS, Run
from hpo.settings import Settings
from hpo.study.opening import open_study

OBJECTIVE = HELPERS / "objective_for_tests.py"
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian puts them
WORKERS = 4


@pytest.fixture(scope="session")
def socket_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Start a server that listens on a socket file only; yield the folder of that file."""
    if not PROGRAMS or os.geteuid():
        assert "CI" not in os.environ, "CI must have PostgreSQL, and be root"
        pytest.skip("needs Debian's package postgresql, and root to start it as its own user")
    folder = Path("/tmp") / f"pg-{os.getpid()}"  # the path of a socket must be short
    folder.mkdir(mode=0o755)
    shutil.chown(folder, "postgres")
    as_user: list[str | Path] = [
        "setpriv",
        "--reuid=postgres",
        "--regid=postgres",
        "--clear-groups",
    ]
    data, bin_ = folder / "data", PROGRAMS[-1]
    subprocess.run(
        [*as_user, bin_ / "initdb", "-E", "UTF8", "-D", data, "-A", "trust"], check=True, cwd="/"
    )
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    server: list[str | Path] = [*as_user, bin_ / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    subprocess.run([*server, "-o", options, "start"], check=True, cwd="/")
    yield folder
    subprocess.run([*server, "-m", "immediate", "stop"], check=True, cwd="/")
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def database(socket_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test an empty database."""
    for action in ("dropdb --force --if-exists", "createdb"):
        command: list[str | Path] = [
            PROGRAMS[-1] / action.split()[0],
            *action.split()[1:],
            "-h",
            socket_folder,
        ]
        subprocess.run([*command, "-U", "postgres", "study"], check=True)
    url = f"postgresql+psycopg2://postgres@/study?host={socket_folder}"
    monkeypatch.setenv("STUDY_DB", url)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("PY_SCRIPT", str(OBJECTIVE))


def start(rank: int, **env: str) -> subprocess.Popen[str]:
    """Start one worker."""
    return subprocess.Popen(
        [sys.executable, str(OBJECTIVE)],
        env={**os.environ, "WORKER_RANK": str(rank), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_workers_share_a_study(run: Run) -> None:
    assert run("init_optuna_db.py").returncode == 0
    workers = [start(rank, TOTAL_TRIALS="20", BEHAVIOUR="slow") for rank in range(WORKERS)]
    output = [worker.communicate(timeout=120)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, output
    trials = open_study(Settings.from_env()).get_trials()
    # README says so: with a server, the last trials may be too many by one per worker.
    assert 20 <= len(trials) < 20 + WORKERS
    assert [trial.number for trial in trials] == list(range(len(trials)))
    assert all(trial.state.is_finished() for trial in trials)


def test_stopped_worker_returns_its_trial_and_the_next_one_finishes_it(run: Run) -> None:
    assert run("init_optuna_db.py").returncode == 0
    worker = start(0, BEHAVIOUR="usr1", TOTAL_TRIALS="4")
    output = worker.communicate(timeout=60)[0]
    assert worker.returncode == 0, output
    study = open_study(Settings.from_env())
    returned = study.get_trials()[2]
    assert returned.state == TrialState.WAITING
    assert start(0, TOTAL_TRIALS="4").wait(timeout=60) == 0
    assert study.get_trials()[2].params == returned.params
    assert all(trial.state.is_finished() for trial in study.get_trials())


def test_server_that_does_not_answer_is_one_line(run: Run) -> None:
    url = "postgresql+psycopg2://postgres@127.0.0.1:9/study"
    result = run("init_optuna_db.py", STUDY_DB=url)
    assert result.returncode == 2
    assert "cannot be opened" in result.stderr
    assert "Traceback" not in result.stderr


def test_interrupt_during_a_trial(run: Run) -> None:
    assert run("init_optuna_db.py").returncode == 0
    worker = start(0, BEHAVIOUR="sleep", TOTAL_TRIALS="1")
    study = open_study(Settings.from_env())
    while not study.get_trials():
        assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=60)
    assert [trial.state for trial in study.get_trials()] == [TrialState.WAITING]
