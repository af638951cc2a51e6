"""What a job will cost, before it is submitted.

    bash run-optuna-multinode_Turpan.sh --estimate        in front of it, for the batch script

    python -m hpo.job.estimate BATCH_SCRIPT

It reads the #SBATCH lines.  A task has one GPU, and WORKERS_PER_GPU workers.  Turpan bills an
exclusive node whole, 80 cores for as long as the job runs, and a shared one by the cores asked for;
GPUs are free.  Of another site's bill it knows nothing, and shows what is asked for.
"""

from __future__ import annotations

import math
import os
import re
import statistics
import sys
from pathlib import Path

from hpo.settings import DEFAULTS, Settings, UserError, run_script
from hpo.study.opening import open_study
from hpo.study.trials import count
from hpo.values import misspelt
from hpo.words import duration

CORES_PER_NODE = 80
SHARED = ("shared", "3g.40gb", "2g.20gb")  # partitions that are billed by the core
TURPAN = Path("/work/conteneurs")  # only there
START_SECONDS = 40.0  # container, preflight, imports, report: an assumption, to be on the safe side
ASSUMED_TRIAL_SECONDS = 5.0  # the example on one A100: an assumption, not a measurement
SHORT = {"p": "partition", "N": "nodes", "n": "ntasks", "c": "cpus-per-task", "t": "time"}
UNLIMITED = ("0", "infinite", "unlimited")
FORMS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds]"


def header(text: str) -> dict[str, str]:
    """Return the options of a batch script's #SBATCH lines, by their long names."""
    found = {}
    for name, value in re.findall(r"^#SBATCH[ \t]+(--[\w-]+|-\w)[= \t]*([^\s#]*)", text, re.M):
        name = name.lstrip("-")
        found[SHORT.get(name, name)] = value.strip("\"'")
    return found


def seconds_of(text: str) -> float:
    """Return the seconds of a --time in any of Slurm's forms (FORMS); infinite for no limit.

    Raises:
        UserError: it is none.
    """
    if text.lower() in UNLIMITED:
        return math.inf
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", text):
        raise UserError(f"#SBATCH --time={text} is no time of Slurm's: {FORMS}")
    days, _, rest = text.rpartition("-")
    numbers = [int(part) for part in rest.split(":")]
    if days or len(numbers) == 3:  # hours first
        numbers += [0] * (3 - len(numbers))
    else:
        numbers = [0, *numbers, *[0] * (2 - len(numbers))]
    hours, minutes, seconds = numbers
    return float(int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds)


def tasks_of(options: dict[str, str]) -> tuple[int, int]:
    """Return the nodes and the tasks that a header asks for."""
    try:
        nodes = int(options.get("nodes", "1").split("-")[0])
        tasks = nodes * int(options.get("ntasks-per-node", "1"))
        return nodes, int(options.get("ntasks", tasks))
    except ValueError as error:
        raise UserError(f"a number of the #SBATCH lines cannot be read: {error}") from error


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


def cost(options: dict[str, str], nodes: int, tasks: int, seconds: float) -> str:
    """Return the line about the bill: Turpan's, or what is asked for."""
    cores = tasks * int(options.get("cpus-per-task", "1"))
    if TURPAN.is_dir():
        shared = options.get("partition", "") in SHARED
        cores = cores if shared else nodes * CORES_PER_NODE
        return f"billed       about {cores * seconds / 3600:.1f} core-hours ({cores} cores)"
    hours = seconds / 3600
    text = f"{cores * hours:.1f} core-hours, {tasks * hours:.1f} GPU-hours, {nodes * hours:.1f}"
    return f"asked for    about {text} node-hours (what is billed, your site says)"


def main() -> int:
    """Print the estimate; return the exit status."""
    if len(sys.argv) != 2:
        raise UserError("usage: hpo.job.estimate BATCH_SCRIPT")
    options = header(Path(sys.argv[1]).read_text())
    nodes, tasks = tasks_of(options)
    limit = seconds_of(options.get("time", "0"))
    settings = Settings.from_env()
    workers = tasks * settings.workers_per_gpu
    seconds, left = trial_seconds(settings)
    each = statistics.mean(seconds) if seconds else ASSUMED_TRIAL_SECONDS
    jobs, total = estimate(left, each, workers, limit)
    source = f"the mean of {len(seconds)} finished trials" if seconds else "assumed: none finished"
    most = f"of at most {duration(limit)}" if limit < math.inf else "without a time limit"
    partition = options.get("partition", "default partition")
    print(f"study        {settings.study_name}: {left} trials left")
    print(f"nodes        {nodes} ({partition}), {tasks} tasks, {workers} workers")
    print(f"per trial    {each:.1f} s ({source})")
    print(f"time         about {duration(total)} in {jobs} job(s) {most}")
    print(cost(options, nodes, tasks, total))
    for text in misspelt(os.environ, list(DEFAULTS)):
        print(text)
    return 0


if __name__ == "__main__":
    run_script(main)
