"""Does the storage change the search? TPE on ours and on stock SQLite, the same seeds, paired.

    python tests/benchmarks/storage_quality.py        about 5 minutes

Four workers take turns in an order that follows from the seed (claim and draw, report, finish), so
that trials run at the same time without a clock. What could differ: ours writes a running trial's
parameters with its first report, so another worker's TPE sees them a moment later than with stock.
The objective needs no storage. Less is better.
"""

from __future__ import annotations

import math
import os
import random
import tempfile
from pathlib import Path
from statistics import mean, median, stdev

from storage_engines import Engine, Stock

from storage_helpers import suggest

import optuna  # isort: skip

SEEDS, TRIALS, WORKERS = 50, 60, 4


def objective(trial: optuna.Trial) -> float:
    """A valley in the guide's space: one best combination, and a learning rate that depends."""
    x = suggest(trial)
    wanted = {"conv1_channels": 32, "conv2_channels": 64, "kernel1": 5, "kernel2": 3}
    wrong = sum(abs(math.log2(x[name] / best)) for name, best in wanted.items())
    best_lr = -7.5 + 0.3 * math.log2(x["batch_size"] / 16)
    return wrong + (math.log(x["lr"]) - best_lr) ** 2 + 0.3 * abs(math.log2(x["fc_dim"] / 256))


def search(engine: type[Engine], folder: Path, seed: int) -> float:
    """Return the best value of TRIALS trials by WORKERS interleaved workers."""
    running = engine(folder)
    samplers = [running.sampler("tpe", 1000 * seed + rank) for rank in range(WORKERS)]
    studies = [running.study(rank, sampler) for rank, sampler in enumerate(samplers)]
    trials: list[tuple[optuna.Trial, float, bool] | None] = [None] * WORKERS
    turn, finished = random.Random(seed), 0
    while finished < TRIALS:
        rank = turn.randrange(WORKERS)
        if (current := trials[rank]) is None:
            trial = studies[rank].ask()
            trials[rank] = (trial, objective(trial), False)
        elif not current[2]:
            current[0].report(current[1], 0)
            trials[rank] = (*current[:2], True)
        else:
            studies[rank].tell(*current[:2])
            trials[rank] = None
            finished += 1
    return studies[0].best_value


def main() -> None:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    results: dict[str, list[float]] = {Engine.name: [], Stock.name: []}
    for seed in range(SEEDS):
        for engine in (Engine, Stock):
            with tempfile.TemporaryDirectory(dir=memory) as folder:
                results[engine.name].append(search(engine, Path(folder), seed))
    ours, stock = results.values()
    difference = [a - b for a, b in zip(ours, stock, strict=True)]
    error = stdev(difference) / math.sqrt(SEEDS)
    better, worse = sum(d < 0 for d in difference), sum(d > 0 for d in difference)
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n if n else 0.5
    print(f"\nSearch quality: best of {TRIALS} trials, {WORKERS} workers, TPE, {SEEDS} seeds")
    print(f"  mean   ours {mean(ours):.4f}   stock {mean(stock):.4f}")
    print(f"  median ours {median(ours):.4f}   stock {median(stock):.4f}")
    print(f"  ours - stock: {mean(difference):+.4f} ± {1.96 * error:.4f} (95 %)")
    print(f"  ours better {better}, worse {worse}; sign test p = {min(1.0, 2 * tail):.2f}")


if __name__ == "__main__":
    main()
