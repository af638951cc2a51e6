"""Studies in virtual time: Optuna's real objects, N workers that do not wait for each other.

A worker asks, reports epoch after epoch, asks the pruner after each, and tells: with the samplers
and pruners of hpo/search, each worker with its own sampler and seed, as in a job.  Only the
training is looked up instead of done.  The cost of a study is the epochs of all its workers, its
final runs (FINAL_SEEDS) among them.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import optuna
from optuna.trial import TrialState

from hpo.search.pruners import make_pruner
from hpo.search.samplers import make_sampler, sampler_seed
from hpo.settings import FINALISTS, Settings

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

    def known(self) -> list[dict[str, Any]]:
        """Return parameters that a user may know to do well."""


@dataclass
class _Running:
    trial: optuna.Trial
    config: dict[str, Any]
    curve: Sequence[float]
    pace: float  # of its epochs, in virtual time
    epochs: int = 0


class Done(NamedTuple):
    """A complete trial."""

    spent: int  # epochs of the whole study by then
    number: int
    config: dict[str, Any]
    value: float


def simulate(
    problem: Problem, method: Mapping[str, str], workers: int, budget: int, seed: int
) -> list[float]:
    """Return ln(regret) of the best model so far, after 1, 2, … budget full trainings.

    Args:
        problem: what is minimised.
        method: settings as in the environment, such as SAMPLER, PRUNER and FINAL_SEEDS; with KNOWN
            the study begins with what the problem says is known.
        workers: that share the study.
        budget: in full trainings, over all workers.
        seed: of the samplers and of the noise; the same one pairs the runs of two methods.
    """
    done = complete_trials(problem, method, workers, budget, seed)
    return regrets(done, problem, method, budget, seed)


def regrets(
    done: Sequence[Done], problem: Problem, method: Mapping[str, str], budget: int, seed: int
) -> list[float]:
    """Return what `simulate` does, for a search that is over.

    The best model is the complete trial with the lowest observed value, as check_best_model.py
    shows it; its regret is its `truth` above the lowest one that exists.  Before a trial is
    complete it is that of a typical random configuration.
    """
    settings = Settings.from_env(**method)
    scale = problem.typical - problem.best
    found = []
    for trainings in range(1, budget + 1):
        # Each final run is counted as a full training, though its epochs may be fewer.
        epochs = (trainings - settings.final_runs) * problem.full
        within = [trial for trial in done if trial.spent <= epochs]
        ranked = sorted(within, key=lambda trial: trial.value)
        best = _best(ranked, problem, settings, seed)
        regret = scale if best is None else problem.truth(best.config) - problem.best
        found.append(math.log(max(regret, FLOOR * scale)))
    return found


def _best(ranked: list[Done], problem: Problem, settings: Settings, seed: int) -> Done | None:
    """Return the first, or with final runs that of the first few whose mean is the lowest."""
    if not ranked or not settings.final_runs:
        return ranked[0] if ranked else None

    def mean(trial: Done) -> float:
        again = [np.random.default_rng([seed, trial.number, n]) for n in range(1, seeds)]
        values = [problem.curve(trial.config, rng)[-1] for rng in again]
        return float(np.mean([trial.value, *values]))

    seeds = 1 + settings.final_runs // FINALISTS
    return min(ranked[:FINALISTS], key=mean)


def complete_trials(
    problem: Problem, method: Mapping[str, str], workers: int, budget: int, seed: int
) -> list[Done]:
    """Return the complete trials of a study as they ended, without final runs."""
    settings = Settings.from_env(**method)
    samplers = [make_sampler(settings, sampler_seed(seed, rank, 0)) for rank in range(workers)]
    study = optuna.create_study(pruner=make_pruner(settings))
    for params in problem.known() if "KNOWN" in method else ():
        study.enqueue_trial(params)
    queue: list[tuple[float, int, _Running | None]] = [(0.0, rank, None) for rank in range(workers)]
    done: list[Done] = []
    spent = 0
    while spent < budget * problem.full:
        now, rank, running = heapq.heappop(queue)
        if running is None:
            study.sampler = samplers[rank]
            running = _start(problem, study, seed)
            heapq.heappush(queue, (now + running.pace, rank, running))
            continue
        state = _epoch(running)
        spent += 1
        if state == TrialState.COMPLETE:
            done.append(Done(spent, running.trial.number, running.config, running.curve[-1]))
        ended = state != TrialState.RUNNING
        if ended:
            value = running.curve[-1] if state == TrialState.COMPLETE else None
            study.tell(running.trial, value, state)
        later = now if ended else now + running.pace
        heapq.heappush(queue, (later, rank, None if ended else running))
    return done


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
