"""How the storage scales: dead time per trial for 1 … 32 workers, a fit, and what it foretells.

    python tests/benchmarks/storage_scaling.py        about 5 minutes

The model is the machine-repair queue: N workers train for T seconds, then need the file's one
lock for s seconds a trial in all, and p seconds of their own processor (sampler, Python). Its
exact solution is mean value analysis (Reiser and Lavenberg, 1980). s and p are fitted.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from storage_engines import Engine, run_workers

WORKERS = (1, 2, 4, 8, 16, 32)
DURATIONS = ((1.0, 8), (5.0, 3))  # seconds of a trial, trials of each worker
EXTRAPOLATED = (30, 300, 3000, 10_000)
MINUTES = (1.0, 5.0, 60.0, 600.0)  # seconds of a trial in the last table


def dead_time(workers: int, seconds: float, lock: float, own: float) -> float:
    """Return the seconds per trial that are not training, by mean value analysis."""
    queue = waiting = 0.0
    for n in range(1, workers + 1):
        waiting = lock * (1 + queue)
        queue = n * waiting / (seconds + own + waiting)
    return own + waiting


def fit(measured: dict[tuple[int, float], float]) -> tuple[float, float]:
    """Return (lock, own) in seconds with the least squared relative error, by a grid search."""

    def error(lock: float, own: float) -> float:
        return sum(
            (dead_time(workers, seconds, lock, own) / dead - 1) ** 2
            for (workers, seconds), dead in measured.items()
        )

    grid = [0.0001 * 1.12**i for i in range(60)]  # 0.1 ms … 80 ms
    return min(((lock, own) for lock in grid for own in grid), key=lambda p: error(*p))


def measure() -> dict[tuple[int, float], float]:
    measured = {}
    print("\nScaling (random sampler): workers, seconds of a trial, utilisation, dead time a trial")
    for seconds, trials in DURATIONS:
        for workers in WORKERS:
            with tempfile.TemporaryDirectory() as folder:
                took = run_workers(Engine(Path(folder)), workers, trials, seconds) / trials
            measured[workers, seconds] = took - seconds
            share = seconds / took
            print(f"  {workers:4} {seconds:6.0f} s {share:9.2%} {1000 * (took - seconds):9.1f} ms")
    return measured


def main() -> None:
    lock, own = fit(measure())
    print(f"\nFit: the lock is needed {1000 * lock:.2f} ms a trial, own work {1000 * own:.2f} ms")
    print("Foretold utilisation; trials per second at which SQLite ends:", f"{1 / lock:.0f}")
    print("  workers" + "".join(f"{seconds:9.0f} s" for seconds in MINUTES))
    for workers in EXTRAPOLATED:
        row = [s / (s + dead_time(workers, s, lock, own)) for s in MINUTES]
        print(f"  {workers:7}" + "".join(f"{share:11.1%}" for share in row))
    print("  workers up to which the utilisation is 95 %:")
    print("         " + "".join(f"{_largest(s, lock, own):11}" for s in MINUTES))


def _largest(seconds: float, lock: float, own: float) -> int:
    low, high = 0, 1 << 17
    while high - low > 1 + low // 100:
        middle = (low + high) // 2
        fine = seconds / (seconds + dead_time(middle, seconds, lock, own)) >= 0.95
        low, high = (middle, high) if fine else (low, middle)
    return low


if __name__ == "__main__":
    main()
