"""STUDY_DB=postgresql:job: the launch scripts start a PostgreSQL, and keep the study's copy."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from common import LIMIT, SCRIPTS
from hpo.settings import Settings, UserError
from hpo.study import copying
from hpo.study.engines.postgresql import PostgreSQL
from hpo.study.opening import create_or_open_study, open_study
from hpo.study.serving import own_server
from hpo.study.serving.served import Server, announce, database_of, find_server, server_path
from hpo.values import OWN_SERVER
from postgresql_server import PostgreSQLServer, ask
from storage_helpers import NAME, make_study, storage_of, train
from storage_helpers import open_study as open_path

COPY = "postgresql-job.mnist_hpo.backup"
MY_SCRIPT = """
import os, time
from hpo.settings import run_script
from hpo.worker import run_worker

def objective(trial):
    x = trial.suggest_float("x", -1, 1)
    while any(trial.number >= n and not os.path.exists(f"from {n}") for n in (5, 12)):
        time.sleep(0.05)
    time.sleep(0.3)
    with open("ended", "a") as file:
        file.write(f"{trial.number}\\n")
    return x

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""


def wait_for(condition: Callable[[], Any], launcher: subprocess.Popen[str]) -> None:
    """Wait for what must happen while the launch script runs."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


def trials_of(copy: Path) -> list[optuna.trial.FrozenTrial]:
    """Return the trials of the study's copy."""
    return optuna.load_study(study_name="mnist_hpo", storage=f"sqlite:///{copy}").get_trials()


@pytest.fixture
def launch(local: Path, programs: Path) -> Callable[[], subprocess.Popen[str]]:
    """Return what starts run-optuna-local.sh on a study of 16 trials."""
    (local / "my.py").write_text(MY_SCRIPT)
    env = {"STUDY_DB": OWN_SERVER, "TOTAL_TRIALS": "16", "PY_SCRIPT": "my.py", "PRUNER": "none"}
    env["OMP_NUM_THREADS"] = "2"  # nproc says so, too: two workers, on any machine
    return lambda: subprocess.Popen(
        ["bash", str(local / "run-optuna-local.sh")],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )


def test_a_server_dies_the_study_is_stopped_and_goes_on(
    launch: Callable[[], subprocess.Popen[str]], local: Path, programs: Path
) -> None:
    """The server is killed, then Ctrl-C, then the same command: each trial once, none lost."""
    ended, copy = local / "ended", local / COPY
    launcher = launch()
    wait_for(lambda: ended.exists() and len(ended.read_text().split()) > 2, launcher)
    (pid_file,) = programs.glob("optuna-postgresql.*/data/postmaster.pid")
    there = local / "postgresql-job.server"
    assert there.stat().st_mode & 0o777 == 0o600
    secret = find_server(local / "postgresql-job").secret  # type: ignore[union-attr]
    os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
    before = len(ended.read_text().split())
    (local / "from 5").touch()
    wait_for(lambda: len(ended.read_text().split()) > before + 2, launcher)
    os.killpg(launcher.pid, signal.SIGINT)
    first, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 130, first
    assert "the study's server died with status 137: starting it again (1 of 3)" in first
    assert not there.exists()
    assert list(programs.iterdir()) == []
    states = Counter(trial.state for trial in trials_of(copy))
    assert states[TrialState.COMPLETE] > before
    assert TrialState.RUNNING not in states
    (local / "from 12").touch()
    launcher = launch()
    second, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 0, second
    assert f"{states.total()} trials from the last copy" in second
    trials = trials_of(copy)
    assert [trial.number for trial in trials] == list(range(16))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    logs = "".join(path.read_text() for path in (local.parent / "logs").glob("local.*out"))
    assert secret not in first + second + logs
    assert list(programs.iterdir()) == []


def test_without_its_programs_it_is_one_line(tmp_path: Path) -> None:
    shell = "source hpo/job/own_server.sh; own_programs=false; run_python=(python3)"
    done = subprocess.run(
        ["bash", "-c", f"{shell}; start_own_server {tmp_path}/log"],
        env={**os.environ, "STUDY_DB": OWN_SERVER},
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "needs PostgreSQL's programs, postgres and initdb" in done.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let what lies beside the scripts lie in a folder of the test's own."""
    monkeypatch.setattr(Settings, "beside", property(lambda self: tmp_path))
    copy = property(lambda self: tmp_path / f"{self.database}.{self.study_name}.backup")
    monkeypatch.setattr(Settings, "backup_path", copy)
    return tmp_path


def test_typed_by_hand_it_is_one_line(folder: Path) -> None:
    for act in (create_or_open_study, open_study):
        with pytest.raises(UserError, match=r"^STUDY_DB=postgresql:job is there while a .*backup$"):
            act(Settings.from_env(STUDY_DB=OWN_SERVER))
    assert list(folder.iterdir()) == []


def test_a_copy_is_put_back_and_others_read_it(
    folder: Path, server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_NAME", NAME)
    file = make_study(folder)
    study = open_path(file, total_trials=4)
    study.tell(trial := study.ask(), train(trial))
    study.ask()  # runs when the copy is made
    storage_of(study).remove_session()
    settings = Settings.from_env(STUDY_DB=OWN_SERVER)
    assert settings.backup_path
    shutil.move(file, settings.backup_path)
    url = server.empty("own")
    assert copying.restore(settings, PostgreSQL(url)) == 2
    rows = "SELECT number, state::text, owner FROM trials LEFT JOIN leases USING (trial_id)"
    assert ask(url, f"{rows} ORDER BY 1") == [(0, "COMPLETE", None), (1, "WAITING", None)]
    assert len(open_study(settings).get_trials()) == 2  # of the copy: no server is known here
    other = Server("88@1", "n2", "127.0.0.1", [9], "secret")
    assert announce(database_of(settings), other)
    assert len(open_study(settings).get_trials()) == 2
    with pytest.raises(UserError, match="job 88 of 1 on n2 has this study: wait until"):
        create_or_open_study(settings)


def test_a_server_that_is_dead_is_forgotten(folder: Path) -> None:
    settings = Settings.from_env(STUDY_DB=OWN_SERVER)
    here = os.uname().nodename
    with socket.create_server(("127.0.0.1", 0)) as lives:
        port = lives.getsockname()[1]
        for host, alive in ((here, True), ("elsewhere", False)):
            assert announce(database_of(settings), Server("", host, "127.0.0.1", [port], "s"))
            with pytest.raises(UserError, match="has this study: wait until it has ended"):
                own_server.begin(settings, folder, [])
            server_path(database_of(settings)).unlink()
            assert alive or not (folder / "password").exists()
    assert announce(database_of(settings), Server("", here, "127.0.0.1", [port], "s"))
    assert own_server.begin(settings, folder, []) == 0
    assert not server_path(database_of(settings)).exists()
    assert (folder / "password").stat().st_mode & 0o777 == 0o600
