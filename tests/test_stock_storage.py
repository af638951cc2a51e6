"""Optuna's own storages (MySQL, journal, gRPC): what they do not promise is said."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

import check_best_model
import init_optuna_db
from common import HELPERS, SCRIPTS, Run, wait_for
from hpo import settings as process
from hpo.job import count, return_trials
from hpo.settings import Settings, UserError, run_script
from hpo.study import opening, upkeep
from hpo.study.opening import create_or_open_study, open_study
from hpo.study.optuna_private import study_id
from hpo.study.serving import server
from hpo.values import without_password
from hpo.worker import _Lines

OBJECTIVE = HELPERS / "objective_for_tests.py"
PASSWORD = "pa55-w'ord:x"
URL = f"mysql://user:{PASSWORD}@127.0.0.1:9/study"


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Let the test's study be a journal file; return its URL."""
    url = f"journal:///{tmp_path}/study.journal"
    monkeypatch.setenv("STUDY_DB", url)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("PY_SCRIPT", str(OBJECTIVE))
    monkeypatch.setenv("TOTAL_TRIALS", "2")
    return url


def test_a_stuck_trial_is_said_and_goes_back(
    journal: str, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = create_or_open_study(Settings.from_env())
    command = [sys.executable, str(OBJECTIVE)]
    killed = subprocess.Popen(command, env={**os.environ, "BEHAVIOUR": "sleep", "LEASE_GRACE": "1"})

    def life() -> int:
        return sum(trial.system_attrs.get(upkeep.ALIVE, 0) for trial in study.get_trials())

    def sleep(seconds: float) -> None:  # so long that it can show life
        before = life()
        wait_for(lambda: life() > before)

    wait_for(life)
    with monkeypatch.context() as patch:
        patch.setattr(upkeep, "time", SimpleNamespace(sleep=sleep))
        assert upkeep.return_stuck(study, 2) == []
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    result = run(OBJECTIVE)
    assert result.returncode == 0, result.stdout
    assert "but 1 of its trials are RUNNING: on a worker, or for ever if that died" in result.stdout
    assert "the study has its 2 trials" not in result.stdout
    monkeypatch.setattr(sys, "argv", ["check_best_model.py"])
    assert check_best_model.main() == 0
    assert "python init_optuna_db.py --retry-stuck" in capsys.readouterr().out
    monkeypatch.setattr(init_optuna_db, "LONGEST_SLEEP", 0.1)
    monkeypatch.setattr(sys, "argv", ["init_optuna_db.py", "--retry-stuck"])
    Settings.from_env(LEASE_GRACE="1")
    assert init_optuna_db.main() == 0
    shown = capsys.readouterr().out
    assert "1 stuck trials go back to the queue" in shown
    assert "RUNNING" not in shown
    assert [trial.state for trial in study.get_trials()] == [
        TrialState.WAITING,
        TrialState.COMPLETE,
    ]


def test_a_trial_under_a_lease_is_nobody_else_s(own_study: Path) -> None:
    study = create_or_open_study(Settings.from_env())
    study.ask()
    stock = RDBStorage(f"sqlite:///{own_study}")  # a worker of stock Optuna's, without a lease
    stock.create_new_trial(study_id(study))
    assert upkeep.return_stuck(study, 0.1) == [1]
    assert [trial.state for trial in study.get_trials()] == [
        TrialState.RUNNING,
        TrialState.WAITING,
    ]


def test_nothing_is_made_by_looking(journal: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no study yet"):
        open_study(Settings.from_env())
    assert list(tmp_path.iterdir()) == []
    notes = tmp_path / "study.journal"
    notes.write_text("someone's notes\n")
    with pytest.raises(UserError, match="is no journal of Optuna's"):
        create_or_open_study(Settings.from_env())
    assert notes.read_text() == "someone's notes\n"


def test_the_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "MySQLdb", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"^STUDY_DB='mysql://user:\S+ needs mysqlclient, which"):
        create_or_open_study(Settings.from_env(STUDY_DB=URL))
    other = Settings.from_env(STUDY_DB="mysql+nodriver://user@host/db")
    with pytest.raises(UserError, match="nodriver"):
        create_or_open_study(other)


def test_a_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "CONNECT_SECONDS", 0.5)
    with pytest.raises(UserError, match="cannot be opened: GRPC connection timeout"):
        open_study(Settings.from_env(STUDY_DB="grpc://127.0.0.1:9"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://me:p:w@n1:5432/db, see", "postgresql://me:***@n1:5432/db, see"),
        ("('mysql://:pw@h/db')", "('mysql://:***@h/db')"),
        ("postgresql:///db?user=me&password=pw&x=1", "postgresql:///db?user=me&password=***&x=1"),
        ("sslpassword=pw", "sslpassword=***"),
        ("grpc://host:13000 or me@site", "grpc://host:13000 or me@site"),
        ("mysql://me@host/db?x=a:b", "mysql://me@host/db?x=a:b"),
    ],
)
def test_what_is_hidden(text: str, shown: str) -> None:
    assert without_password(text) == shown


TOOLS: list[tuple[Callable[[], int], list[str]]] = [
    (init_optuna_db.main, []),
    (check_best_model.main, []),
    (check_best_model.main, ["--watch"]),
    (check_best_model.main, ["--report", "report"]),
    (process.print_table, []),
    (process.print_table, ["given"]),
    (count.main, []),
    (return_trials.main, ["token", "crashed", "1"]),
    (server.main, ["1"]),
]


@pytest.mark.parametrize("works", [True, False], ids=["server", "no server"])
def test_no_tool_shows_a_password(
    works: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """With a server that answers (here a file stands for it), and with one that does not."""

    def storage(settings: Settings) -> RDBStorage:
        if works:
            return RDBStorage(f"sqlite:///{tmp_path}/stock.db")
        raise ConnectionError(f"no answer from {settings.study_db}")

    monkeypatch.setattr(opening, "_stock_storage", storage)
    monkeypatch.setenv("STUDY_DB", URL)
    monkeypatch.setenv("PY_SCRIPT", str(OBJECTIVE))
    monkeypatch.chdir(tmp_path)
    seen = ""
    for main, words in TOOLS:
        monkeypatch.setattr(sys, "argv", ["tool", *words])
        with pytest.raises(SystemExit) as ended:
            run_script(main)
        stdout, stderr = capfd.readouterr()
        seen += stdout + stderr
        fails = main is server.main or (not works and main is not process.print_table)
        assert ended.value.code == (2 if fails else 0), stderr
        assert stderr.count("\n") == (1 if fails else 0)
        if main is init_optuna_db.main and works:
            study = open_study(Settings.from_env())
            study.add_trial(optuna.create_trial(value=1.0))
            monkeypatch.setenv("TOTAL_TRIALS", "1")
            process.forget()
    assert seen.count("mysql://user:***@127.0.0.1:9/study") >= 5
    written = [p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file()]
    assert bool(written) == works
    assert not any("pa55" in text for text in [seen, *written])


def test_nor_does_a_worker_s_log_or_the_list_of_processes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        raise ConnectionError(f"no answer from {URL}")
    except ConnectionError:
        error = sys.exc_info()
    record = logging.LogRecord("hpo", logging.ERROR, "", 1, "%s", (URL,), error)
    line = _Lines("%(message)s").format(record)
    assert "Traceback" in line
    assert "pa55" not in line
    monkeypatch.setattr(sys, "argv", ["init_optuna_db.py", URL])
    with pytest.raises(UserError, match="everybody sees the password"):
        init_optuna_db.main()
    monkeypatch.setenv("STUDY_DB", "mysql://user:p@ss@host/db")
    with pytest.raises(UserError, match=r"in a password write / [?] # @ as %2F"):
        Settings.from_env()


def test_only_the_settings_know_the_url() -> None:
    """Whoever shows it takes `shown_db`: nothing else prints, logs or stores `study_db`."""
    users = {
        path.name
        for path in [*(SCRIPTS / "hpo").rglob("*.py"), *SCRIPTS.glob("*.py")]
        if ".study_db" in path.read_text().replace("options.study_db", "")
    }
    assert users == {"settings.py", "opening.py", "copying.py"}


@pytest.mark.parametrize("url", ["postgresql://u@127.0.0.1:9/study", "grpc://127.0.0.1:9"])
def test_the_server_is_asked_before_the_script_is_imported(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not answer takes seconds; to import torch first takes as many again."""
    script = tmp_path / "slow.py"
    script.write_text("raise SystemExit('imported')\ndef prepare(): run_worker\n")
    monkeypatch.setattr(opening, "CONNECT_SECONDS", 1)
    monkeypatch.setenv("PY_SCRIPT", str(script))
    monkeypatch.setenv("STUDY_DB", url)
    monkeypatch.setattr(sys, "argv", ["init_optuna_db.py"])
    with pytest.raises(UserError) as caught:
        init_optuna_db.main()
    assert "127.0.0.1" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == [script]
