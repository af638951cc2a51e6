"""tests/plain_training: an ordinary training script and its study, 30 lines apart; both run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from common import BUNDLE, SCRIPTS, Run
from hpo.settings import Settings
from hpo.study.opening import open_study
from plain import changed, check_page

FOLDER = BUNDLE / "tests" / "plain_training"
MOST_CHANGED = 30  # lines


def test_thirty_lines_are_changed() -> None:
    assert 0 < changed(FOLDER / "train.py", FOLDER / "my_study.py") <= MOST_CHANGED


def test_its_readme_shows_the_difference() -> None:
    check_page((FOLDER / "README.txt").read_text(), FOLDER / "train.py", FOLDER / "my_study.py")


def run_plain(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the two, with few images to validate, as in the scripts' folder, its place."""
    text, number = re.subn(
        r"range\(50_000, 60_000\)", "range(50_000, 50_500)", (FOLDER / script).read_text()
    )
    assert number == 1
    (folder / script).write_text(text)
    return subprocess.run(
        [sys.executable, str(folder / script), *arguments],
        cwd=SCRIPTS,  # ../data is seen from there
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "2", "PRUNER": "none"},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_both_train(run: Run, tmp_path: Path) -> None:
    # torchvision takes no image that is still packed: in a fresh clone it would download them.
    assert run("init_optuna_db.py", STUDY_NAME="unpacks_the_images").returncode == 0
    plain = run_plain(tmp_path, "train.py", "--images", "1000", "--epochs", "2")
    assert plain.returncode == 0, plain.stderr
    losses = [float(loss) for loss in re.findall(r"validation loss (\S+)", plain.stdout)]
    assert losses[1] < losses[0] < 2.3  # better than guessing
    study = run_plain(tmp_path, "my_study.py")
    assert study.returncode == 0, study.stdout + study.stderr
    assert len(open_study(Settings.from_env()).trials) == 2
    assert "2 of 2 trials: 2 complete" in run("check_best_model.py").stdout
