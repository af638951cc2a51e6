"""check_best_model.py: top five, reasons, the live view, export, final training, disk use."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from datetime import datetime, timedelta
from pathlib import Path

import optuna
import pytest
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import TrialState

import optuna_mnist
from common import LIMIT, SCRIPTS, SMALL, Run, wait_for
from fake_study import fill
from hpo import checkpoint, words
from hpo.settings import Settings
from hpo.show import progress
from hpo.show.export import mean_and_deviation
from hpo.study.opening import create_or_open_study
from hpo.study.trials import count
from hpo.train.training import Trainer
from hpo.trial import tidy
from hpo.words import shown

RUNNING = TrialState.RUNNING
CHECK = SCRIPTS / "check_best_model.py"


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study, empty."""
    return create_or_open_study(Settings.from_env())


@pytest.fixture
def trained(study: optuna.Study, run: Run) -> optuna.Study:
    """Return the study with one trained trial."""
    study.enqueue_trial({**SMALL, "epochs": 2})
    assert run("optuna_mnist.py", TOTAL_TRIALS="1").returncode == 0
    return study


def test_top_five_and_fail_reasons(study: optuna.Study, run: Run) -> None:
    fill(study, 40)
    shown = run("check_best_model.py").stdout
    complete = [trial for trial in study.trials if trial.values]
    best = sorted(complete, key=lambda trial: trial.values[0])[:5]
    rows = re.findall(r"^  trial (\d+) +(\S+)   lr=", shown, re.M)
    assert rows == [(str(trial.number), words.shown(trial.values[0])) for trial in best]
    assert "  3 × out of memory (MemoryError)" in shown
    assert f"are not here ({SCRIPTS.anchor}" in shown


def test_without_evaluation_it_takes_a_second(study: optuna.Study, run: Run) -> None:
    fill(study, 500)
    before = os.times()
    assert run("check_best_model.py").returncode == 0
    after = os.times()  # of the CPU: the machine may be busy with something else
    assert after.children_user + after.children_system < 2 + (
        before.children_user + before.children_system
    )


@pytest.mark.parametrize(("direction", "best"), [("minimize", [3, 1]), ("maximize", [0, 2])])
def test_weights_of_the_best_few_are_kept(
    direction: str, best: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIRECTION", direction)
    monkeypatch.setenv("KEEP_BEST", "2")
    study = create_or_open_study(Settings.from_env())
    folder = Settings.from_env().checkpoints
    folder.mkdir(parents=True)
    for value in (0.9, 0.2, 0.8, 0.1):
        number = study.ask().number
        for name in ("state.pt", "weights.pt"):
            (folder / f"trial-{number:05d}.{name}").touch()
            (folder / f".trial-{number:05d}.{name}.{'0' * 32}.tmp").touch()  # half-written
        study.tell(number, value)
    study.ask()  # another worker's
    unfinished = folder / "trial-00004.state.pt"
    notes = folder / "trial-notes.txt"
    unfinished.touch()
    notes.touch()
    tidy(study)
    kept = {checkpoint.weights_path(Settings.from_env(), number) for number in best}
    assert set(folder.iterdir()) == {*kept, unfinished, notes}


def test_export_loads_without_the_bundle(trained: optuna.Study, run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "best"
    result = run("check_best_model.py", "--export", str(folder))
    assert result.returncode == 0, result.stderr
    names = ["code", "config.json", "load_model.py", "metrics.json", "requirements.txt"]
    names += ["versions.json", "weights.pt"]
    assert sorted(os.listdir(folder)) == names
    config = json.loads((folder / "config.json").read_text())
    assert config == {**SMALL, "epochs": 2, "num_classes": 10}
    metrics = json.loads((folder / "metrics.json").read_text())
    weights = torch.load(folder / "weights.pt", weights_only=True)
    assert metrics == {
        "trial": 0,
        "values": [trained.best_value],
        **optuna_mnist.test_model(config, weights),
    }
    assert json.loads((folder / "versions.json").read_text())["torch"] == torch.__version__
    elsewhere = folder.rename(tmp_path / "moved")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, str(elsewhere / "load_model.py")]
    shown = subprocess.check_output(command, cwd="/", env=env, text=True)
    number = sum(tensor.numel() for tensor in weights.values())
    assert f"{number} parameters" in shown
    assert list(tmp_path.glob(".*.tmp")) == []


def test_export_overwrites_nothing(trained: optuna.Study, run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("keep")
    for target, says in (("mine", "exists already"), ("no/such", "does not exist; create it")):
        result = run("check_best_model.py", "--export", str(tmp_path / target))
        assert result.returncode == 2
        assert says in result.stderr
        assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]
    checkpoint.weights_path(Settings.from_env(), 0).unlink()
    result = run("check_best_model.py", "--export", str(tmp_path / "new"))
    assert result.returncode == 2
    assert "the weights of trial 0 are not here" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--export", "x"], "no trial is complete yet"),
        (["--retrain", "2"], "no trial is complete yet"),
        (["--retrain", "0"], "no number of seeds"),
        (["--retrain", "two"], "no number of seeds"),
        (["--retrain", "2", "--export", "x"], "not allowed with"),
    ],
)
def test_wrong_options(options: list[str], says: str, study: optuna.Study, run: Run) -> None:
    result = run("check_best_model.py", *options)
    assert result.returncode == 2
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_trial_that_is_not_there(trained: optuna.Study, run: Run) -> None:
    result = run("check_best_model.py", "--retrain", "1", "--trial", "7")
    assert result.returncode == 2
    assert "--trial 7: there is no trial of that number" in result.stderr


def test_retrain_says_mean_and_deviation(trained: optuna.Study, run: Run) -> None:
    result = run("check_best_model.py", "--retrain", "3")
    assert result.returncode == 0, result.stderr
    each = [float(x) for x in re.findall(r"^seed \d: .*test accuracy (\S+)$", result.stdout, re.M)]
    assert len(each) == 3
    assert len(set(each)) > 1  # another seed, another net
    found = re.search(r"^test accuracy   (\S+) ± (\S+)   \(3 seeds\)$", result.stdout, re.M)
    assert found
    mean = sum(each) / 3
    deviation = (sum((x - mean) ** 2 for x in each) / 2) ** 0.5
    assert float(found[1]) == pytest.approx(mean, abs=1e-4)
    assert float(found[2]) == pytest.approx(deviation, abs=1e-4)
    assert mean_and_deviation([0.5]) == "0.5"


def test_final_training_uses_every_image(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def count(trainer: Trainer) -> None:
        seen.append(len(trainer.data.labels))
        assert len(trainer.data.images) == len(trainer.data.labels)

    monkeypatch.setattr(Trainer, "train_epoch", count)
    monkeypatch.delenv("TRAIN_IMAGES")
    optuna_mnist.train_final({**SMALL, "num_classes": 10}, 0)
    assert seen == [60_000] * 3


def in_the_file(settings: Settings, reports: int) -> optuna.Study:
    """Return the study as another process sees it, once all reports of running trials are there."""

    def there() -> int:
        running = create_or_open_study(settings).get_trials(states=(RUNNING,))
        return sum(len(trial.intermediate_values) for trial in running)

    wait_for(lambda: there() == reports)
    return create_or_open_study(settings)


@pytest.mark.parametrize("page", ["OWN_MODEL.txt", "MON_MODELE.txt"])
def test_the_page_s_lines_open_a_study_on_a_laptop(
    page: str, study: optuna.Study, own_study: Path, tmp_path: Path
) -> None:
    """As they are printed there, beside the copy alone, by a Python without the bundle."""
    fill(study, 4)
    study.add_trial(optuna.create_trial(value=0.001, user_attrs={"accuracy": 0.97}))
    shutil.copy(own_study, tmp_path / "study.db.backup")
    text = (SCRIPTS / page).read_text()
    lines = text[text.index("    from optuna import load_study\n\n") :].split("\n\nTensorBoard")[0]
    (tmp_path / "notebook.py").write_text(textwrap.dedent(lines))
    command = [sys.executable, "-I", "notebook.py"]
    said = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith("0.001 {}\n")
    assert "\n4 COMPLETE [0.001] {'accuracy': 0.97}\n" in said.stdout


def test_live_view_of_many_workers_in_a_small_terminal(study: optuna.Study) -> None:
    """Its head is whole whatever follows, and all times are those of the study."""
    fill(study, 24)
    settings = Settings.from_env(TOTAL_TRIALS="48")
    for _ in range(64):
        trial = study.ask()
        trial.suggest_categorical("epochs", [2, 3, 5])
        trial.report(0.25, 0)
    study = in_the_file(settings, 64)
    now = (study.trials[24].datetime_start or datetime.max) + timedelta(seconds=3)
    lines = progress.view(study, count(study, settings), now, 60, 24)
    assert len(lines) == 23
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    assert "] 27 %" in text  # there are 88 already
    assert f"best {shown(study.best_value)} (trial {study.best_trial.number}): lr=" in text
    assert re.search(r"^  trial 24 +epoch 1 of [235] +0:0\d  0\.25 +worker 0 on", text, re.M)
    assert re.search(r"^  … and 6\d more$", text, re.M)
    assert "  trial 22    pruned after" in text
    assert "  2 × out of memory (MemoryError)" in text
    assert "logs/local.*.out" in text
    assert "(Ctrl-C ends this view alone; the workers go on)" in text
    # Four workers are all there, each with its node.
    four = create_or_open_study(Settings.from_env(STUDY_NAME="four"))
    fill(four, 24)
    worker = "worker 3 on turpancomp3, job 1234567.1"
    for _ in range(4):
        four.add_trial(
            optuna.create_trial(
                state=RUNNING, intermediate_values={0: 0.123456}, user_attrs={"worker": worker}
            )
        )
    shown_four = progress.view(four, count(four, settings), now, 60, 21)  # it names no logs
    assert sum(line.endswith("0.1235  worker 3 on turpancomp3") for line in shown_four) == 4
    for rows in (5, 10):
        few = progress.view(study, count(study, settings), now, 60, rows)
        assert few == lines[: len(few)][: rows - 1]


def test_time_left_is_that_of_the_study(monkeypatch: pytest.MonkeyPatch) -> None:
    start = datetime(2026, 3, 1, 12)
    four: dict[str, BaseDistribution] = {"epochs": CategoricalDistribution([4])}
    running = [
        optuna.create_trial(
            state=RUNNING, params={"epochs": 4}, distributions=four, intermediate_values={0: 1.0}
        )
        for _ in range(2)
    ]
    for trial in running:
        trial.datetime_start = start
    now = start + timedelta(seconds=10)
    # Before the first trial ends: an epoch of four took 10 s, and ten trials are for two workers.
    assert progress.seconds_left(running, 10, now) == pytest.approx((10 * 40 - 20) / 2)
    done = optuna.create_trial(value=1.0)
    done.datetime_start, done.datetime_complete = start, start + timedelta(seconds=20)
    assert progress.seconds_left([done, *running], 10, now) == pytest.approx((10 * 20 - 20) / 2)
    assert progress.seconds_left([done], 10, now) is None  # nobody works
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.SIG_IGN)
    assert progress.what_ctrl_c_does().startswith("(Ctrl-C stops the workers")


def test_watch_refreshes_a_terminal(study: optuna.Study) -> None:
    fill(study, 4)
    controller, terminal = pty.openpty()
    env = {**os.environ, "TOTAL_TRIALS": "4"}
    subprocess.run([sys.executable, str(CHECK), "--watch"], env=env, stdout=terminal, timeout=LIMIT)
    os.close(terminal)
    shown = os.read(controller, 65536).decode()
    assert shown.startswith(progress.HOME)
    assert "] 100 %" in shown


def test_watch_in_a_pipe_has_a_line_per_trial(
    study: optuna.Study, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(study, 2)
    settings = Settings.from_env(TOTAL_TRIALS="4")
    monkeypatch.setattr("time.sleep", lambda seconds: study.tell(study.ask(), 0.5))
    progress.follow(study, settings)
    lines = [line.split(" ", 1)[1] for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("2 of 4 trials: 2 complete")
    assert [re.sub(r" after .*? \(", " (", line).split(";")[0] for line in lines[1:]] == [
        "trial 2     complete 0.5 (3 of 4 finished",
        "trial 3     complete 0.5 (4 of 4 finished",
    ]


def test_watch_of_a_finite_study_ends_when_it_is_exhausted(study: optuna.Study, run: Run) -> None:
    fill(study, 12)
    study.set_user_attr("combinations", 12)
    shown = run("check_best_model.py", "--watch").stdout
    assert "12 of 12 trials" in shown
    assert progress.HOME not in shown
    assert "12 of 12 trials" in run("check_best_model.py").stdout
