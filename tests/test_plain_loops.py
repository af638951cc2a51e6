"""tests/plain_loops: ordinary scripts of several frameworks and their studies, 14 lines apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import SCRIPTS
from hpo.settings import Settings
from hpo.study.opening import open_study
from plain import LOOPS, changed, check_page, run_plain

FRAMEWORKS = ("xgboost", "lightgbm", "lightning", "keras", "folds")  # in the order of the page
OF_EACH = pytest.mark.parametrize("framework", FRAMEWORKS)


def both(framework: str) -> tuple[Path, Path]:
    """Return the plain script and its study."""
    return LOOPS / f"train_{framework}.py", LOOPS / f"study_{framework}.py"


@OF_EACH
def test_fewer_than_fifteen_lines_are_changed(framework: str) -> None:
    assert 0 < changed(*both(framework)) < 15


@OF_EACH
def test_its_page_shows_the_difference(framework: str) -> None:
    parts = re.split(r"^\d\. .*$", (LOOPS / "README.txt").read_text(), flags=re.MULTILINE)
    check_page(parts[1 + FRAMEWORKS.index(framework)], *both(framework))


def test_study_of_its_own(tmp_path: Path) -> None:
    """One of them as it is started by hand; test_boosting.py and others run the rest."""
    if not os.environ.get("CI"):
        pytest.importorskip("xgboost")
    done = subprocess.run(
        [sys.executable, str(LOOPS / "study_xgboost.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [trial] = open_study(Settings.from_env()).trials
    assert trial.value is not None
    assert trial.value < 2.3  # better than guessing


def test_script_and_study_with_folds(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("sklearn")
    trial = run_plain("folds")
    assert len(trial.intermediate_values) == 5
    assert 0.9 < float(capsys.readouterr().out.split()[-1]) < 1
