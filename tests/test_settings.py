"""Every value that a person can get wrong: one clear line, exit status 2, nothing made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import SCRIPTS, Run
from hpo.settings import DEFAULTS, VARIABLES, Settings, UserError
from hpo.study.opening import create_or_open_study
from hpo.values import misspelt


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TOTAL_TRIALS", "0", "an integer from 1 to 999999999"),
        ("TOTAL_TRIALS", "-5", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "many", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "1.5", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "٥", "an integer of 1 or more"),
        ("TRAIN_IMAGES", "60000", "from 128 to 50000"),
        ("SEED", "x", "an integer from 0 to 4294967295"),
        ("SEED", "4294967296", "an integer from 0 to 4294967295"),
        ("SLURM_JOB_END_TIME", "abc", "is no number"),
        ("STUDY_NAME", "é" * 101, "at most 100"),
        ("STUDY_DB", "sqlite:///study.db?mode=ro", "nothing may follow"),
        ("STUDY_DB", f"sqlite:///{'n' * 250}.db", "too long"),
        ("PY_SCRIPT", ".", "is no Python script"),
        ("PY_SCRIPT", f"{'n' * 300}.py", "is no Python script"),
        ("FIX", "lr", "is not NAME=VALUE"),
        ("PRUNER", "median:fast", "is not NAME=VALUE"),
        ("STOP_VALUE", "low", "is no number"),
        ("SCRIPT_ARGS", "--name 'one", "No closing quotation"),
        ("SAMPLER", "bayes", "choose one of: tpe, random"),
        ("PRUNER", "scissors", "choose one of: halving, median"),
        ("DIRECTION", "down", "choose one of: minimize, maximize"),
        ("STUDY_NAME", "../up", "letters, digits"),
        ("STUDY_DB", "study.db", "give sqlite:///study.db"),
        ("STUDY_DB", "sqlite:///", "give sqlite:///study.db"),
        ("STUDY_DB", "/optuna_workdir/study.db", "give sqlite:///study.db"),
        ("STUDY_DB", "sqlite:////no/such/folder/study.db", "does not exist; create it first"),
        ("STUDY_DB", "sqlite:////tmp", "is a folder"),
    ],
)
def test_wrong_value_is_named(
    name: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=name) as caught:
        Settings.from_env()
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2


@pytest.mark.parametrize("script", ["init_optuna_db.py", "optuna_mnist.py", "check_best_model.py"])
def test_scripts_refuse_with_status_2_and_no_traceback(script: str, run: Run) -> None:
    result = run(script, TOTAL_TRIALS="none")
    assert result.returncode == 2
    assert result.stderr.startswith(f"{script}: error: TOTAL_TRIALS='none' is not an integer")
    assert len(result.stderr.splitlines()) == 1


def test_a_misspelt_setting_is_told_of_before_a_trial(run: Run) -> None:
    done = run("init_optuna_db.py", TOTAL_TRIAL="7", seed="1", SEEDS="2")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "TOTAL_TRIAL is no setting, and changes nothing: is TOTAL_TRIALS meant?",
        "seed is no setting, and changes nothing: is SEED meant?",
    ]
    assert "0 of 500 trials" in done.stdout


def test_the_other_variables_of_a_job_are_not_taken_for_settings() -> None:
    """Those that the launch scripts read and Slurm sets."""
    text = "".join(path.read_text() for path in SCRIPTS.glob("**/*.sh"))
    found = set(re.findall(r"\b[A-Z][A-Z_]{3,}\b", text))
    assert {"SLURM_JOB_ID", "DRAIN_FILE"} <= found
    assert misspelt(found, list(DEFAULTS)) == []


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the answer of the operating system is replaced, not the check.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write"):
        create_or_open_study(Settings.from_env())
    assert list(tmp_path.iterdir()) == []


def test_relative_database_is_in_the_scripts_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("STUDY_DB", "sqlite:///study.db")
    monkeypatch.chdir(tmp_path)
    settings = Settings.from_env()
    assert settings.study_db == f"sqlite:///{SCRIPTS}/study.db"
    assert settings.checkpoints == SCRIPTS / "checkpoints" / "study.db" / "mnist_hpo"
    other = Settings.from_env(STUDY_DB="sqlite:///other.db")
    assert other.checkpoints != settings.checkpoints  # one name, two studies


def test_empty_variable_means_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOTAL_TRIALS", "SAMPLER", "SEED", "STUDY_NAME"):
        monkeypatch.setenv(name, "")
    settings = Settings.from_env()
    assert (settings.total_trials, settings.sampler, settings.seed) == (500, "tpe", None)


def test_rank_of_a_slurm_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert Settings.from_env().rank == 3


def test_environment_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Settings.from_env()
    monkeypatch.setenv("TOTAL_TRIALS", "7")
    assert Settings.from_env() is first
    # Who gives something reads anew, and the rest of the process follows.
    assert Settings.from_env(STUDY_NAME="other").total_trials == 7
    assert Settings.from_env().study_name == "other"


def test_options_and_fixed_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings.from_env(
        PRUNER="median:n_warmup_steps=5,n_startup_trials=10",
        FIX="batch_size=64,layers=(8, 8),name=adam,lr=1e-3",
    )
    assert settings.pruner == "median"
    assert settings.pruner_options == {"n_warmup_steps": 5, "n_startup_trials": 10}
    assert settings.fixed == {"batch_size": 64, "layers": (8, 8), "name": "adam", "lr": 1e-3}


def print_table(*words: str, **env: str) -> str:
    """Return what python -m hpo.settings prints."""
    command = [sys.executable, "-m", "hpo.settings", *words]
    return subprocess.check_output(command, cwd=SCRIPTS, env={**os.environ, **env}, text=True)


def test_table_names_every_setting_and_what_was_given() -> None:
    table = print_table(FIX="a=1")
    assert [line.split()[0] for line in table.splitlines()] == [v.name for v in VARIABLES]
    assert "FIX              a=1 " in table
    given = print_table("given", FIX="a=1", SCRIPT_ARGS="--data 'my data'")
    assert "FIX=a=1" in given
    assert """SCRIPT_ARGS='--data '"'"'my data'"'"''""" in given
    assert "SAMPLER" not in given
