"""Studies in virtual time: Optuna's real objects, N workers that do not wait for each other.

A worker asks, reports epoch after epoch, asks the pruner after each, and tells: with the samplers
and pruners of hpo/search, each worker with its own sampler and seed, as in a job.  Only the
training is looked up instead of done.  The cost of a study is the epochs of all its workers.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.trial import TrialState

from hpo.search.pruners import make_pruner
from hpo.search.samplers import make_sampler, sampler_seed
from hpo.settings import Settings

SPEEDS = 0.2  # standard deviation of the logarithm of a trial's time per epoch
FLOOR = 1e-3  # smallest regret that counts, of that of a random configuration


class Problem(Protocol):
    """What a simulated study minimises."""

    name: str
    full: int  # epochs of a full training, the unit of budgets
    best: float  # the lowest `truth` there is
    typical: float  # the median `truth` of random configurations

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return a configuration."""

    def curve(self, config: Mapping[str, Any], rng: np.random.Generator) -> Sequence[float]:
        """Return one training's value after each of its epochs, with its noise."""

    def truth(self, config: Mapping[str, Any]) -> float:
        """Return the value after the last epoch without noise."""


@dataclass
class _Running:
    trial: optuna.Trial
    config: dict[str, Any]
    curve: Sequence[float]
    pace: float  # of its epochs, in virtual time
    epochs: int = 0


def simulate(
    problem: Problem, method: Mapping[str, str], workers: int, budget: int, seed: int
) -> list[float]:
    """Return ln(regret) of the best model so far, after 1, 2, … budget full trainings.

    The best model is the complete trial with the lowest observed value, as check_best_model.py
    shows it; its regret is its `truth` above the lowest one that exists.  Before a trial is
    complete it is that of a typical random configuration.

    Args:
        problem: what is minimised.
        method: settings as in the environment, such as SAMPLER and PRUNER.
        workers: that share the study.
        budget: in full trainings, over all workers.
        seed: of the samplers and of the noise; the same one pairs the runs of two methods.
    """
    settings = Settings.from_env(**method)
    samplers = [make_sampler(settings, sampler_seed(seed, rank, 0)) for rank in range(workers)]
    study = optuna.create_study(pruner=make_pruner(settings))
    queue: list[tuple[float, int, _Running | None]] = [(0.0, rank, None) for rank in range(workers)]
    found: list[float] = []
    best_seen, regret, spent = math.inf, problem.typical - problem.best, 0
    while len(found) < budget:
        now, rank, running = heapq.heappop(queue)
        if running is None:
            study.sampler = samplers[rank]
            running = _start(problem, study, seed)
            heapq.heappush(queue, (now + running.pace, rank, running))
            continue
        state = _epoch(running)
        spent += 1
        if state == TrialState.COMPLETE and running.curve[-1] < best_seen:
            best_seen, regret = running.curve[-1], problem.truth(running.config) - problem.best
        if state != TrialState.RUNNING:
            value = running.curve[-1] if state == TrialState.COMPLETE else None
            study.tell(running.trial, value, state)
        if spent % problem.full == 0:
            found.append(math.log(max(regret, FLOOR * (problem.typical - problem.best))))
        ended = state != TrialState.RUNNING
        later = now if ended else now + running.pace
        heapq.heappush(queue, (later, rank, None if ended else running))
    return found


def _start(problem: Problem, study: optuna.Study, seed: int) -> _Running:
    """Let a worker take a new trial; its noise and pace follow from its number and the seed."""
    trial = study.ask()
    config = problem.suggest(trial)
    rng = np.random.default_rng([seed, trial.number])
    pace = math.exp(SPEEDS * float(rng.standard_normal()))
    return _Running(trial, config, problem.curve(config, rng), pace)


def _epoch(running: _Running) -> TrialState:
    """Report one more epoch and return what the trial is afterwards."""
    step = running.epochs
    running.trial.report(running.curve[step], step)
    running.epochs += 1
    pruned = running.trial.should_prune()
    if running.epochs == len(running.curve):
        return TrialState.PRUNED if pruned else TrialState.COMPLETE
    return TrialState.PRUNED if pruned else TrialState.RUNNING
