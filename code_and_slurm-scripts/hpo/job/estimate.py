"""What a job will cost, before it is submitted.

    bash run-optuna-multinode_Turpan.sh --estimate        in front of it, for the batch script

    python -m hpo.job.estimate PARTITION NODES TASKS CORES_PER_TASK SECONDS

SECONDS is the job's time limit.  A task has one GPU, and WORKERS_PER_GPU workers.  Turpan bills an
exclusive node whole, 80 cores for as long as the job runs, and a shared one by the cores asked for;
GPUs are free.
"""

from __future__ import annotations

import math
import statistics
import sys

from hpo.settings import Settings, UserError, run_script
from hpo.study.opening import open_study
from hpo.study.trials import count

CORES_PER_NODE = 80
SHARED = ("shared", "3g.40gb", "2g.20gb")  # partitions that are billed by the core
START_SECONDS = 40.0  # container, preflight, imports, report: an assumption, to be on the safe side
ASSUMED_TRIAL_SECONDS = 5.0  # the example on one A100: an assumption, not a measurement


def trial_seconds(settings: Settings) -> tuple[list[float], int]:
    """Return the seconds that each finished trial of the study took, and how many are left."""
    try:
        study = open_study(settings)
    except UserError:  # no study yet: nothing to learn from
        return [], settings.total_trials
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.is_finished()]
    seconds = [trial.duration.total_seconds() for trial in finished if trial.duration]
    return seconds, count(study, settings).left


def estimate(left: int, each: float, workers: int, limit: float) -> tuple[int, float]:
    """Return how many jobs are needed, and the seconds that they run together.

    Args:
        left: trials still to run.
        each: seconds per trial.
        workers: trials at a time.
        limit: a job's time limit in seconds.
    """
    work = math.ceil(left / workers) * each
    useful = max(limit - START_SECONDS - 90, each)  # the last 90 s are for draining
    jobs = max(math.ceil(work / useful), 1)
    return jobs, work + jobs * START_SECONDS


def main() -> int:
    """Print the estimate; return the exit status."""
    if len(sys.argv) != 6:
        raise UserError("usage: hpo.job.estimate PARTITION NODES TASKS CORES_PER_TASK SECONDS")
    partition, (nodes, tasks, cores, limit) = sys.argv[1], map(int, sys.argv[2:])
    settings = Settings.from_env()
    workers = tasks * settings.workers_per_gpu
    seconds, left = trial_seconds(settings)
    each = statistics.mean(seconds) if seconds else ASSUMED_TRIAL_SECONDS
    jobs, total = estimate(left, each, workers, limit)
    billed = tasks * cores if partition in SHARED else nodes * CORES_PER_NODE
    source = f"the mean of {len(seconds)} finished trials" if seconds else "assumed: none finished"
    print(f"study        {settings.study_name}: {left} trials left")
    print(f"nodes        {nodes} ({partition}), {tasks} tasks, {workers} workers")
    print(f"per trial    {each:.1f} s ({source})")
    print(
        f"time         about {total / 60:.0f} min in {jobs} job(s) of at most {limit / 60:.0f} min"
    )
    print(f"billed       about {billed * total / 3600:.1f} core-hours ({billed} cores)")
    return 0


if __name__ == "__main__":
    run_script(main)
