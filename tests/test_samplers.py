"""Every sampler and pruner with several real workers: counts, distinct trials, refusals."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

import optuna_mnist
import space_for_tests
from common import HELPERS, LIMIT, SCRIPTS, Run, wait_for
from hpo import settings
from hpo.script import Script
from hpo.search import remembered, samplers, space
from hpo.search.pruners import make_pruner
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study, open_study
from hpo.words import shown

SPACE = HELPERS / "space_for_tests.py"
MNIST = SCRIPTS / "optuna_mnist.py"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the tests' objectives import hpo, and keep each worker to one thread."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def start(script: Path, workers: int, **env: str) -> list[subprocess.Popen[str]]:
    """Start workers in the background."""
    return [
        subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "WORKER_RANK": str(rank), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(workers)
    ]


def finish(workers: list[subprocess.Popen[str]]) -> list[str]:
    """Wait for workers and return what they said; all of them have to succeed."""
    output = [worker.communicate(timeout=LIMIT)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), "\n".join(output)
    return output


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    return open_study(Settings.from_env()).get_trials()


def distinct(found: list[FrozenTrial]) -> set[tuple[tuple[str, Any], ...]]:
    """Return the configurations that were tried."""
    return {tuple(sorted(trial.params.items())) for trial in found}


@pytest.mark.parametrize(("sampler", "categorical"), [("tpe", 7), ("gp", 0), ("grid", 8)])
def test_each_form_of_mnists_space_with_two_workers(sampler: str, categorical: int) -> None:
    output = finish(
        start(MNIST, 2, SAMPLER=sampler, SEED="1", TOTAL_TRIALS="8", TRAIN_IMAGES="128")
    )
    found = trials()
    assert [trial.number for trial in found] == list(range(8)), output
    assert all(trial.state in FINISHED for trial in found)
    assert len(distinct(found)) == 8
    distributions = found[-1].distributions.values()
    assert sum(isinstance(each, CategoricalDistribution) for each in distributions) == categorical
    assert "falls back" not in "".join(output)
    assert "independently" not in "".join(output)


# The others have tests of their own below.
@pytest.mark.parametrize("sampler", ["random", "cmaes", "nsgaii"])
def test_every_sampler_with_two_workers(sampler: str) -> None:
    finish(start(SPACE, 2, SAMPLER=sampler, SPACE="huge", SEED="1", TOTAL_TRIALS="8"))
    found = trials()
    assert [trial.number for trial in found] == list(range(8))
    assert all(trial.state == TrialState.COMPLETE for trial in found)
    assert len(distinct(found)) == 8


@pytest.mark.parametrize(
    ("sampler", "kind", "number"), [("grid", "", 12), ("bruteforce", "branches", 5)]
)
def test_every_combination_exactly_once_and_then_the_end(
    sampler: str, kind: str, number: int
) -> None:
    output = finish(start(SPACE, 4, SAMPLER=sampler, SPACE=kind, TOTAL_TRIALS="500"))
    found = trials()
    assert len(found) == len(distinct(found)) == number
    assert all(trial.state == TrialState.COMPLETE for trial in found)
    assert all(f"the study has its {number} trials" in text for text in output)


def test_grid_stays_exact_when_a_worker_is_killed_and_another_is_stopped(tmp_path: Path) -> None:
    env = {"SAMPLER": "grid", "LEASE_GRACE": "2", "GATE": str(tmp_path / "gate")}
    workers = start(SPACE, 4, **env)
    wait_for((tmp_path / "study.db").exists)
    half = {TrialState.COMPLETE: 4, TrialState.RUNNING: 4}  # each worker has one
    wait_for(lambda: Counter(trial.state for trial in trials()) == half)
    workers[0].kill()
    workers[1].send_signal(signal.SIGTERM)
    workers[0].communicate(timeout=LIMIT)
    (tmp_path / "gate").touch()
    finish(workers[1:])
    found = trials()
    assert len(found) == len(distinct(found)) == 12
    assert all(trial.state == TrialState.COMPLETE for trial in found)


def test_qmc_takes_each_point_of_its_sequence_once() -> None:
    finish(start(SPACE, 3, SAMPLER="qmc", SPACE="continuous", TOTAL_TRIALS="16"))
    rates = sorted(float(trial.params["lr"]) for trial in trials())
    # 16 points of a Sobol' sequence lie one in each sixteenth of the (logarithmic) interval.
    edges = [1e-4 * 100 ** (i / 16) for i in range(17)]
    assert all(low <= rate < high for low, rate, high in zip(edges, rates, edges[1:], strict=False))


@pytest.mark.parametrize(
    ("sampler", "kind", "says"),
    [
        ("grid", "continuous", "lr is continuous; give a list: suggest_categorical('lr', [...])"),
        ("bruteforce", "huge", "more than 100000 combinations"),
        ("grid", "branches", "use SAMPLER=bruteforce"),
    ],
)
def test_space_that_does_not_fit_is_refused(
    sampler: str, kind: str, says: str, run: Run, own_study: Path
) -> None:
    result = run(SPACE, SAMPLER=sampler, SPACE=kind)
    assert result.returncode == 2
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not own_study.exists()


def test_a_worker_that_comes_between_two_writes_is_accepted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several start at once, and one of them is the first to write the space down."""
    monkeypatch.setenv("SAMPLER", "grid")
    chosen = Settings.from_env()
    plan = remembered.plan_of(chosen, Script("space_for_tests.py", vars(space_for_tests)))
    study = create_or_open_study(chosen)
    write = study.set_user_attr

    def and_another_comes(key: str, value: Any) -> None:
        write(key, value)
        remembered.adopt_space(open_study(chosen), chosen, plan)

    monkeypatch.setattr(study, "set_user_attr", and_another_comes)
    remembered.adopt_space(study, chosen, plan)
    assert len(plan.combinations) == 12
    assert {"space", "combinations"} <= study.user_attrs.keys()


def test_objective_without_a_search_space_function(run: Run) -> None:
    result = run(HELPERS / "objective_for_tests.py", SAMPLER="grid")
    assert result.returncode == 2
    assert (
        "needs a function search_space(trial) in ../tests/helpers/objective_for_tests.py"
        in result.stderr
    )
    assert run(HELPERS / "objective_for_tests.py", TOTAL_TRIALS="2").returncode == 0


@pytest.mark.parametrize(("sampler", "kind"), [("tpe", "continuous"), ("grid", ""), ("tpe", "")])
def test_study_refuses_another_space(sampler: str, kind: str, run: Run) -> None:
    assert run(SPACE, SAMPLER="bruteforce", SPACE="branches", TOTAL_TRIALS="2").returncode == 0
    before = distinct(trials())
    result = run(SPACE, SAMPLER=sampler, SPACE=kind, TOTAL_TRIALS="4")
    assert result.returncode == 2
    assert "was begun with another search space (SAMPLER=bruteforce" in result.stderr
    assert f"choose another STUDY_NAME for SAMPLER={sampler}" in result.stderr
    assert distinct(trials()) == before


def test_samplers_of_one_form_may_follow_each_other(run: Run) -> None:
    for total, sampler in ((2, "random"), (4, "tpe"), (6, "nsgaii")):
        result = run(SPACE, SAMPLER=sampler, SPACE="continuous", TOTAL_TRIALS=str(total))
        assert result.returncode == 0, result.stdout
        assert len(trials()) == total
        assert open_study(Settings.from_env()).user_attrs["sampler"] == sampler


def test_grid_of_mnist_has_192_combinations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLER", "grid")
    found = space.combinations(optuna_mnist.search_space, "grid")
    assert len(found) == len({tuple(params.items()) for params in found}) == 192
    assert found == space.combinations(optuna_mnist.search_space, "bruteforce")


@pytest.mark.parametrize(
    ("name", "package"), [("cmaes", "cmaes"), ("qmc", "scipy"), ("gp", "scipy")]
)
def test_missing_package_is_one_line_with_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version

    def all_but_one(name: str) -> str:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", all_but_one)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("SAMPLER", name)
    monkeypatch.setenv("APPTAINER_CONTAINER", "/images/pytorch.sif")
    with pytest.raises(UserError, match=f"SAMPLER={name} needs {package}, which") as caught:
        samplers.check_packages(Settings.from_env())
    assert f"/images/pytorch.sif pip install --user -c image.txt {package}==" in str(caught.value)


def test_cmaes_moves_every_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the guide's space CMA-ES moves lr alone; of the numeric form, all eight, and well."""
    monkeypatch.setenv("SAMPLER", "cmaes")
    study = optuna.create_study(sampler=samplers.make_sampler(Settings.from_env(), 1))
    for _ in range(150):
        trial = study.ask()
        config = optuna_mnist.search_space(trial)
        if trial.number > 1:
            assert set(trial._relative_params or {}) == set(trial.params)
            assert len(trial.params) == 8
        far = [(config["conv1_channels"] - 64) / 64, (config["fc_dim"] - 512) / 512]
        study.tell(trial, sum(x * x for x in far) + (config["epochs"] - 2) ** 2)
    first, last = study.get_trials()[:20], study.get_trials()[-20:]
    for name, aim in (("conv1_channels", 64), ("fc_dim", 512), ("epochs", 2)):
        before, after = (sum(abs(t.params[name] - aim) for t in some) for some in (first, last))
        assert after < before, name


@pytest.mark.parametrize("pruner", settings.PRUNERS)
def test_pruners_with_epochs_searched(pruner: str) -> None:
    """A hopeless trial is pruned, if the pruner can by then, but never after its last epoch."""
    study = optuna.create_study(pruner=make_pruner(Settings.from_env(PRUNER=pruner)))
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    states: dict[bool, list[TrialState]] = {}
    for number in range(30):
        trial = study.ask()
        hopeless = number >= 16
        epochs = trial.suggest_categorical("epochs", [2, 3, 5])
        state = TrialState.COMPLETE
        for epoch in range(epochs):
            trial.report(9.0 + epoch if hopeless else 1.0 / (epoch + 1) + number / 1000, epoch)
            if trial.should_prune():
                state = TrialState.PRUNED
                assert epoch + 1 < epochs
                break
        study.tell(trial, None if state == TrialState.PRUNED else 1 / epochs, state)
        states.setdefault(hopeless, []).append(state)
    pruned = states[True].count(TrialState.PRUNED)
    assert pruned > 0 if pruner != "none" else pruned == 0


def test_several_objectives_run_on_mnist_and_show_their_front(run: Run) -> None:
    env = {"OBJECTIVES": "loss,parameters", "SAMPLER": "nsgaii", "TRAIN_IMAGES": "128"}
    assert run("init_optuna_db.py", **env).returncode == 0
    output = finish(start(MNIST, 2, TOTAL_TRIALS="6", **env))
    assert all("several objectives: nothing is pruned" in text for text in output)
    found = trials()
    assert [trial.state for trial in found] == [TrialState.COMPLETE] * 6
    for trial in found:
        config = optuna_mnist.search_space(trial)
        net = optuna_mnist.CNN(config)
        assert trial.values[1] == sum(p.numel() for p in net.parameters())
        assert len(trial.intermediate_values) == config["epochs"]
    front = open_study(Settings.from_env()).best_trials
    text = run("check_best_model.py", TOTAL_TRIALS="6").stdout
    assert f"Pareto front of loss, parameters: {len(front)} trials" in text
    assert all(f"  trial {trial.number:<5} {shown(trial.values[0]):<10}" in text for trial in front)
    kept = {path.name for path in Settings.from_env().checkpoints.iterdir()}
    assert kept == {f"trial-{trial.number:05d}.weights.pt" for trial in front}


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"OBJECTIVES": "loss,speed"}, "'speed' is unknown; optuna_mnist.py offers loss, param"),
        ({"OBJECTIVES": "loss,loss"}, "names one twice"),
        ({"OBJECTIVES": "loss,parameters", "SAMPLER": "cmaes"}, "use nsgaii or tpe"),
        ({"DIRECTION": "minimize,maximize"}, "2 directions for 1 objectives"),
        ({"OBJECTIVES": "loss,parameters", "DIRECTION": "minimize,up"}, "DIRECTION='up' is unk"),
    ],
)
def test_wrong_objectives(env: dict[str, str], says: str, run: Run, own_study: Path) -> None:
    for script in ("init_optuna_db.py", "optuna_mnist.py"):
        result = run(script, **env)
        assert result.returncode == 2
        assert says in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not own_study.exists()
