"""What a trial leaves: a trial that goes on from it computes what it would have computed anyway."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import optuna
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import nn
from torch.optim import lr_scheduler

import objective_with_state
from common import HELPERS, SCRIPTS, Run
from hpo import checkpoint, drain
from hpo.drain import Drain, Drained, DrainingPruner
from hpo.saving import states, trial_files
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study
from hpo.trial import run_trial, tidy

SCRIPT = HELPERS / "objective_with_state.py"


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study, made as init_optuna_db.py makes it."""
    return create_or_open_study(Settings.from_env())


@pytest.fixture
def trial(study: optuna.Study) -> optuna.Trial:
    """Return its first trial."""
    return study.ask()


def files() -> list[str]:
    """Return what lies in the folder of the study's checkpoints."""
    return sorted(path.name for path in Settings.from_env().checkpoints.iterdir())


# ---------- The same result ----------


def test_interrupted_after_each_epoch_in_new_processes(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("PY_SCRIPT", str(SCRIPT))
    study = create_or_open_study(Settings.from_env())
    study.enqueue_trial({"lr": 0.05})
    whole = run(SCRIPT, TOTAL_TRIALS="1", OMP_NUM_THREADS="1")
    assert whole.returncode == 0, whole.stdout
    study.enqueue_trial({"lr": 0.05})
    for _ in range(objective_with_state.EPOCHS):
        part = run(SCRIPT, TOTAL_TRIALS="2", INTERRUPT="1", OMP_NUM_THREADS="1")
        assert part.returncode == 0, part.stdout + part.stderr
    assert "trial 1 back to the queue" in part.stdout  # after the last epoch, too
    run(SCRIPT, TOTAL_TRIALS="2", OMP_NUM_THREADS="1")
    one, other = study.get_trials()
    assert (one.state, other.state) == (TrialState.COMPLETE, TrialState.COMPLETE)
    assert other.value == one.value
    assert other.intermediate_values == one.intermediate_values
    assert files() == ["trial-00000.weights.pt", "trial-00001.weights.pt"]
    weights = [checkpoint.weights_path(Settings.from_env(), number) for number in (0, 1)]
    one_s, other_s = (torch.load(path, weights_only=True) for path in weights)
    assert all(torch.equal(one_s[name], other_s[name]) for name in one_s)


def in_two_parts(trial: optuna.Trial) -> float:
    """Train for two epochs, let other things be drawn, and train on."""
    answers = iter([False])

    def should_prune() -> bool:
        for answer in answers:
            return answer
        raise Drained

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "should_prune", should_prune)
        with pytest.raises(Drained):
            objective_with_state.train_model({"lr": 0.05}, trial)
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    return objective_with_state.train_model({"lr": 0.05}, trial)


@pytest.mark.parametrize("left_out", ["", *objective_with_state.CHANGES])
def test_each_state_is_needed(
    left_out: str, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: without any one of the objects the result is another."""
    whole = objective_with_state.train_model({"lr": 0.05}, study.ask())
    monkeypatch.setenv("LEAVE_OUT", left_out)
    resumed = in_two_parts(study.ask())
    # A scaler that is not enabled has no state; that it can be given is what counts.
    assert (resumed == whole) == (left_out in ("", "scaler"))


@pytest.mark.parametrize("source", ["python", "numpy", "torch"])
def test_each_random_state_is_needed(
    source: str, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = objective_with_state.train_model({"lr": 0.05}, study.ask())
    kept = states.random_states

    def all_but_one() -> dict[str, Any]:
        return {name: state for name, state in kept().items() if name != source}

    monkeypatch.setattr(checkpoint, "random_states", all_but_one)
    assert in_two_parts(study.ask()) != whole


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_schedulers_of_torch(name: str, trial: optuna.Trial) -> None:
    def made() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, SCHEDULERS[name](optimizer)

    def rates(optimizer: torch.optim.Optimizer, scheduler: Any, epochs: int) -> list[float]:
        found = []
        for _ in range(epochs):
            optimizer.step()
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            found.append(optimizer.param_groups[0]["lr"])
        return found

    model, optimizer, scheduler = made()
    first = rates(optimizer, scheduler, 3)
    checkpoint.save(trial, model, optimizer, [0.5], scheduler=scheduler)
    whole = rates(optimizer, scheduler, 4)
    assert len({*first, *whole}) > 1
    model, optimizer, scheduler = made()
    assert checkpoint.load(trial, model, optimizer, scheduler=scheduler) == [0.5]
    assert rates(optimizer, scheduler, 4) == whole


# ---------- Plain values ----------


@dataclass
class Best:
    """What a script might write for its progress."""

    loss: float
    epoch: int = 0


VALUES: dict[str, Any] = {
    "numbers": [1, 2.5, True, None, float("inf"), 2**100, "words"],
    "pairs": {1: (2, 3), (4, 5): {6}, "what it is": "a word of ours"},
    "more": [
        frozenset({1}),
        [OrderedDict(c=1)],
        deque([1, 2], 3),
        Counter("aab"),
        OrderedDict(b=1, a=2),
        b"bytes",
    ],
    "array": numpy.arange(6, dtype=numpy.uint16).reshape(2, 3),
    "nothing": numpy.zeros((0, 2)),
    "scalar": numpy.float32(0.1),
}


@pytest.mark.parametrize("with_tensors", [True, False])
def test_plain_values_come_back(with_tensors: bool, tmp_path: Path) -> None:
    packed = states.pack(VALUES, with_tensors=with_tensors)
    if with_tensors:
        torch.save(packed, tmp_path / "file")
        back = states.unpack(torch.load(tmp_path / "file", weights_only=True))
    else:
        back = states.unpack(json.loads(json.dumps(packed)))
    for name in ("numbers", "pairs", "more"):
        assert back[name] == VALUES[name]
        assert repr(back[name]) == repr(VALUES[name])  # of the same types, in the same order
    for name in ("array", "nothing", "scalar"):
        assert back[name].dtype == VALUES[name].dtype
        assert numpy.array_equal(back[name], VALUES[name])
    back["array"] += 1  # one may write into it


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"best": 0.5, "layers": [1, 2]}, {}),
        ([1, 2, 3], [9]),
        (SimpleNamespace(best=0.5), SimpleNamespace(best=1.0, other=2)),
        (Best(0.5, 3), Best(1.0)),
        (deque([1, 2], 2), deque(maxlen=2)),
    ],
)
def test_values_are_filled_in_place(before: Any, after: Any, trial: optuna.Trial) -> None:
    checkpoint.save(trial, losses=[0.1], progress=before)
    assert checkpoint.load(trial, progress=after) == [0.1]
    assert after == before


def test_numpy_and_python_generators_draw_on(trial: optuna.Trial) -> None:
    def made() -> dict[str, Any]:
        return {
            "pcg": numpy.random.default_rng(3),
            "twister": numpy.random.Generator(numpy.random.MT19937(3)),
            "old": numpy.random.RandomState(3),
            "dice": random.Random(3),
        }

    def drawn(things: dict[str, Any]) -> list[float]:
        return [t.random() for t in things.values()] + [things["old"].normal()]

    things = made()
    drawn(things)
    checkpoint.save(trial, **things)
    whole = drawn(things)
    things = made()
    assert drawn(things) != whole
    checkpoint.load(trial, **things)
    assert drawn(things) == whole


WITHOUT_TORCH = """
import random, sys
import optuna
from hpo import checkpoint
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study

study = create_or_open_study(Settings.from_env())
trial = optuna.trial.Trial(study, 1)
progress = {"best": 9.0}
losses = checkpoint.load(trial, progress=progress)
losses.append(random.random())
progress["best"] = min(progress["best"], losses[-1])
checkpoint.save(trial, losses=losses, progress=progress)
print(losses, progress, "torch" in sys.modules)
"""


def test_state_without_torch(trial: optuna.Trial) -> None:
    def part() -> str:
        command = [sys.executable, "-c", WITHOUT_TORCH]
        env = {**os.environ, "PYTHONPATH": str(SCRIPTS)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout

    trial.suggest_float("x", 0, 1)
    one, two = part(), part()
    losses = [float(number) for number in two[1 : two.index("]")].split(", ")]
    assert one.startswith(f"[{losses[0]}]")
    assert len(losses) == 2
    assert two.endswith(f"{{'best': {min(losses)}}} False\n")
    assert files() == ["trial-00000.state.json"]
    # A script that begins to use torch goes on from it, and leaves one file.
    progress = {"best": 0.0}
    assert checkpoint.load(trial, progress=progress) == losses
    assert progress == {"best": min(losses)}
    checkpoint.save(trial, losses=losses, progress=progress)
    assert files() == ["trial-00000.state.pt"]


# ---------- Files ----------


def test_checkpoint_of_the_old_form(trial: optuna.Trial) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters())
    old = {
        "model": {name: value.clone() for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.get_rng_state(),
        "losses": [0.5, 0.25],
    }
    drawn = torch.rand(3)
    path = trial_files.state_path(trial.number)
    path.parent.mkdir(parents=True)
    torch.save(old, path)
    nn.init.zeros_(model.weight)
    assert checkpoint.load(trial, model, optimizer) == [0.5, 0.25]
    assert torch.equal(model.weight, old["model"]["weight"])  # type: ignore[index]
    assert torch.equal(torch.rand(3), drawn)
    checkpoint.keep_weights(trial.number)
    kept = torch.load(checkpoint.weights_path(Settings.from_env(), 0), weights_only=True)
    assert torch.equal(kept["bias"], model.bias)


def test_what_load_and_save_do_not_share_is_named(trial: optuna.Trial) -> None:
    checkpoint.save(trial, losses=[0.5], progress={})
    with pytest.raises(UserError, match=r"trial 0 lacks dice and rng, which .*load is given"):
        checkpoint.load(trial, progress={}, rng=numpy.random.default_rng(), dice=random.Random())
    with pytest.raises(UserError, match=r"trial 0 holds progress, which .*load is not given"):
        checkpoint.load(trial)


@pytest.mark.parametrize(
    ("kept", "says"),
    [
        ({"best": 0.5}, r"best=0\.5 \(float\) cannot come back; put it into a dict"),
        ({"loader": object()}, r"loader=<object .* cannot come back; give what has state_dict"),
        ({"progress": {"a": [print]}}, r"progress'\]\['a'\]\[0\] is a builtin_function_or_method"),
        ({"progress": {"a": numpy.array([None])}}, "is an array of objects"),
    ],
)
def test_what_cannot_be_kept(kept: dict[str, Any], says: str, trial: optuna.Trial) -> None:
    with pytest.raises(UserError, match=says):
        checkpoint.save(trial, losses=[0.5], **kept)
    assert not Settings.from_env().checkpoints.exists()


def test_half_written_checkpoint_never_counts(
    trial: optuna.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(trial, losses=[0.5])

    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(trial, losses=[0.5, 0.25])
    assert checkpoint.load(trial) == [0.5]
    assert files() == ["trial-00000.state.pt"]


def test_only_the_first_of_several_processes_writes(
    trial: optuna.Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    checkpoint.save(trial, losses=[0.5])
    assert not Settings.from_env().checkpoints.exists()
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    for epochs in (1, 2):  # the worker, which knows when to stop, is another process
        checkpoint.save(trial, losses=[0.5] * epochs, every=3600)
    assert len(checkpoint.load(trial)) == 2


# ---------- Saved rarely ----------


def rarely(trial: optuna.Trial, epochs: int, **kept: Any) -> list[float]:
    """Train a net of one weight, which counts the epochs; save it once an hour."""
    model = nn.Linear(1, 1)
    losses = checkpoint.load(trial, model)
    for epoch in range(len(losses), epochs):
        nn.init.constant_(model.weight, epoch + 1)
        losses.append(1.0)
        trial.report(1.0, epoch)
        checkpoint.save(trial, model, None, losses, every=3600, **kept)
        trial.should_prune()
    return losses


def test_a_trial_is_saved_when_its_worker_has_to_stop(
    study: optuna.Study, trial: optuna.Trial, tmp_path: Path
) -> None:
    file = tmp_path / "drain"
    study.pruner = DrainingPruner(optuna.pruners.NopPruner(), Drain(float("inf"), file))
    rarely(trial, 2)
    assert not Settings.from_env().checkpoints.exists()
    file.touch()
    with pytest.raises(Drained):
        rarely(trial, 3)
    assert checkpoint.load(trial, nn.Linear(1, 1)) == [1.0]


@pytest.mark.parametrize(("left", "saved"), [(100, False), (93, True)])
def test_a_trial_is_saved_before_the_job_ends(
    left: float, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """90 seconds are kept; a trial that is saved just before that would be asked to stop."""
    monkeypatch.setattr("time.time", lambda: 1000.0)
    limit = Drain(1000.0 + left)
    assert not limit.is_due()
    assert drain.asked_to_stop() == saved


def test_last_weights_of_a_trial_that_is_saved_rarely(
    study: optuna.Study, trial: optuna.Trial
) -> None:
    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        return rarely(trial, 3)[-1]

    run_trial(study, trial, objective, Drain(float("inf")))
    kept = torch.load(checkpoint.weights_path(Settings.from_env(), 0), weights_only=True)
    assert kept["weight"].item() == 3
    assert checkpoint._Clock.unsaved is None  # nothing holds the model any more


def test_weights_that_the_script_names(study: optuna.Study, trial: optuna.Trial) -> None:
    best = {"weight": torch.full((1, 1), 7.0)}
    rarely(trial, 1)
    checkpoint.save(trial, nn.Linear(1, 1), losses=[1.0], weights=best)
    checkpoint.keep_weights(trial.number)
    kept = torch.load(checkpoint.weights_path(Settings.from_env(), 0), weights_only=True)
    assert kept == best


# ---------- The trial's own folder ----------


def run_with_folder(study: optuna.Study, value: float) -> FrozenTrial:
    """Run one trial that writes a file into its folder."""
    trial = study.ask()

    def objective(trial: optuna.Trial) -> float:
        trial.suggest_float("x", 0, 1)
        (checkpoint.folder(trial) / "sub").mkdir()
        (checkpoint.folder(trial) / "sub" / "model.bin").write_text(str(value))
        if value < 0:
            raise optuna.TrialPruned
        return value

    run_trial(study, trial, objective, Drain(float("inf")))
    return study.get_trials()[trial.number]


def test_folder_stays_for_the_best_trials_alone(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEP_BEST", "2")
    Settings.from_env(KEEP_BEST="2")
    for value, kept in (
        (0.5, [0]), (-1, [0]), (0.7, [0, 2]), (0.6, [0, 3]), (0.4, [0, 4]), (0.9, [0, 4]),
    ):  # fmt: skip
        run_with_folder(study, value)
        assert files() == [f"trial-{number:05d}" for number in kept]
    assert (checkpoint.folder_path(Settings.from_env(), 4) / "sub" / "model.bin").exists()


def test_folder_comes_back_with_the_trial(study: optuna.Study, trial: optuna.Trial) -> None:
    trial.suggest_float("x", 0, 1)
    (checkpoint.folder(trial) / "last.ckpt").write_text("epoch 3")
    drained = Drain(float("inf"))

    def stops(trial: optuna.Trial) -> float:
        raise Drained

    run_trial(study, trial, stops, drained)
    again = study.ask()
    assert again.number == 0
    assert (checkpoint.folder(again) / "last.ckpt").read_text() == "epoch 3"
    tidy(study)
    assert files() == ["trial-00000"]


def test_new_trial_finds_no_folder_of_a_study_that_was_deleted(study: optuna.Study) -> None:
    folder = checkpoint.folder_path(Settings.from_env(), 0)
    (folder / "sub").mkdir(parents=True)  # run_with_folder makes it, and would fail
    assert run_with_folder(study, 0.5).state == TrialState.COMPLETE


# ---------- GPUs, which this machine need not have ----------


@pytest.mark.parametrize(
    ("gpus", "distributed", "expected"),
    [
        (2, False, [("state 0", 0), ("state 1", 1)]),
        (1, False, [("state 0", 0)]),  # it goes on where there are fewer
        (2, True, [("state 1", None)]),  # each process draws what the one that has saved draws
    ],
)
def test_random_states_of_gpus(
    gpus: int, distributed: bool, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[Any] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state_all", lambda: ["state 0", "state 1"])
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: distributed)
    monkeypatch.setattr(
        "torch.cuda.set_rng_state", lambda state, device=None: put.append((state, device))
    )
    states.put_back_random(states.random_states())
    assert put == expected
