"""tests/plain_loops: ordinary scripts of several frameworks and their studies, 14 lines apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from common import BUNDLE, SCRIPTS
from hpo.settings import Settings
from hpo.study.opening import open_study
from plain import changed, check_page

FOLDER = BUNDLE / "tests" / "plain_loops"
FRAMEWORKS = ("xgboost", "lightgbm", "lightning", "keras", "folds")  # in the order of the page
MODULES = {"folds": "sklearn"}
OF_EACH = pytest.mark.parametrize("framework", FRAMEWORKS)


def both(framework: str) -> tuple[Path, Path]:
    """Return the plain script and its study."""
    return FOLDER / f"train_{framework}.py", FOLDER / f"study_{framework}.py"


@OF_EACH
def test_fewer_than_fifteen_lines_are_changed(framework: str) -> None:
    assert 0 < changed(*both(framework)) < 15


@OF_EACH
def test_its_page_shows_the_difference(framework: str) -> None:
    parts = re.split(r"^\d\. .*$", (FOLDER / "README.txt").read_text(), flags=re.MULTILINE)
    check_page(parts[1 + FRAMEWORKS.index(framework)], *both(framework))


@OF_EACH
def test_study_runs(framework: str, tmp_path: Path) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip(MODULES.get(framework, framework))
    done = subprocess.run(
        [sys.executable, str(both(framework)[1])],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(SCRIPTS),
            "TOTAL_TRIALS": "1",
            "OMP_NUM_THREADS": "1",
            "DIRECTION": "maximize" if framework == "folds" else "minimize",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [trial] = open_study(Settings.from_env()).trials
    assert trial.value is not None
    assert trial.value > 0.3 if framework == "folds" else trial.value < 2.3  # better than guessing
