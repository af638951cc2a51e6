"""Creating, opening and refusing a study: by many at once, and with files that are no database."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from common import HELPERS, SCRIPTS, Run
from hpo import checkpoint
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study, open_study
from hpo.study.optuna_private import storage_of


def test_init_creates_opens_and_changes_nothing(run: Run, own_study: Path) -> None:
    first = run("init_optuna_db.py")
    assert first.returncode == 0, first.stderr
    assert f"study mnist_hpo is ready in sqlite:///{own_study} (0 of 500 trials)" in first.stdout
    study = open_study(Settings.from_env())
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    study.add_trial(optuna.create_trial(value=1.0))
    before = sqlite3.connect(own_study).execute("SELECT * FROM trials").fetchall()
    assert "(1 of 500 trials)" in run("init_optuna_db.py").stdout
    assert sqlite3.connect(own_study).execute("SELECT * FROM trials").fetchall() == before


def test_init_takes_the_arguments_of_the_guide(run: Run, tmp_path: Path) -> None:
    result = run("init_optuna_db.py", f"sqlite:///{tmp_path}/other.db", "other")
    assert result.returncode == 0, result.stderr
    names = optuna.get_all_study_names(storage=f"sqlite:///{tmp_path}/other.db")
    assert names == ["other"]
    assert run("init_optuna_db.py", "a", "b", "c").returncode == 2


def test_twelve_processes_create_one_study(own_study: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "init_optuna_db.py")]
    script = str(HELPERS / "objective_for_tests.py")  # soon imported: all twelve at once
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL}
    options["env"] = {**os.environ, "PY_SCRIPT": script}
    processes = [subprocess.Popen(command, **options) for _ in range(12)]
    assert [process.wait(timeout=600) for process in processes] == [0] * 12
    assert optuna.get_all_study_names(storage=f"sqlite:///{own_study}") == ["mnist_hpo"]
    files = {path.name for path in own_study.parent.iterdir()}
    # SQLite's two and the turn (hpo/study/engines/turn.py), and nothing left over
    assert files == {"study.db", "study.db-journal", "study.db.next"}


def test_second_study_in_the_same_file(own_study: Path) -> None:
    create_or_open_study(Settings.from_env())
    create_or_open_study(Settings.from_env(STUDY_NAME="second"))
    names = optuna.get_all_study_names(storage=f"sqlite:///{own_study}")
    assert sorted(names) == ["mnist_hpo", "second"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("DIRECTION", "maximize"), ("PY_SCRIPT", str(HELPERS / "objective_for_tests.py"))],
    ids=["direction", "script"],
)
def test_study_of_another_objective_is_refused(
    name: str, value: str, own_study: Path, run: Run
) -> None:
    create_or_open_study(Settings.from_env())
    before = own_study.read_bytes()
    result = run("init_optuna_db.py", **{name: value})
    assert result.returncode == 2
    assert "belongs to optuna_mnist.py (minimize)" in result.stderr
    assert "choose another STUDY_NAME" in result.stderr
    assert own_study.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"", "is empty"), (b"not a database, but someone's notes\n", "file is not a database")],
)
def test_file_that_is_no_database_is_left_alone(
    content: bytes, says: str, own_study: Path, run: Run
) -> None:
    own_study.write_bytes(content)
    for script in ("init_optuna_db.py", "check_best_model.py"):
        result = run(script)
        assert result.returncode == 2
        assert says in result.stderr
        assert "It was left as it is" in result.stderr
        assert "Traceback" not in result.stderr
    assert own_study.read_bytes() == content


def test_missing_study_lists_those_that_exist(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    assert "there is no study yet" in run("check_best_model.py").stderr
    create_or_open_study(Settings.from_env())
    result = run("check_best_model.py", STUDY_NAME="mnist_hp")
    assert result.returncode == 2
    assert "STUDY_NAME='mnist_hp' is not in" in result.stderr
    assert "studies there: mnist_hpo" in result.stderr


@pytest.mark.parametrize("url", ["grpc://host", "grpc://:1", "grpc://host:http"])
def test_grpc_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDY_DB", url)
    with pytest.raises(UserError, match="needs a host and a port"):
        open_study(Settings.from_env())


def test_journal_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STUDY_DB", f"journal:///{tmp_path}/study.journal")
    create_or_open_study(Settings.from_env())
    assert open_study(Settings.from_env()).study_name == "mnist_hpo"


def test_damaged_study_is_named_with_its_backup(own_study: Path, run: Run) -> None:
    study = create_or_open_study(Settings.from_env())
    study._storage.remove_session()
    backup = own_study.with_name("study.db.backup")
    backup.write_bytes(own_study.read_bytes())
    damaged = bytearray(own_study.read_bytes())
    damaged[5000:9000] = bytes(4000)
    own_study.write_bytes(damaged)
    result = run("init_optuna_db.py")
    assert result.returncode == 2
    assert f"{own_study} is damaged" in result.stderr
    assert f"its last backup is {backup}" in result.stderr
    assert own_study.read_bytes() == damaged


@pytest.mark.parametrize(("mask", "mode"), [(0o002, 0o664), (0o077, 0o600)])
def test_a_group_may_write_where_the_umask_lets_it(mask: int, mode: int, own_study: Path) -> None:
    """study.db, its journal, its backup, and what a trial leaves."""
    before = os.umask(mask)
    try:
        study = create_or_open_study(Settings.from_env())
        checkpoint.save(study.ask(), losses=[1.0])
        storage_of(study).file.backup(own_study.with_name("study.db.backup"))  # type: ignore[attr-defined]
    finally:
        os.umask(before)
    files = {path.name: path for path in own_study.parent.rglob("*") if path.is_file()}
    assert {"study.db", "study.db-journal", "study.db.next", "study.db.backup"} < set(files)
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {mode}
    for folder in (path.parent for path in files.values() if path.parent != own_study.parent):
        assert folder.stat().st_mode & 0o777 == 0o777 & ~mask


def test_init_returns_the_trials_of_a_job_that_has_left_the_queue(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "100")
    study = create_or_open_study(Settings.from_env())
    study.ask().suggest_float("x", 0, 1)  # and the job dies
    monkeypatch.setenv("SLURM_JOB_ID", "101")
    assert "goes back" not in run("init_optuna_db.py", ALIVE_JOBS="100 101").stdout
    # Slurm shows one's own jobs: of those of a colleague who shares the study it says nothing.
    assert "goes back" not in run("init_optuna_db.py", ALIVE_JOBS="101", SLURM_JOB_USER="b").stdout
    assert "trial 0 of a job that has ended goes back to the queue" in (
        run("init_optuna_db.py", ALIVE_JOBS="101").stdout
    )
    assert [trial.state.name for trial in study.get_trials()] == ["WAITING"]
