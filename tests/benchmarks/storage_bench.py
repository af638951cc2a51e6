"""What each storage costs, side by side: stock SQLite, journal file, gRPC proxy, ours, and plain
sqlite3 as the floor. Rounds are interleaved, and the medians of at least three are printed.

    python tests/benchmarks/storage_bench.py                 everything, about 20 minutes
    python tests/benchmarks/storage_bench.py utilisation     one part: counts, overhead,
                                                             utilisation, holder, scaling, quality

A trial is the guide's: 8 parameters, 4 reports, each followed by should_prune (MedianPruner).
Nothing here passes or fails: the limits stand beside the figures. Set TMPDIR to the file system
that is to be measured.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import storage_quality
import storage_scaling
from storage_engines import (
    ENGINES,
    Engine,
    Floor,
    Journal,
    Stock,
    one_trial,
    past_trials,
    run_workers,
)

import optuna  # isort: skip
import sqlalchemy  # isort: skip
from optuna.storages import BaseStorage  # isort: skip
from storage_helpers import fork, kill  # isort: skip
from hpo import packages  # isort: skip
from hpo.settings import UserError, run_script  # isort: skip
from hpo.study.storage import StudyStorage  # isort: skip

ROUNDS = 3


def in_rounds(measure: Callable[[type[Engine], Path], float]) -> dict[str, list[float]]:
    """Measure all engines in turn, ROUNDS times; the values by name."""
    values: dict[str, list[float]] = {engine.name: [] for engine in ENGINES}
    for _ in range(ROUNDS):
        for engine in ENGINES:
            with tempfile.TemporaryDirectory() as folder:
                values[engine.name].append(measure(engine, Path(folder)))
    return values


def show(values: dict[str, list[float]], unit: str, limit: str) -> None:
    """Print medians, and the median of each round's ratio to ours."""
    ours = values[Engine.name]
    for name, times in values.items():
        ratio = median(x / y for x, y in zip(times, ours, strict=True))
        each = " ".join(f"{x:8.2f}" for x in times)
        note = f"   limit: {limit}" if name == Engine.name else ""
        print(f"  {name:14} {median(times):9.2f} {unit}   x {ratio:5.2f}   ({each} ){note}")


def commit_time() -> None:
    """Print what one small commit costs here and now: a busy disk spoils every figure below."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        db = sqlite3.connect(Path(folder) / "commit.db", isolation_level=None)
        db.execute("CREATE TABLE t (x)")
        for _ in range(50):
            start = time.perf_counter()
            db.execute("INSERT INTO t VALUES (1)")
            times.append(1000 * (time.perf_counter() - start))
        db.close()
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    print(
        f"{tempfile.gettempdir()}: a commit takes {median(times):.1f} ms (slowest of 50: "
        f"{max(times):.0f} ms); load {load:.1f} per core"
    )


def counts() -> None:
    """Write transactions and SELECTs per trial, in steady state with one worker."""
    print("\nStatements per trial (8 parameters, 4 reports, TPE, MedianPruner)")
    for engine in (Stock, Unhurried, Engine):
        with tempfile.TemporaryDirectory() as folder:
            study = engine(Path(folder)).study(0, engine.sampler("tpe", 0))
            seen: list[str] = []
            for _ in range(20):
                study.tell(trial := study.ask(), one_trial(trial, 0.0))
            _trace(study._storage, seen.append)
            for _ in range(10):
                study.tell(trial := study.ask(), one_trial(trial, 0.0))
        commits = sum(s.startswith("COMMIT") for s in seen) / 10
        selects = sum(s.lstrip().startswith(("SELECT", "WITH")) for s in seen) / 10
        limits = {Unhurried: "   limits: 7 and 10", Engine: "   limits: 2 and 10"}
        limit = limits.get(engine, "")
        print(f"  {engine.name:18} {commits:5.1f} transactions   {selects:5.1f} SELECTs{limit}")


class Unhurried(Engine):
    """Ours as it is when an epoch takes longer than a report may wait for another."""

    name = "ours, epochs > 1 s"

    def storage(self, rank: int) -> BaseStorage:
        return StudyStorage(self.path)


def _trace(storage: Any, callback: Callable[[str], None]) -> None:
    if hasattr(storage, "file"):
        storage.file.connection().set_trace_callback(callback)
        return
    engine = storage._backend.engine
    sqlalchemy.event.listen(engine, "connect", lambda db, _: db.set_trace_callback(callback))
    storage.remove_session()
    engine.dispose()  # and connect anew


def overhead() -> None:
    """Milliseconds that a trial costs beside its training, with 500 and 5 000 trials behind it.

    Ours has the bundle's TPE (hpo/search/stopped.py), the others have Optuna's; "in memory" is
    either without any storage.  The random sampler shows the storage alone.
    """
    for past in (500, 5000):
        trials = past_trials(past)
        for name in ("tpe", "random"):
            print(f"\nOverhead per trial after {past} trials, one worker, SAMPLER={name}")
            values = in_rounds(partial(_overhead, trials, name))
            show(values, "ms", "12 ms" if past == 500 else "24 ms")
            for engine in (Stock, Engine):
                memory = optuna.create_study(sampler=engine.sampler(name, 0))
                memory.pruner = optuna.pruners.MedianPruner()
                memory.add_trials(trials)
                print(f"  in memory      {_per_trial(memory):9.2f} ms   sampler of: {engine.name}")


def _overhead(trials: Any, name: str, engine: type[Engine], folder: Path) -> float:
    with engine(folder) as running:
        sampler = engine.sampler(name, 0)
        if engine is Floor:
            return running.worker(0, 40, 0.0, sampler) / 40 * 1000
        study = running.study(0, sampler)
        _fill(running, folder, trials)
        return _per_trial(study)


def _fill(running: Engine, folder: Path, trials: Any) -> None:
    """Put trials into the engine's study; by our storage where the file is SQLite: quicker."""
    if isinstance(running, Journal):
        optuna.load_study(study_name="study", storage=running.storage(0)).add_trials(trials)
        return
    storage = Engine.storage(running, 0)
    for trial in trials:
        storage.create_new_trial(1, trial)
    storage.remove_session()


def _per_trial(study: optuna.Study, trials: int = 40) -> float:
    for _ in range(3):  # what is read once is no cost of a trial
        study.tell(trial := study.ask(), one_trial(trial, 0.0))
    times = []
    for _ in range(trials):
        start = time.perf_counter()
        study.tell(trial := study.ask(), one_trial(trial, 0.0))
        times.append(time.perf_counter() - start)
    return median(times) * 1000


def utilisation() -> None:
    """Share of the workers' time that is training, with one-second trials."""
    for workers, limit in ((8, "98 %"), (16, "97 %")):
        print(f"\nUtilisation, {workers} workers, one-second trials (random sampler)")

        def measure(engine: type[Engine], folder: Path, workers: int = workers) -> float:
            with engine(folder) as running:
                return 100 * 8 / run_workers(running, workers, 8, 1.0)

        show(in_rounds(measure), "%", limit)
        with tempfile.TemporaryDirectory() as folder:
            took = run_workers(Engine(Path(folder)), workers, 8, 1.0, tpe=True)
        print(f"  ours with TPE  {100 * 8 / took:9.2f} %")


def holder() -> None:
    """How long a writer waits for a lock whose holder was killed."""
    print("\nDelay by a dead holder of the lock")
    for engine in (Stock, Journal, Engine):
        with tempfile.TemporaryDirectory() as folder:
            running = engine(Path(folder))
            study = running.study(0, optuna.samplers.RandomSampler())
            trial = study.ask()
            pid = fork(_hold, running, Path(folder) / "held")
            while not (Path(folder) / "held").exists():
                time.sleep(0.01)
            kill(pid)
            start = time.monotonic()
            study.tell(trial, 1.0)
            limit = "   limit: 1 s" if engine is Engine else ""
            print(f"  {engine.name:14} {time.monotonic() - start:9.3f} s{limit}")


def _hold(running: Engine, sign: Path) -> None:
    storage: Any = running.storage(1)
    if isinstance(running, Journal):
        storage._backend._lock.acquire()
    else:
        db = Engine.storage(running, 1)
        context = db.file.write()  # type: ignore[attr-defined]
        context.__enter__().execute("UPDATE trials SET number = 0")
    sign.touch()
    time.sleep(600)


PARTS: dict[str, Callable[[], None]] = {
    "counts": counts,
    "overhead": overhead,
    "utilisation": utilisation,
    "holder": holder,
    "scaling": storage_scaling.main,
    "quality": storage_quality.main,
}


def main() -> int:
    """Run the parts that are named, or all; return the exit status."""
    packages.need("This benchmark", "grpcio", "protobuf", "cmaes", "scipy")
    for name in sys.argv[1:] or PARTS:
        if name not in PARTS:
            raise UserError(f"{name!r} is no part; there are: {', '.join(PARTS)}")
        commit_time()
        PARTS[name]()
    return 0


if __name__ == "__main__":
    run_script(main)
