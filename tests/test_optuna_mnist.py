"""The objective on real images: search space, training, resume, weights, the best model."""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

import optuna_mnist
from common import SCRIPTS, SMALL, Run
from hpo import checkpoint, words, worker
from hpo.drain import Drain
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study, open_study
from hpo.train import mnist
from hpo.train.training import fused_adam
from hpo.trial import run_trial, tidy


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study, made as init_optuna_db.py makes it."""
    return create_or_open_study(Settings.from_env())


def test_search_space_is_the_guides(study: optuna.Study) -> None:
    trial = study.ask()
    config = optuna_mnist.search_space(trial)
    assert trial.distributions == {
        "lr": FloatDistribution(1e-4, 5e-3, log=True),
        "batch_size": CategoricalDistribution([16, 32, 64, 128]),
        "conv1_channels": CategoricalDistribution([8, 16, 32, 64]),
        "conv2_channels": CategoricalDistribution([16, 32, 64, 128]),
        "kernel1": CategoricalDistribution([3, 5, 7]),
        "kernel2": CategoricalDistribution([3, 5, 7]),
        "fc_dim": CategoricalDistribution([64, 128, 256, 512]),
        "epochs": CategoricalDistribution([2, 3, 5]),
    }
    assert config == {**trial.params, "num_classes": 10}


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_every_value_reaches_the_net(kernel: int) -> None:
    config = {**SMALL, "kernel1": kernel, "kernel2": 3, "num_classes": 10}
    net = optuna_mnist.CNN(config)
    shapes = [tuple(parameter.shape) for parameter in net.parameters() if parameter.dim() > 1]
    assert shapes == [(8, 1, kernel, kernel), (16, 8, 3, 3), (64, 16 * 49), (10, 64)]
    assert net(torch.zeros(5, 1, 28, 28)).shape == (5, 10)


def test_train_model_without_optuna_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAIN_IMAGES", "1000")
    config = {**SMALL, "num_classes": 10}
    first, last = (optuna_mnist.train_model({**config, "epochs": epochs}) for epochs in (1, 8))
    assert last < 0.7 * first
    assert optuna_mnist.train_model({**config, "epochs": 1}) == first  # the same to the last bit


def test_training_never_sees_the_test_images(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []
    original = mnist._load

    def record(train: bool, device: torch.device) -> mnist.Images:
        loaded.append(train)
        return original(train, device)

    monkeypatch.setattr(mnist, "_load", record)
    mnist.load_training.cache_clear()
    study.enqueue_trial({**SMALL, "epochs": 2})
    optuna_mnist.objective(study.ask())
    assert loaded == [True]


def test_resumed_trial_equals_the_uninterrupted_one(study: optuna.Study) -> None:
    config = {**SMALL, "num_classes": 10}
    study.enqueue_trial(SMALL)
    trial = study.ask()
    optuna_mnist.search_space(trial)
    whole = optuna_mnist.train_model(config, trial)
    curve = study.get_trials()[0].intermediate_values
    study.tell(trial, whole)
    tidy(study)

    study.enqueue_trial(SMALL)
    other = study.ask()
    other_number = other.number

    class Died(BaseException):
        """Stands for the end of the process right after the second epoch's checkpoint."""

    def die(self: optuna.Trial, value: float, step: int) -> None:
        if step == 1:
            raise Died
        original(self, value, step)

    original = optuna.Trial.report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "number", 0)  # the seed of the first trial
        patch.setattr(optuna.Trial, "report", die)
        with pytest.raises(Died):
            optuna_mnist.train_model(config, other)
        patch.setattr(optuna.Trial, "report", original)
        torch.manual_seed(12345)  # whatever else the process does in between
        resumed = optuna_mnist.train_model(config, other)
    assert resumed == whole
    assert study.get_trials()[other_number].intermediate_values == curve


def test_new_trial_takes_no_checkpoint_of_a_study_that_was_deleted(
    study: optuna.Study, run: Run
) -> None:
    folder = Settings.from_env().checkpoints
    folder.mkdir(parents=True)
    (folder / "trial-00000.state.pt").write_bytes(b"of another net")
    study.enqueue_trial(SMALL)
    result = run("optuna_mnist.py", TOTAL_TRIALS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert study.get_trials()[0].state == TrialState.COMPLETE


def test_checkpoint_of_a_gpu_goes_on_a_cpu(study: optuna.Study) -> None:
    """There Adam is capturable, which on a CPU is an error at the next step."""
    trial = study.ask()

    def step() -> None:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    step()
    optimizer.param_groups[0].update(capturable=True, fused=False)
    checkpoint.save(trial, model, optimizer, [0.5])
    optimizer = fused_adam(model, 1e-3)
    assert checkpoint.load(trial, model, optimizer) == [0.5]
    step()
    assert optimizer.state[model.weight]["step"] == 2


def test_worker_keeps_the_weights_of_the_best_trial_only(study: optuna.Study, run: Run) -> None:
    for lr in (1e-4, 3e-3, 5e-4):
        study.enqueue_trial({**SMALL, "lr": lr, "epochs": 2})
    result = run("optuna_mnist.py", TOTAL_TRIALS="3", PRUNER="none", KEEP_BEST="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 3
    assert study.best_trial.number == 1
    files = [path.name for path in Settings.from_env().checkpoints.iterdir()]
    assert files == ["trial-00001.weights.pt"]
    weights = torch.load(checkpoint.weights_path(Settings.from_env(), 1), weights_only=True)
    net = optuna_mnist.CNN(optuna_mnist.search_space(study.best_trial))
    net.load_state_dict(weights)  # a state_dict and nothing else

    shown = run("check_best_model.py", TOTAL_TRIALS="3").stdout
    assert "3 of 3 trials: 3 complete, 0 pruned, 0 failed, 0 running, 0 waiting" in shown
    assert f"best_value  {words.shown(study.best_value)} (trial 1)" in shown
    for name, value in study.best_params.items():
        assert f"{name:15} {value:.4g}" in shown
    scores = optuna_mnist.test_model(optuna_mnist.search_space(study.best_trial), weights)
    assert f"test accuracy   {words.shown(scores['test accuracy'])}" in shown


def test_no_tensor_of_a_trial_outlives_it(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU that is the memory of the next trial; a trial that fails leaves none, either."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    monkeypatch.setattr(worker, "spare_the_old", lambda: None)
    drain = Drain(math.inf)

    def objective(trial: optuna.Trial) -> float:
        loss = optuna_mnist.train_model({**SMALL, "epochs": 1, "num_classes": 10}, trial)
        if trial.number % 2:
            raise torch.cuda.OutOfMemoryError(f"after {loss}")
        return loss

    alive = []
    for _ in range(6):
        run_trial(study, study.ask(), objective, drain)
        alive.append(sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects()))
    assert {trial.state for trial in study.get_trials()} == {TrialState.COMPLETE, TrialState.FAIL}
    assert len(set(alive[1:])) == 1, alive  # the first leaves the images, for all


def test_hopeless_trial_is_pruned_and_leaves_nothing(study: optuna.Study, run: Run) -> None:
    distributions: dict[str, Any] = {"lr": FloatDistribution(1e-4, 5e-3, log=True)}
    for _ in range(6):  # the median pruner starts after five finished trials
        study.add_trial(
            optuna.create_trial(
                params={"lr": 1e-3},
                distributions=distributions,
                value=0.01,
                intermediate_values=dict.fromkeys(range(5), 0.01),
            )
        )
    study.enqueue_trial({**SMALL, "lr": 1e-4})
    result = run("optuna_mnist.py", TOTAL_TRIALS="7", PRUNER="median")
    assert result.returncode == 0, result.stdout + result.stderr
    pruned = study.get_trials()[6]
    assert pruned.state == TrialState.PRUNED
    assert list(pruned.intermediate_values) == [0]
    assert list(Settings.from_env().checkpoints.iterdir()) == []


def test_check_on_an_empty_study(study: optuna.Study, run: Run) -> None:
    result = run("check_best_model.py")
    assert result.returncode == 0
    assert "0 of 500 trials" in result.stdout
    assert "no trial is complete yet" in result.stdout


def test_check_without_torch(study: optuna.Study, tmp_path: Path) -> None:
    """A Python that has all packages of this one, but for torch."""
    study.add_trial(optuna.create_trial(value=0.5))
    folder = checkpoint.weights_path(Settings.from_env(), 0)
    folder.parent.mkdir(parents=True)
    folder.write_bytes(b"never opened")
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(torch.__file__).parent.parent.iterdir():
        if not path.name.startswith(("torch", "functorch", "nvidia")):
            (packages / path.name).symlink_to(path)
    result = subprocess.run(
        [sys.executable, "-S", str(SCRIPTS / "check_best_model.py")],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert "best_value  0.5 (trial 0)" in result.stdout
    assert "needs torch, which this Python has not" in result.stdout


def test_no_script_of_the_login_node_imports_torch() -> None:
    code = "import check_best_model, init_optuna_db, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, timeout=600).returncode == 0


def test_watch_ends_when_the_study_is_done(study: optuna.Study, run: Run) -> None:
    study.enqueue_trial({**SMALL, "epochs": 2})
    command = [sys.executable, str(SCRIPTS / "check_best_model.py"), "--watch"]
    env = {**os.environ, "TOTAL_TRIALS": "1"}
    watcher = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
    assert run("optuna_mnist.py", TOTAL_TRIALS="1").returncode == 0
    output, _ = watcher.communicate(timeout=600)
    assert watcher.returncode == 0
    assert re.search("1 of 1 (finished|trials: 1 complete)", output.splitlines()[-1]), output
    assert open_study(Settings.from_env()).best_value > 0
