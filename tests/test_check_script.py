"""python SCRIPT --check: what a script does wrong is found and named, what it does well is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from common import BUNDLE, SCRIPTS, Run

STUDY = (BUNDLE / "tests" / "plain_training" / "my_study.py").read_text()
TOY = """
import optuna
from hpo.settings import run_script
from hpo.worker import run_worker

def search_space(trial):
    config = {
        "lr": trial.suggest_float("lr", 0.1, 0.9),
        "layers": trial.suggest_int("layers", 1, 5),
        "epochs": trial.suggest_categorical("epochs", [2, 4]),
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
Change: TypeAlias = "tuple[str, str]"  # old text, new text
Checker: TypeAlias = Callable[..., "tuple[int, dict[str, str]]"]


@pytest.fixture
def check(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> Checker:
    """Return a function that changes a script and checks it: its exit status and its rows."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))

    def checked(text: str, *changes: Change) -> tuple[int, dict[str, str]]:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        script = tmp_path / "script_of_a_user.py"
        script.write_text(text)
        result = run(script, "--check")
        print(result.stdout, result.stderr)
        assert list(tmp_path.iterdir()) == [script]  # no study.db, no checkpoints
        return result.returncode, rows(result.stdout)

    return checked


def rows(shown: str) -> dict[str, str]:
    """Return the table of a check: name → verdict and text."""
    found = re.findall(r"^(\S+(?: trial)?) +((?:ok|MEND|look|about|-) .*)", shown, re.M)
    return {name: re.sub(" +", " ", text) for name, text in found}


def test_the_example_passes(run: Run, own_study: Path) -> None:
    result = run("optuna_mnist.py", "--check")
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    table = rows(result.stdout)
    assert table["resume"].endswith("it went on at epoch 2, to the same value")
    for name in ("lr", "batch_size", "conv1_channels", "conv2_channels", "kernel1", "kernel2",
                 "fc_dim", "epochs"):  # fmt: skip
        assert re.fullmatch(r"ok \S+ instead of \S+ changes the result", table[name]), name
    assert re.match(r"about \S+ (s|min|h) per trial of 3 epochs on this CPU", table["time"])
    assert re.match(r"about \d\.\d GB", table["memory"])
    assert not list(own_study.parent.iterdir())  # no study.db, no checkpoints


def test_a_script_with_a_data_loader(check: Checker) -> None:
    data = ('"../data"', f'"{BUNDLE}/data"')
    status, table = check(STUDY, data)
    assert status == 0
    assert list(table) == ["one trial", "prune", "resume", "channels", "dropout", "lr", "epochs",
                           "time", "memory"]  # fmt: skip
    assert {text.split()[0] for text in table.values()} == {"ok", "about"}


def test_what_is_wrong_in_a_script_with_a_data_loader(check: Checker) -> None:
    data = ('"../data"', f'"{BUNDLE}/data"')
    unread = ('Net(config["channels"], config["dropout"])', 'Net(16, config["dropout"])')
    dead = ("nn.Dropout(dropout)", "nn.Dropout(0.1)")
    unsaved = ("        checkpoint.save(trial, model, optimizer, losses)\n", "")
    status, table = check(STUDY, data, unread, dead, unsaved)
    assert status == 1
    assert table["channels"].startswith("MEND suggested, but train_model never reads")
    assert table["dropout"].endswith("changes nothing in 2 epochs: is it used?")
    assert table["resume"].startswith("MEND an interrupted trial began again")


@pytest.mark.parametrize(
    ("old", "new", "name", "finding"),
    [
        ("", "", "layers", "ok 3 instead of 1 changes the result"),
        ('/ config["layers"]', "/ 2", "layers", "MEND suggested, but train_model never reads"),
        ('/ config["layers"]', '/ config["layers"] ** 0', "layers", "look train_model reads it, "),
        ("        trial.report(losses[-1], epoch)\n", "", "report", "MEND never called"),
        ("if trial.should_prune()", "if False", "prune", "MEND should_prune() is never asked"),
        ("raise optuna.TrialPruned", "pass", "prune", "MEND should_prune() said yes and the"),
        ("len(losses), ", "", "resume", "MEND an interrupted trial began again"),
        ("(losses or [1.0])[-1]", "__import__('random').random()", "resume", "MEND interrupted"),
        ("    return losses[-1]", "    return 1 / 0", "one trial", "MEND it failed: ZeroDivision"),
    ],
)  # fmt: skip
def test_one_fault_is_found(check: Checker, old: str, new: str, name: str, finding: str) -> None:
    status, table = check(TOY, (old, new))
    assert table[name].startswith(finding)
    assert status == finding.startswith("MEND")
    assert sum(text.startswith("MEND") for text in table.values()) == status


def test_a_value_may_reach_the_model_under_another_name(check: Checker) -> None:
    status, table = check(TOY, ("config, trial):\n", "config, trial, **rest):\n    "
                                "config = dict(**config)\n"))  # fmt: skip
    assert status == 0
    assert table["lr"] == "ok 0.5 instead of 0.1 changes the result"


def test_where_nothing_can_be_repeated_the_reads_decide(check: Checker) -> None:
    noise = ('config["lr"] / config["layers"]', 'config["lr"] * __import__("time").time_ns()')
    status, table = check(TOY, noise)
    assert status == 1
    assert table["lr"] == "ok train_model reads it (no other value was tried)"
    assert table["layers"].startswith("MEND suggested, but train_model never reads")
    assert table["resume"].startswith("ok interrupted after epoch 1 it went on at epoch 2 (")


def test_an_unknown_argument_is_refused(run: Run, own_study: Path) -> None:
    result = run("optuna_mnist.py", "--chek")
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert "--chek" in result.stderr
    assert not own_study.exists()
