"""Every value that a person can get wrong: one clear line, exit status 2, nothing made."""

from __future__ import annotations

from pathlib import Path

import pytest

from common import SCRIPTS, Run
from hpo.settings import Settings, UserError


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TOTAL_TRIALS", "0", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "-5", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "many", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "1.5", "an integer of 1 or more"),
        ("TOTAL_TRIALS", "٥", "an integer of 1 or more"),
        ("TRAIN_IMAGES", "60000", "from 128 to 50000"),
        ("SEED", "x", "an integer of 0 or more"),
        ("SAMPLER", "bayes", "choose one of: tpe, random"),
        ("PRUNER", "scissors", "choose one of: median, percentile"),
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


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the answer of the operating system is replaced, not the check.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(UserError, match="no permission to write"):
        Settings.from_env()
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
