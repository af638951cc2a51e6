#!/usr/bin/env python3
"""Other projects' searches in the simulated studies of search.py: Syne Tune's and DEHB.

    python tests/benchmarks/search_peers.py --workers 4                     on mnist
    python tests/benchmarks/search_peers.py --workers 4 --lcbench FOLDER    search_problems.py

Each decides for itself what is trained next, and for how long; the trainings, their noise and the
workers' pace are those of search.py, and so is the table.  Syne Tune's stop a training, as this
bundle does.  DEHB trains what it asks for from the start.  The peers are installed into a temporary
environment that uses this one's packages (a minute); they need an older numpy.

You should see search.py's table, whose rows are random, old and new of search.py, and the peers.
Syne Tune's CQR and BORE, and SMAC3, which fit a large model for each suggestion, are left out.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import logging
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import search  # finds hpo, too
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from peers import make_beside
from search_problems import lcbench_names
from search_simulator import SPEEDS, Done, Problem, regrets

from hpo.search.space import Space, explore

PEERS = ("syne-tune==0.16.0", "DEHB==0.1.2")
NAMES = {"ST's ASHA": "ASHA", "ST's BOHB": "BOHB", "DEHB": ""}  # rows of the table
HALVING = 3
Config = dict[str, Any]


@dataclass
class Job:
    """A training that a peer has asked for."""

    number: int
    config: Config
    until: int  # reports
    token: Any  # the peer's own
    curve: Any = ()
    pace: float = 1.0
    reported: int = 0


class Peer(Protocol):
    """What decides."""

    def ask(self, number: int) -> Job:
        """Return what is trained next."""

    def goes_on(self, job: Job, value: float) -> bool:
        """Take a report; return whether the training goes on if it is not at its end."""


class SyneTune:
    """A scheduler of Syne Tune that stops trainings: `kind` of syne_tune.optimizer.baselines."""

    def __init__(self, kind: str, problem: Problem, space: Space, seed: int) -> None:
        self._full = problem.full
        spaces = importlib.import_module("syne_tune.config_space")
        self._trial = importlib.import_module("syne_tune.backend.trial_status").Trial
        baselines = importlib.import_module("syne_tune.optimizer.baselines")
        np.random.seed(seed)  # it draws brackets from there
        self._scheduler = getattr(baselines, kind)(
            {name: self._domain(spaces, d) for name, d in space.items()},
            metric="loss",
            time_attr="epoch",
            max_t=problem.full,
            reduction_factor=HALVING,
            random_seed=seed,
        )

    @staticmethod
    def _domain(spaces: Any, d: BaseDistribution) -> Any:
        if isinstance(d, CategoricalDistribution):
            return spaces.choice(list(d.choices))
        assert isinstance(d, IntDistribution | FloatDistribution)
        whole = isinstance(d, IntDistribution)
        kind = ("lograndint" if whole else "loguniform") if d.log else "randint" if whole else None
        return getattr(spaces, kind or "uniform")(d.low, d.high)

    def ask(self, number: int) -> Job:
        """See Peer."""
        config = self._scheduler.suggest().config
        trial = self._trial(number, config, datetime.now())
        self._scheduler.on_trial_add(trial)
        return Job(number, config, self._full, trial)

    def goes_on(self, job: Job, value: float) -> bool:
        """See Peer."""
        result = {"loss": value, "epoch": job.reported}
        if job.reported == len(job.curve):
            self._scheduler.on_trial_complete(job.token, result)
            return False
        return bool(self._scheduler.on_trial_result(job.token, result) == "CONTINUE")


class Dehb:
    """DEHB: differential evolution in the brackets of Hyperband."""

    def __init__(self, problem: Problem, space: Space, seed: int) -> None:
        spaces = importlib.import_module("ConfigSpace")
        self._space = space
        config_space = spaces.ConfigurationSpace(seed=seed)
        config_space.add([self._parameter(spaces, name, d) for name, d in space.items()])
        self._folder = tempfile.TemporaryDirectory()
        self._dehb = importlib.import_module("dehb").DEHB(
            cs=config_space,
            min_fidelity=1,
            max_fidelity=problem.full,
            eta=HALVING,
            n_workers=1,
            seed=seed,
            save_freq="end",
            output_path=self._folder.name,
            log_level="ERROR",
        )

    @staticmethod
    def _parameter(spaces: Any, name: str, d: BaseDistribution) -> Any:
        if isinstance(d, CategoricalDistribution):
            return spaces.Categorical(name, [str(i) for i in range(len(d.choices))])
        assert isinstance(d, IntDistribution | FloatDistribution)
        kind = spaces.Integer if isinstance(d, IntDistribution) else spaces.Float
        return kind(name, (d.low, d.high), log=d.log)

    def ask(self, number: int) -> Job:
        """See Peer."""
        asked = self._dehb.ask()
        config = dict(asked["config"])
        for name, d in self._space.items():
            if isinstance(d, CategoricalDistribution):
                config[name] = d.choices[int(config[name])]
        return Job(number, config, round(asked["fidelity"]), asked)

    def goes_on(self, job: Job, value: float) -> bool:
        """See Peer."""
        if job.reported < min(job.until, len(job.curve)):
            return True
        self._dehb.tell(job.token, {"fitness": value, "cost": job.reported})
        return False


def make_peer(name: str, problem: Problem, space: Space, seed: int) -> Peer:
    """Return a peer by the name of its row."""
    if name == "DEHB":
        return Dehb(problem, space, seed)
    return SyneTune(NAMES[name], problem, space, seed)


@cache
def space_of(name: str) -> Space:
    """Return what a problem suggests."""
    return explore(search.problem_of(name).suggest)


def trained_to_the_end(
    peer: Peer, problem: Problem, space: Space, workers: int, budget: int, seed: int
) -> list[Done]:
    """Return the trainings that came to their end, as search_simulator.complete_trials does."""
    done: list[Done] = []
    queue: list[tuple[float, int, Job | None]] = [(0.0, rank, None) for rank in range(workers)]
    spent = number = 0
    while spent < budget * problem.full:
        now, rank, job = heapq.heappop(queue)
        if job is None:
            job = peer.ask(number)
            number += 1
            rng = np.random.default_rng([seed, job.number])
            job.pace = math.exp(SPEEDS * float(rng.standard_normal()))
            job.config = {name: job.config[name] for name in space}
            job.curve = problem.curve(job.config, rng)
            heapq.heappush(queue, (now + job.pace, rank, job))
            continue
        value = job.curve[job.reported]
        job.reported += 1
        spent += 1
        goes_on = peer.goes_on(job, value)
        if job.reported == len(job.curve):
            done.append(Done(spent, job.number, job.config, value))
        heapq.heappush(queue, (now + job.pace * goes_on, rank, job if goes_on else None))
    return done


def run(task: tuple[str, str, int, int, int]) -> list[float]:
    """Return what search.run does, of a peer or of a method of search.py."""
    name, who, workers, budget, seed = task
    if who in search.METHODS:
        return search.run((name, search.METHODS[who], workers, budget, seed))
    problem, space = search.problem_of(name), space_of(name)
    peer = make_peer(who, problem, space, seed)
    found = trained_to_the_end(peer, problem, space, workers, budget, seed)
    scale = math.log(problem.typical - problem.best)
    return [ln - scale for ln in regrets(found, problem, {}, budget, seed)]


def _quiet() -> None:
    search.quiet()
    logging.getLogger("syne_tune").setLevel(logging.ERROR)


def compare(names: list[str], workers: int, seeds: range) -> str:
    """Return the table of one number of workers."""
    rows, budget = ("random", "old", "new", *NAMES), search.BUDGETS[workers]
    tasks = [(name, who, workers, budget, seed) for who in rows for name in names for seed in seeds]
    with ProcessPoolExecutor(os.cpu_count(), initializer=_quiet) as pool:
        found = np.array(list(pool.map(run, tasks)))
    tables = found.reshape(len(rows), len(names), len(seeds), budget)
    what = "mnist" if names == ["mnist"] else f"{len(names)} data sets of LCBench"
    title = f"{what}, {workers} workers, {budget} full trainings; {len(seeds)} seeds each"
    return search.shown(title, dict(zip(rows, tables, strict=True)))


def main() -> None:
    """Print the table, in an environment that has the peers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, choices=list(search.BUDGETS), default=4)
    parser.add_argument("--lcbench", default="", metavar="FOLDER")
    arguments = parser.parse_args()
    if importlib.util.find_spec("dehb") is None:
        with tempfile.TemporaryDirectory() as folder:
            python = make_beside(Path(folder), PEERS)
            subprocess.run([python, "-W", "ignore", *sys.argv], check=True)
        return
    names = lcbench_names(arguments.lcbench) if arguments.lcbench else ["mnist"]
    seeds = range(search.CONFIRM, search.CONFIRM + arguments.seeds)
    print(compare(names, arguments.workers, seeds))


if __name__ == "__main__":
    main()
