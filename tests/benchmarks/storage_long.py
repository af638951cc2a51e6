"""What a trial costs its worker with 100 trials behind it, and with 9 900: 10 000 in one study.

    python tests/benchmarks/storage_long.py        a minute

The bundle's own worker loop in one process, with an objective of four reports and no training, and
SAMPLER=random: what TPE costs grows with the trials, whatever the storage.  Without the backup: one
of the workers makes it every 40 seconds, which is no trial's.  Prints milliseconds of processor and
of time per trial, and how many times as much the long study takes.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

from storage_engines import past_trials

import optuna  # isort: skip
from storage_helpers import NAME, file_of, make_study, open_study, storage_of, suggest  # isort: skip
from hpo.settings import forget, run_script  # isort: skip
from hpo.study import tables, upkeep  # isort: skip
from hpo.worker import run_worker  # isort: skip

BEHIND = 100, 9900
FIRST, TRIALS = 5, 95  # what is read once is no cost of a trial; those that are measured


def fill(path: Path, number: int) -> None:
    """Put finished trials into a new study, in one transaction: copies of a hundred."""
    study, past = open_study(path), past_trials(100)
    with file_of(storage_of(study)).write() as db:
        for each in range(number):
            trial = copy.copy(past[each % 100])
            trial.number = each
            tables.insert_trial(db, 1, trial)


def measure(behind: int) -> tuple[float, float]:
    """Return the milliseconds of processor and of time that a trial takes."""
    begin: list[tuple[float, float]] = []

    def objective(trial: optuna.Trial) -> float:
        begin.append((time.process_time(), time.perf_counter()))
        lr = float(suggest(trial)["lr"])
        for step in range(4):
            trial.report(lr + step, step)
            trial.should_prune()
        return lr

    with tempfile.TemporaryDirectory() as folder:
        path = make_study(Path(folder))
        fill(path, behind)
        os.environ.update(STUDY_DB=f"sqlite:///{path}", STUDY_NAME=NAME, SAMPLER="random")
        os.environ["TOTAL_TRIALS"] = str(behind + FIRST + TRIALS + 1)
        forget()
        with redirect_stdout(sys.stderr):
            assert run_worker(objective) == 0
    processor, clock = (
        1000 * (last - first) / TRIALS
        for first, last in zip(begin[FIRST], begin[FIRST + TRIALS], strict=True)
    )
    return processor, clock


def main() -> int:
    """Measure both; return the exit status."""
    upkeep.backup = lambda *_: False  # type: ignore[attr-defined]
    found = []
    for behind in BEHIND:
        with ProcessPoolExecutor(1) as worker:  # a process of its own, as in a job
            found.append(worker.submit(measure, behind).result())
    for behind, (processor, clock) in zip(BEHIND, found, strict=True):
        print(
            f"behind {behind:4} trials: {processor:6.1f} ms of processor, {clock:6.1f} ms a trial"
        )
    few, many = found
    print(
        f"the long study: {many[0] / few[0]:.2f} x the processor, {many[1] / few[1]:.2f} x the time"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
