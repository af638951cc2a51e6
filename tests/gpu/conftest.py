"""What needs a GPU: `bash tests/run.sh gpu`.  Prints one table, and adds it to FIGURES."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest
import torch

from common import BUNDLE, SCRIPTS
from hpo import gpu

FIGURES = BUNDLE / "tests" / "benchmarks" / "gpu-figures.txt"
USER_SCRIPT = Path(__file__).parent / "user_script.py"
Row: TypeAlias = Callable[[str], None]
rows: list[tuple[str, str, str]] = []  # test, outcome, what was found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip all of it, with one reason, where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture
def row(request: pytest.FixtureRequest) -> Iterator[Row]:
    """Return a function that notes what was found, for the table."""
    found: list[str] = []
    yield found.append
    rows.append((request.node.name.removeprefix("test_"), "", "; ".join(found)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note each test that failed or passed."""
    report = yield
    if report.when == "call" or report.outcome == "failed":
        rows.append((item.name.removeprefix("test_"), report.outcome, ""))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, and write it where README's figures come from."""
    if not rows:
        return
    name = f"{torch.cuda.get_device_name()} ({gpu.uuids()[0]}), torch {torch.__version__}"
    merged: dict[str, list[str]] = {}
    for test, *found in rows:
        merged.setdefault(test, []).extend(filter(None, found))
    table = [name, *(f"  {test:58} {'  '.join(found)}" for test, found in merged.items()), ""]
    terminalreporter.write_line("\n".join(table))
    with FIGURES.open("a") as file:
        file.write("\n".join(table) + "\n")


@pytest.fixture
def python(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that runs a Python script in a process of its own; returns what it said."""
    folders = (SCRIPTS, BUNDLE / "tests" / "helpers", BUNDLE / "tests" / "benchmarks")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.delenv("TRAIN_IMAGES", raising=False)

    def run(*command: str | Path, **env: str) -> str:
        result = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=SCRIPTS,
            env={**os.environ, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    return run


@pytest.fixture
def worker(python: object) -> Callable[..., str]:
    """Return a function that runs a worker of user_script.py as a job does; returns its log."""

    def run(**env: str) -> str:
        keeper = SCRIPTS / "hpo" / "job" / "keep_running.sh"
        result = subprocess.run(
            ["bash", str(keeper), str(USER_SCRIPT), sys.executable],
            env={**os.environ, "SAMPLER": "random", "PRUNER": "none", **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    return run
