"""Fixtures of all tests: each test has a study of its own; scripts run as a user runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import BUNDLE, SCRIPTS, SETTINGS, Run
from hpo.settings import forget
from hpo.study.engines.postgresql import PostgreSQL
from postgresql_server import AS_POSTGRES, PROGRAMS, PostgreSQLServer, wanted
from storage_helpers import make_study


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPU: many tests compare to the last bit, which only a CPU repeats.

    What needs a GPU is in tests/gpu, which `bash tests/run.sh gpu` runs by itself.
    """
    if [Path(argument).name for argument in config.args] != ["gpu"]:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


@pytest.fixture(autouse=True)
def own_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a study.db of its own, whatever the caller's environment; return its path."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    forget()  # what an earlier test's process has read
    monkeypatch.setenv("STUDY_DB", f"sqlite:///{tmp_path}/study.db")
    monkeypatch.setenv("TRAIN_IMAGES", "200")
    return tmp_path / "study.db"


@pytest.fixture(scope="session")
def server() -> Iterator[PostgreSQLServer]:
    """Start a PostgreSQL server; its database `study` has the tables."""
    if why := wanted():
        pytest.skip(why)
    server = PostgreSQLServer(Path("/tmp") / f"pg-{os.getpid()}")
    PostgreSQL(server.empty("study")).close()
    yield server
    server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Give the test a new study on each engine: study.db, or study.url with a server's URL."""
    if request.param == "sqlite":
        yield make_study(tmp_path)
        return
    server: PostgreSQLServer = request.getfixturevalue("server")
    (tmp_path / "study.url").write_text(server.with_study("study"))
    yield tmp_path / "study.url"


@pytest.fixture
def tiny_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the test's optuna_t5.py have 200 pairs of its own, and the small search space."""
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{number}\t{number:b}\n" for number in range(200)))
    monkeypatch.setenv("DATA", str(path))
    monkeypatch.setenv("SMALL", "1")
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Return a function that runs a script in another folder and returns what it printed."""

    def run_script(
        script: str | Path, *arguments: str, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(SCRIPTS / script), *arguments],
            cwd=tmp_path,
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            timeout=1500,
        )

    return run_script


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a copy of the bundle, as it is unpacked: without what a run or a tool has made."""
    made = ("tests", ".*", "__pycache__", "*-ubyte", "*.tsv", "*.db*", "checkpoints", "report-*")
    ignore = shutil.ignore_patterns(*made, "*.out")
    return Path(shutil.copytree(BUNDLE, tmp_path / "optuna", symlinks=True, ignore=ignore))


@pytest.fixture
def local(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the bundle whose .venv is this test's Python, so nothing is installed."""
    venv = bundle / ".venv"
    venv.mkdir()
    for path in Path(sys.prefix).iterdir():
        (venv / path.name).symlink_to(path)
    (venv / "installed-run.toml").unlink(missing_ok=True)
    shutil.copy(bundle / "pyproject.toml", venv / "installed-run.toml")
    monkeypatch.delenv("STUDY_DB")
    return bundle / "code_and_slurm-scripts"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Let root start PostgreSQL's programs, as its user; return the folder for their data."""
    if why := wanted():
        pytest.skip(why)
    tools = tmp_path / "programs"
    tools.mkdir()
    as_postgres = f"cd / && exec {' '.join(AS_POSTGRES)} {PROGRAMS[-1]}"
    give = '[[ $1 != --pgdata=* ]] || chown -R postgres "$(dirname "${1#*=}")"'  # own_server.sh
    for name, first in (("initdb", give), ("postgres", ":")):
        (tools / name).write_text(f'#!/bin/bash\n{first}\n{as_postgres}/{name} "$@"\n')
        (tools / name).chmod(0o755)
    folder = Path(tempfile.mkdtemp(prefix="own-"))  # in /tmp, for its user cannot enter tmp_path
    folder.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)
