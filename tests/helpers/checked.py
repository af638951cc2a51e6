"""For tests of --check: a script of a user, what is changed in it, and the rows of its table."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from common import SCRIPTS, Run

# Without torch, which takes seconds: it goes on from the reports that the study has of it.
TOY = """
import optuna
from hpo.settings import run_script
from hpo.worker import run_worker

def search_space(trial):
    config = {
        "lr": trial.suggest_float("lr", 0.1, 0.9),
        "layers": trial.suggest_int("layers", 1, 5),
        "epochs": trial.suggest_categorical("epochs", [4, 2, 6]),
    }
    return {**config, "sum": config["lr"] + config["layers"]}  # which is no use of them

def train_model(config, trial):
    losses = list(trial.study.get_trials()[0].intermediate_values.values())
    for epoch in range(len(losses), config["epochs"]):
        losses.append((losses or [1.0])[-1] * config["lr"] / config["layers"])
        trial.report(losses[-1], epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return losses[-1]

def objective(trial):
    return train_model(search_space(trial), trial)

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""
PATIENT = Path(__file__).with_name("patient.py")
# The check's clock, which goes on in an epoch alone, for how long it is said to take: the machine
# that the tests run on may be as slow as it likes.
CLOCK = """
from hpo.check import bench, short_trial
class clock:  # the hand is not the script's: what that counts begins anew with each trial
    monotonic = staticmethod(lambda: bench.now)
    def epoch(seconds):
        bench.now += seconds
bench.now = 0.0
bench.time = short_trial.time = clock

if __name__"""
# A net that fits a sum of 4 numbers; {before}, {epoch} and {after} are lines of a test.
NET = """
import copy, random
import optuna, torch
from hpo import checkpoint
from hpo.settings import run_script
from hpo.worker import run_worker

def search_space(trial):
    return {
        "lr": trial.suggest_float("lr", 1e-3, 1e-1, log=True),
        "epochs": trial.suggest_categorical("epochs", [4, 8]),
    }

def train_model(config, trial):
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"], momentum=0.9)
    noise = 0.0
    # before
    losses = checkpoint.load(trial, model, optimizer)
    # loaded
    for epoch in range(len(losses), config["epochs"]):
        # epoch
        for i in torch.randperm(64).split(16):
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x[i]) + noise, y[i]).backward()
            optimizer.step()
        loss = torch.nn.functional.mse_loss(model(x), y).item()
        # after
        losses.append(loss)
        trial.report(losses[-1], epoch)
        checkpoint.save(trial, model, optimizer, losses)
        if trial.should_prune():
            raise optuna.TrialPruned
    return losses[-1]

def objective(trial):
    return train_model(search_space(trial), trial)

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""

Change: TypeAlias = "tuple[str, str]"  # old text, new text
Checker: TypeAlias = Callable[..., "tuple[int, dict[str, str], str]"]


def lines(**places: str) -> list[Change]:
    """Return the changes that put lines at the places of NET that are named."""
    indents = {"before": 4, "loaded": 4, "epoch": 8, "after": 8}
    return [
        (f"# {place}\n", text.replace("\n", "\n" + " " * indents[place]) + "\n")
        for place, text in places.items()
    ]


def rows(shown: str) -> dict[str, str]:
    """Return the table of a check: name → verdict and text."""
    found = re.findall(r"^(\S+(?: trial)?) +((?:ok|MEND|look|about|-) .*)", shown, re.M)
    return {name: re.sub(" +", " ", text) for name, text in found}


@pytest.fixture
def check(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Checker:
    """Return a function that changes a script and checks it: status, rows, all that was printed."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))

    def checked(text: str, *changes: Change, **env: str) -> tuple[int, dict[str, str], str]:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        script = tmp_path / "script_of_a_user.py"
        script.write_text(text)
        before = sorted(tmp_path.iterdir())
        patient = [] if CLOCK in text else [PATIENT]
        result = run(*patient, script, "--check", **env)
        printed = result.stdout + result.stderr
        print(printed)
        assert "Traceback" not in printed
        assert sorted(tmp_path.iterdir()) == before  # no study.db, no checkpoints
        assert not [path for path in temporary.iterdir() if path.name.startswith("check-")]
        return result.returncode, rows(result.stdout), printed

    return checked
