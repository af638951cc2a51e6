"""A study of many trials that looks like a real one, made in a second; for the report's tests."""

from __future__ import annotations

import math
import random
from datetime import datetime, timedelta

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

SPACE: dict[str, BaseDistribution] = {
    "lr": FloatDistribution(1e-4, 5e-3, log=True),
    "batch_size": CategoricalDistribution([16, 32, 64, 128]),
    "conv1_channels": CategoricalDistribution([8, 16, 32, 64]),
    "conv2_channels": CategoricalDistribution([16, 32, 64, 128]),
    "kernel1": CategoricalDistribution([3, 5, 7]),
    "kernel2": CategoricalDistribution([3, 5, 7]),
    "fc_dim": CategoricalDistribution([64, 128, 256, 512]),
    "epochs": CategoricalDistribution([2, 3, 5]),
}


def fill(study: optuna.Study, trials: int, workers: int = 4, named: bool = True) -> None:
    """Add finished trials of several workers; `named` ones have the user attribute `worker`."""
    rng = random.Random(1)
    free = [datetime(2026, 3, 1, 12) + timedelta(seconds=rank) for rank in range(workers)]
    for number in range(trials):
        rank = min(range(workers), key=lambda r: free[r])
        trial = _trial(rng, number, len(study.directions))
        seconds = 4.0 * max(1, len(trial.intermediate_values)) * rng.uniform(0.8, 1.2)
        trial.datetime_start = free[rank]
        free[rank] += timedelta(seconds=seconds)
        trial.datetime_complete = free[rank]
        if named:
            trial.user_attrs = {**trial.user_attrs, "worker": f"worker {rank} on n{rank // 2}"}
        study.add_trial(trial)


def _trial(rng: random.Random, number: int, objectives: int) -> FrozenTrial:
    """Return one trial: of twelve, about six complete, five are pruned and one has failed."""
    params = {
        name: math.exp(rng.uniform(math.log(1e-4), math.log(5e-3)))
        if isinstance(distribution, FloatDistribution)
        else rng.choice(distribution.choices)  # type: ignore[attr-defined]
        for name, distribution in SPACE.items()
    }
    bad = abs(math.log(params["lr"] / 1e-3)) / 20 + 0.5 / params["fc_dim"]
    curve = [0.03 + bad + 0.1 / (step + 1) for step in range(int(params["epochs"]))]
    state = TrialState.COMPLETE
    if number % 12 == 11:
        state, curve = TrialState.FAIL, []
    elif number > 10 and number % 12 >= 7:
        state, curve = TrialState.PRUNED, curve[:1]
    values = [curve[-1], 1000.0 * params["fc_dim"], 1.0][:objectives] if curve else None
    return optuna.create_trial(
        params=params,
        distributions=SPACE,
        state=state,
        values=values if state == TrialState.COMPLETE else None,
        intermediate_values=dict(enumerate(curve)) if objectives == 1 else {},
        user_attrs={"fail_reason": "out of memory (MemoryError)"} if not curve else {},
    )
