#!/usr/bin/env python3
"""Whether FINAL_SEEDS=3 pays, by the length of the study: the same searches, with and without.

    python tests/benchmarks/search_finals.py             ten minutes
    python tests/benchmarks/search_finals.py --seeds 4   a first look

The bundle's defaults in virtual time on mnist, to 200 full trainings (search_simulator.py).  Each
search is judged twice: by its trial with the lowest value, and by the lowest mean of its best five,
whose ten final runs are paid for: the search ends so much earlier.  You should see, for each number
of workers, the mean difference of ln(regret) after so many full trainings ± its standard error, and
of how many trials these were.  Below zero the final runs have paid.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import search
from search_simulator import complete_trials, regrets

TRAININGS = (40, 60, 100, 150, 200)
FINALS = {**search.NEW, "FINAL_SEEDS": "3"}


def run(task: tuple[int, int]) -> list[tuple[float, int]]:
    """Return the difference that final runs make after TRAININGS, and the trials begun by then."""
    workers, seed = task
    problem = search.problem_of("mnist")
    longest = max(TRAININGS)
    done = complete_trials(problem, search.NEW, workers, longest, seed)
    without, finals = (
        regrets(done, problem, method, longest, seed) for method in (search.NEW, FINALS)
    )
    found = []
    for number in TRAININGS:
        within = [trial.number for trial in done if trial.spent <= number * problem.full]
        found.append((finals[number - 1] - without[number - 1], 1 + max(within, default=-1)))
    return found


def row(workers: int, found: search.Array) -> str:
    """Return a line of the table, of (seeds, TRAININGS, 2)."""
    differences = found[..., 0]
    means, trials = differences.mean(axis=0), found[..., 1].mean(axis=0)
    errors = differences.std(axis=0, ddof=1) / np.sqrt(len(differences))
    words = [f"{mean:+.2f} ± {error:.2f}" for mean, error in zip(means, errors, strict=True)]
    return line(workers, [(w, f"{n:.0f}") for w, n in zip(words, trials, strict=True)])


def line(first: object, pairs: Sequence[tuple[object, object]]) -> str:
    """Return a line of the table."""
    return f"    {first:>7}" + "".join(f"{left:>15}{right:>5}" for left, right in pairs)


def main() -> None:
    """Print a line for each number of workers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    fresh = range(search.CONFIRM, search.CONFIRM + seeds)
    print(f"mnist, {seeds} seeds; after how many full trainings, and of how many trials")
    print(line("workers", [(number, "of") for number in TRAININGS]))
    with ProcessPoolExecutor(os.cpu_count(), initializer=search.quiet) as pool:
        for workers in search.BUDGETS:
            tasks = [(workers, seed) for seed in fresh]
            print(row(workers, np.array(list(pool.map(run, tasks)))), flush=True)


if __name__ == "__main__":
    main()
