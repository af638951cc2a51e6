"""hpo/tpe.py suggests what Optuna's own TPESampler suggests, in every kind of study."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import optuna
import pytest
from optuna.samplers import TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator
from optuna.trial import TrialState

from hpo import tpe
from hpo.samplers import make_sampler
from hpo.tpe import QuickTPESampler

Sampler: TypeAlias = "type[TPESampler]"
Suggest: TypeAlias = Callable[[optuna.Trial], "list[float]"]
Directions: TypeAlias = "list[Literal['minimize', 'maximize']]"
TRIALS, WORKERS = 150, 4


def guide(trial: optuna.Trial) -> list[float]:
    lr = trial.suggest_float("lr", 1e-4, 5e-3, log=True)
    sizes = [trial.suggest_categorical(name, [16, 32, 64, 128]) for name in "abc"]
    return [abs(math.log(lr / 1e-3)) + sum(abs(s - 64) for s in sizes) / 64]  # often the same


def numbers(trial: optuna.Trial) -> list[float]:
    x = trial.suggest_float("x", -1, 1)
    n = trial.suggest_int("n", 1, 9) + trial.suggest_int("m", 1, 64, log=True)
    return [x * n - trial.suggest_float("y", 0, 1, step=0.1)]


def branches(trial: optuna.Trial) -> list[float]:
    value = trial.suggest_float("x", 0, 1) + trial.suggest_int("n", 1, 3)
    if trial.number % 3 == 0:
        value += trial.suggest_float("rare", 0, 1)
    if trial.number > 80:  # from now on the space is a larger one
        value -= trial.suggest_float("late", 0, 1) + trial.suggest_float("later", 0, 1)
    return [value]


def two_objectives(trial: optuna.Trial) -> list[float]:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    return [x, y - x]


def constrained(trial: optuna.Trial) -> list[float]:
    x, y = trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)
    trial.set_constraint("sum", x + y - 1)
    return [x - y]


def search(sampler: Sampler, suggest: Suggest, directions: Directions) -> list[dict[str, Any]]:
    """Let workers take turns; some trials are pruned, some fail; return all suggestions."""
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="tpe", directions=directions)
    studies = [
        optuna.load_study(study_name="tpe", storage=storage, sampler=sampler(seed=rank))
        for rank in range(WORKERS)
    ]
    running: list[tuple[optuna.Trial, list[float]] | None] = [None] * WORKERS
    turn = random.Random(0)
    for _ in range(2 * TRIALS):
        rank = turn.randrange(WORKERS)
        if (current := running[rank]) is None:
            trial = studies[rank].ask()
            running[rank] = (trial, suggest(trial))
            continue
        running[rank] = None
        finish(study, *current, pruning=len(directions) == 1)
    return [trial.params for trial in study.get_trials()]


def finish(study: optuna.Study, trial: optuna.Trial, values: list[float], pruning: bool) -> None:
    kind = trial.number % 10 if pruning else 9
    if kind < 4:  # steps 0 … 3, or none
        for step in range(kind):
            trial.report(math.nan if trial.number % 7 == 0 else values[0] + step, step)
        study.tell(trial, state=TrialState.PRUNED)
    elif kind == 4:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, values)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    ("suggest", "directions"),
    [
        (guide, ["minimize"]),
        (guide, ["maximize"]),
        (numbers, ["minimize"]),
        (branches, ["minimize"]),
        (two_objectives, ["minimize", "maximize"]),
        (constrained, ["minimize"]),
    ],
)
def test_same_suggestions_as_optuna(
    suggest: Suggest, directions: Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = search(QuickTPESampler, suggest, directions)
    assert ours == search(TPESampler, suggest, directions)
    assert len(ours) > TRIALS / 2
    if suggest is guide:  # a wrong split is noticed
        monkeypatch.setattr(tpe, "default_gamma", lambda n: 3)
        assert ours != search(QuickTPESampler, suggest, directions)


def test_it_is_the_sampler_of_the_workers() -> None:
    assert isinstance(make_sampler("tpe", 0), QuickTPESampler)


def test_a_finished_trial_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    row = QuickTPESampler._row

    def counted(self: QuickTPESampler, study: optuna.Study, trial: Any) -> list[float]:
        looked.append(trial.number)
        return row(self, study, trial)

    monkeypatch.setattr(QuickTPESampler, "_row", counted)
    study = optuna.create_study(sampler=QuickTPESampler(seed=0))
    study.optimize(lambda trial: guide(trial)[0], n_trials=70)
    assert sorted(looked) == list(range(69))


def test_log_pdf_is_optunas() -> None:
    search_space = {
        "choice": optuna.distributions.CategoricalDistribution(["a", "b", "c"]),
        "number": optuna.distributions.FloatDistribution(1e-3, 1, log=True),
    }
    rng = np.random.default_rng(0)
    seen = {"choice": rng.integers(0, 3, 40).astype(float), "number": rng.uniform(1e-3, 1, 40)}
    asked = {"choice": rng.integers(0, 3, 24).astype(float), "number": rng.uniform(1e-3, 1, 24)}
    parameters = TPESampler()._parzen_estimator_parameters
    quick = tpe.QuickParzenEstimator(seen, dict(search_space), parameters).log_pdf(asked)
    stock = _ParzenEstimator(seen, dict(search_space), parameters).log_pdf(asked)
    np.testing.assert_allclose(quick, stock, rtol=1e-12)
