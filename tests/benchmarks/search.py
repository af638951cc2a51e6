#!/usr/bin/env python3
"""How good the search is: samplers and pruners in simulated studies, with intervals.

    python tests/benchmarks/search.py                     all of search-figures.txt: an hour
    python tests/benchmarks/search.py --seeds 4 --workers 4   a first look: ten minutes
    python tests/benchmarks/search.py --lcbench FOLDER    printed alone (search_problems.py)

Real samplers and pruners of hpo/search in virtual time (search_simulator.py), on the problems of
search_problems.py.  Two runs of the same problem and seed are a pair.  A method is chosen on the
seeds from 0, and confirmed on those from 1000, which are the ones of the table.

You should see a table for each number of workers, and at the end the same in search-figures.txt:

    regret     what the best model's loss lies above the lowest there is: its geometric mean, as a
               share of that of a typical random configuration
    ln         the mean difference of ln(regret) to `old`, ± its standard error; -0.7 halves it
    half       the same after half the budget, to `old` after all of it: what is not above zero
               reaches in half the epochs what `old` does
    × random   how many times less is needed than with `random`, to reach the same regret: the
               worse one of both at the end; with the interval that holds 95 % of the resamplings
    × old      the same beside the defaults of before (TPE and median as in Optuna)

With several problems these are resampled; with one, its seeds: it then says nothing of others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

BUNDLE = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(BUNDLE / "code_and_slurm-scripts"), str(Path(__file__).parent)]

import numpy as np  # noqa: E402
import optuna  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from search_problems import lcbench, lcbench_names, mnist, table, table_names  # noqa: E402
from search_simulator import Problem, simulate  # noqa: E402

Array = NDArray[np.float64]
FIGURES = Path(__file__).with_name("search-figures.txt")
BUDGETS = {1: 40, 4: 60, 16: 100, 64: 140}  # full trainings, by the number of workers
CONFIRM = 1000  # the first seed of those that nothing was chosen by
NEW = {"SAMPLER": "tpe", "PRUNER": "halving"}
OLD = {"SAMPLER": "tpe:count_pruned=True", "PRUNER": "median"}
RANDOM = {"SAMPLER": "random", "PRUNER": "none"}
METHODS = {
    "random": RANDOM,
    "old": OLD,
    "old, halving": {**OLD, "PRUNER": "halving"},
    "new, median": {**NEW, "PRUNER": "median"},
    "new": NEW,
    "new, finals": {**NEW, "FINAL_SEEDS": "3"},  # paid out of the same budget
    "new, known": {**NEW, "KNOWN": "1"},  # known_good(), or FROM_STUDY (search_problems.py)
    "gp": {**NEW, "SAMPLER": "gp"},
    "gp, whole": {"SAMPLER": "gp", "PRUNER": "none"},
}
GP = ("gp", "gp, whole")
GP_WORKERS = 4  # with more of them its suggestions take hours
SPLIT = ("old, halving", "new, median")  # which part of new it is
RESAMPLINGS = 2000
ROW = "    {:<13}{:>6}{:>15}{:>15}   {:<19}{:<17}"


class Part(NamedTuple):
    """One table of the figures."""

    title: str
    problems: list[str]
    workers: int
    seeds: range
    methods: dict[str, dict[str, str]]


def problem_of(name: str) -> Problem:
    """Return a problem by its name."""
    if "/" in name:
        return lcbench(name)
    return mnist() if name == "mnist" else table(name)


def run(task: tuple[str, dict[str, str], int, int, int]) -> list[float]:
    """Return ln(regret) after each full training: problem, method, workers, budget, seed."""
    name, method, workers, budget, seed = task
    problem = problem_of(name)
    scale = np.log(problem.typical - problem.best)
    return [ln - float(scale) for ln in simulate(problem, method, workers, budget, seed)]


def measure(pool: ProcessPoolExecutor, part: Part) -> dict[str, Array]:
    """Return each method's ln(regret): (problems, seeds, budget)."""
    budget = BUDGETS[part.workers]
    tasks = [
        (name, method, part.workers, budget, seed)
        for method in part.methods.values()
        for name in part.problems
        for seed in part.seeds
    ]
    found = np.array(list(pool.map(run, tasks)))
    shape = (len(part.methods), len(part.problems), len(part.seeds), budget)
    return dict(zip(part.methods, found.reshape(shape), strict=True))


# ---- what the runs say ---------------------------------------------------------------------


def speed_up(mine: Array, other: Array) -> float:
    """Return how many times less budget `mine` needs for what both reach; each (…, budget)."""
    a, b = (np.minimum.accumulate(x.reshape(-1, x.shape[-1]).mean(axis=0)) for x in (mine, other))
    goal = max(a[-1], b[-1])
    return float((np.argmax(b <= goal) + 1) / (np.argmax(a <= goal) + 1))


def interval(mine: Array, other: Array) -> tuple[float, float]:
    """Return the speed-up's 2.5 % and 97.5 % points over resampled problems, or else seeds."""
    rng = np.random.default_rng(0)
    axis = 0 if len(mine) > 1 else 1
    drawn = []
    for _ in range(RESAMPLINGS):
        picked = rng.integers(mine.shape[axis], size=mine.shape[axis])
        drawn.append(speed_up(np.take(mine, picked, axis), np.take(other, picked, axis)))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def difference(mine: Array, other: Array, share: float = 1) -> tuple[float, float]:
    """Return the mean paired difference of ln(regret), and its standard error.

    It is between `mine` after this share of the budget and `other` after all of it.
    """
    last = mine[..., round(share * mine.shape[-1]) - 1] - other[..., -1]
    each = last.mean(axis=1) if len(last) > 1 else last[0]
    return float(last.mean()), float(each.std(ddof=1) / np.sqrt(len(each)))


def shown(title: str, found: dict[str, Array]) -> str:
    """Return the table of one number of workers."""
    lines = [title, ROW.format("", "regret", "ln", "half", "× random", "× old").rstrip()]
    for name, mine in found.items():
        regret = f"{np.exp(mine[..., -1].mean()):.3f}"
        against = {1.0: name != "old", 0.5: True}
        numbers = [
            _with_error(mine, found["old"], share, asked) for share, asked in against.items()
        ]
        words = [_with_interval(mine, found[other], name == other) for other in ("random", "old")]
        lines.append(ROW.format(name, regret, *numbers, *words).rstrip())
    return "\n".join(lines)


def _with_error(mine: Array, other: Array, share: float, asked: bool) -> str:
    if not asked:
        return ""
    ln, error = difference(mine, other, share)
    return f"{ln:+.2f} ± {error:.2f}"


def _with_interval(mine: Array, other: Array, same: bool) -> str:
    if same:
        return ""
    low, high = interval(mine, other)
    return f"{speed_up(mine, other):.1f} ({low:.1f} … {high:.1f})"


# ---- the command ---------------------------------------------------------------------------


def parts(seeds: int, workers: Sequence[int], folder: str) -> Iterable[Part]:
    """Yield what is measured: first what was chosen by, then what confirms it on other seeds."""
    fresh = range(CONFIRM, CONFIRM + seeds)
    few = fresh[: max(1, seeds // 10)]
    if folder:
        names = lcbench_names(folder)
        for number in workers:
            size = f"{number} workers, {BUDGETS[number]} full trainings"
            title = f"{len(names)} data sets of LCBench, {size}; {len(few)} seeds each"
            yield Part(title, names, number, few, confirming(number))
        return
    if 16 in workers:
        title = f"mnist, 16 workers, {BUDGETS[16]} full trainings; chosen by {seeds} seeds from 0"
        chosen = {name: METHODS[name] for name in METHODS if name not in GP}
        yield Part(title, ["mnist"], 16, range(seeds), chosen)
    for number in workers:
        size = f"{number} workers, {BUDGETS[number]} full trainings"
        title = f"mnist, {size}; {seeds} other seeds"
        yield Part(title, ["mnist"], number, fresh, confirming(number))
    names = table_names()
    for number in workers if names else ():  # nothing is stopped there: new is much as old
        title = f"{len(names)} tables, {number} workers, {BUDGETS[number]} trials"
        yield Part(f"{title}; {len(few)} seeds each", names, number, few, confirming(number))


def confirming(workers: int) -> dict[str, dict[str, str]]:
    """Return the methods that are measured on other seeds than those they were chosen by."""
    left_out = SPLIT if workers <= GP_WORKERS else (*SPLIT, *GP)
    return {name: method for name, method in METHODS.items() if name not in left_out}


def head(command: Sequence[str]) -> str:
    """Return what the figures are of."""
    problem = mnist()
    explained = ", ".join(f"{100 * share:.0f} %" for share in problem.explained)
    return (
        "How good the search is.  Written by\n\n"
        f"    .venv/bin/python tests/benchmarks/search.py {' '.join(command)}".rstrip()
        + "\n\nWhat the columns mean: search.py.  The surrogate of mnist is of "
        f"{problem.curves} curves of\n{problem.configurations} configurations; left out, a "
        f"curve's ln(loss) after 1 to 5 epochs is foretold to\n{explained}.\n"
        f"The loss after 5 epochs differs between seeds by {100 * problem.noise:.0f} %; the best "
        f"thousandth of all\nconfigurations is within {100 * problem.near:.0f} % of the lowest.\n"
    )


def main() -> None:
    """Measure one part after another; write the figures after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", choices=list(BUDGETS), default=[*BUDGETS])
    parser.add_argument("--lcbench", default="", metavar="FOLDER")
    arguments = parser.parse_args()
    text = [head(sys.argv[1:])]
    print(text[0], flush=True)
    with ProcessPoolExecutor(os.cpu_count(), initializer=quiet) as pool:
        for part in parts(arguments.seeds, arguments.workers, arguments.lcbench):
            text.append(shown(part.title, measure(pool, part)) + "\n")
            print(text[-1], flush=True)
            if not arguments.lcbench:
                FIGURES.write_text("\n".join(text))


def quiet() -> None:
    """Make a process of the pool use one core and say nothing."""
    os.environ["OMP_NUM_THREADS"] = "1"
    optuna.logging.set_verbosity(optuna.logging.WARNING)


if __name__ == "__main__":
    main()
