"""What tests of plain scripts and their studies share: the difference that a page shows."""

from __future__ import annotations

import difflib
import re
import runpy
from pathlib import Path

import optuna
from optuna.trial import TrialState

from common import BUNDLE
from hpo.drain import Drain
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study
from hpo.trial import run_trial

LOOPS = BUNDLE / "tests" / "plain_loops"


def lines(path: Path) -> list[str]:
    """Return the lines of a script that are not blank."""
    return [line for line in path.read_text().splitlines() if line.strip()]


def changed(before: Path, after: Path) -> int:
    """Return how many lines one changes to make a study of a script."""
    matcher = difflib.SequenceMatcher(None, lines(before), lines(after), autojunk=False)
    return sum(
        max(old_end - old, new_end - new)
        for kind, old, old_end, new, new_end in matcher.get_opcodes()
        if kind != "equal"
    )


def check_page(text: str, before: Path, after: Path) -> None:
    """Check that a page shows the difference; `text` ends before the next one."""
    diff = difflib.unified_diff(lines(before), lines(after), n=1, lineterm="")
    expected = ["@@" if line.startswith("@@") else line for line in diff][2:]  # without the names
    shown = re.search(r"^    @@\n(    .*\n)+", text, re.MULTILINE)
    assert shown, "\n".join(f"    {line}" for line in expected)
    assert [line[4:] for line in shown[0].splitlines()] == expected


def run_plain(framework: str) -> optuna.trial.FrozenTrial:
    """Run a script of plain_loops, then one trial of its study, in this process; return that."""
    runpy.run_path(str(LOOPS / f"train_{framework}.py"), run_name="__main__")
    return run_study(framework)


def run_study(framework: str) -> optuna.trial.FrozenTrial:
    """Run one trial of a study of plain_loops in this process; return it."""
    objective = runpy.run_path(str(LOOPS / f"study_{framework}.py"))["objective"]
    study = create_or_open_study(Settings.from_env())
    outcome = run_trial(study, study.ask(), objective, Drain(float("inf")))
    assert outcome.state == TrialState.COMPLETE, outcome.reason
    return study.trials[0]
