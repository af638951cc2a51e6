"""tests/plain_training: an ordinary training script and its study, 30 lines apart; both run."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys

from common import BUNDLE, SCRIPTS, Run
from hpo.settings import Settings
from hpo.study.opening import open_study

FOLDER = BUNDLE / "tests" / "plain_training"
MOST_CHANGED = 30  # lines


def lines(name: str) -> list[str]:
    """Return the lines of a script that are not blank."""
    return [line for line in (FOLDER / name).read_text().splitlines() if line.strip()]


def test_thirty_lines_are_changed() -> None:
    before, after = lines("train.py"), lines("my_study.py")
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    changed = sum(
        max(old_end - old, new_end - new)
        for kind, old, old_end, new, new_end in matcher.get_opcodes()
        if kind != "equal"
    )
    assert 0 < changed <= MOST_CHANGED


def test_its_readme_shows_the_difference() -> None:
    diff = difflib.unified_diff(lines("train.py"), lines("my_study.py"), n=1, lineterm="")
    expected = ["@@" if line.startswith("@@") else line for line in diff][2:]  # without the names
    text = (FOLDER / "README.txt").read_text()
    shown = re.search(r"^    @@\n(    .*\n)+", text, re.MULTILINE)
    assert shown, "\n".join(f"    {line}" for line in expected)
    assert [line[4:] for line in shown[0].splitlines()] == expected


def run_plain(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the two as it would run in the scripts' folder, where it is copied to."""
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        cwd=SCRIPTS,  # ../data is seen from there
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_both_train(run: Run) -> None:
    # torchvision takes no image that is still packed: in a fresh clone it would download them.
    assert run("init_optuna_db.py", STUDY_NAME="unpacks_the_images").returncode == 0
    plain = run_plain("train.py", "--images", "1000", "--epochs", "2")
    assert plain.returncode == 0, plain.stderr
    losses = [float(loss) for loss in re.findall(r"validation loss (\S+)", plain.stdout)]
    assert losses[1] < losses[0] < 2.3  # better than guessing
    study = run_plain("my_study.py")
    assert study.returncode == 0, study.stdout + study.stderr
    assert len(open_study(Settings.from_env()).trials) == 2
    assert "2 of 2 trials: 2 complete" in run("check_best_model.py").stdout
