"""README's chapter 7: optuna-dashboard shows a study while a worker writes, and changes nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from common import HELPERS, SCRIPTS, Run, wait_for
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study
from hpo.study.trials import best_trials

OBJECTIVE = HELPERS / "objective_for_tests.py"
TRIALS = 10

if not importlib.util.find_spec("optuna_dashboard") and "CI" not in os.environ:
    pytest.skip("needs optuna-dashboard (group test)", allow_module_level=True)


@pytest.fixture
def address() -> str:
    """Return a free address for a server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def dashboard(run: Run, own_study: Path, address: str) -> Iterator[Callable[[str], str]]:
    """Start the dashboard as README does, on a new study; return what fetches a page of it."""
    assert run("init_optuna_db.py", PY_SCRIPT=str(OBJECTIVE)).returncode == 0
    host, port = address.split(":")
    program = str(Path(sys.executable).with_name("optuna-dashboard"))
    command = [program, f"sqlite:///{own_study}", "--host", host, "--port", port]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def page(path: str) -> str:
        for _ in range(600):
            try:
                with urlopen(f"http://{address}{path}", timeout=30) as answer:
                    return str(answer.read().decode())
            except URLError:
                assert server.poll() is None, "the dashboard has ended"
                time.sleep(0.1)
        raise TimeoutError("the dashboard does not answer")

    yield page
    server.terminate()
    server.wait()


def trials(page: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the trials that the dashboard shows."""
    found: list[dict[str, Any]] = json.loads(page("/api/studies/1"))["trials"]
    return found


def test_dashboard_follows_a_worker(
    dashboard: Callable[[str], str], own_study: Path, tmp_path: Path
) -> None:
    assert "<title>Optuna Dashboard</title>" in dashboard("/dashboard")
    worker = subprocess.Popen(
        [sys.executable, str(OBJECTIVE)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": str(TRIALS),
             "GATES": str(tmp_path), "PRUNER": "none"},
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for number in range(5):
        (tmp_path / f"{number}").touch()
    # It is watched while it works, though the dashboard reads at most every ten seconds.
    states = {"Complete": 5, "Running": 1}
    wait_for(lambda: Counter(t["state"] for t in trials(dashboard)) == states)
    for number in range(5, TRIALS):
        (tmp_path / f"{number}").touch()
    assert worker.wait() == 0
    before = hashlib.sha256(own_study.read_bytes()).hexdigest()
    states = {"Complete": TRIALS}
    wait_for(lambda: Counter(t["state"] for t in trials(dashboard)) == states)
    summaries = json.loads(dashboard("/api/studies"))["study_summaries"]
    assert [study["study_name"] for study in summaries] == ["mnist_hpo"]
    assert hashlib.sha256(own_study.read_bytes()).hexdigest() == before


def test_what_the_page_says_that_it_gets_wrong(
    dashboard: Callable[[str], str], own_study: Path
) -> None:
    """When this fails, OWN_MODEL.txt and MON_MODELE.txt (chapter 8) say too much."""
    study = create_or_open_study(Settings.from_env(PY_SCRIPT=str(OBJECTIVE)))
    for value, memory in ((0.1, 1.0), (0.5, -1.0)):
        trial = study.ask()
        trial.set_constraint("memory", memory)
        study.tell(trial, value)
    assert [trial.number for trial in best_trials(study)] == [1]
    wait_for(lambda: len(trials(dashboard)) == 2)
    seen = json.loads(dashboard("/api/studies/1"))
    assert [trial["number"] for trial in seen["best_trials"]] == [0]
    assert [trial["constraints"] for trial in seen["trials"]] == [[], []]
