"""The fault matrix: what a study goes through while the cluster, or its file server, has a fault.

    FILE_SYSTEM=bind bash tests/run.sh cluster -k faults       about 8 minutes
    FILE_SYSTEM=gluster bash tests/run.sh cluster -k faults    about 20 minutes, with the server's

Not in CI: without FILE_SYSTEM nothing of it is collected.  Each fault is a row of the table at the
end of the run: how many trials were begun again, whether somebody had to submit again, how long
until an epoch of what the fault had hit was trained again, and the line that tells of it.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from cluster.rehearsal import Outcome
from cluster.test_bundle import SCRIPT, Bundle, bundle, with_optuna

__all__ = ["bundle", "with_optuna"]  # its fixtures

AWAY_SECONDS = 45.0
on_a_server = pytest.mark.skipif(
    os.environ.get("FILE_SYSTEM") != "gluster", reason="a folder of this machine has no server"
)
TELL = "open(os.path.expanduser('~/epochs'), 'a').write(f'{trial.number} {time.time()} %s')"
WHO = "{os.uname().nodename} {os.getpid()}\\\\n"


class Epoch(NamedTuple):
    """An epoch that a trial has trained."""

    trial: int
    when: float
    host: str
    process: str


@pytest.fixture
def watched(bundle: Bundle) -> Iterator[Bundle]:
    """The bundle, whose trials last, and write each epoch to a file in HOME, which has no fault."""
    tell = TELL % WHO
    bundle.insert(f"import os, time; time.sleep(2); {tell}", before="loss, _ = evaluate(")
    yield bundle
    bundle.cluster.run("login", "rm", "-f", "epochs")


def epochs(bundle: Bundle) -> list[Epoch]:
    """Return what the trials have written, in the order of time."""
    lines = [
        line.split() for line in bundle.cluster.read(f"{bundle.cluster.home}/epochs").split("\n")
    ]
    found = [Epoch(int(line[0]), float(line[1]), line[2], line[3]) for line in lines if line]
    return sorted(found, key=lambda epoch: epoch.when)


def outcome(
    bundle: Bundle, fault: str, jobs: list[int], since: float, line: str, resubmitted: str = "no"
) -> Outcome:
    """Return the fault's row; `since` is when it came or, if it lasted, when it was over."""
    runs: dict[int, list[Epoch]] = defaultdict(list)
    for epoch in epochs(bundle):
        if not any(epoch[2:] == run[2:] for run in runs[epoch.trial]):
            runs[epoch.trial].append(epoch)
    again = [run for trial in runs.values() for run in trial[1:]]
    after = [epoch.when - since for epoch in again or epochs(bundle) if epoch.when > since]
    logs = [bundle.log(job) for job in jobs]
    logs += [bundle.log(job, worker) for job in jobs for worker in bundle.workers(job)]
    comments = [bundle.cluster.job(job).get("Comment", "") for job in jobs]
    told = re.search(rf"^.*({line}).*$", "\n".join(logs + comments), re.MULTILINE)
    return Outcome(
        fault,
        bundle.cluster.file_system,
        len([trial for trial in runs.values() if len(trial) > 1]),
        resubmitted,
        min(after, default=0.0),
        told[0].strip() if told else "",
    )


@on_a_server
@pytest.mark.parametrize(
    ("fault", "begin", "end"), [("server", "stop", "start"), ("disk", "full", "free")]
)
def test_job_outlives(
    fault: str, begin: str, end: str, watched: Bundle, tell: Callable[[Outcome], None]
) -> None:
    """No trial is lost or run twice, and the job needs nobody.

    What the workers said meanwhile is lost: their logs are on the same disk.
    """
    bundle, start = watched, time.monotonic()
    job = bundle.submit()
    bundle.wait_finished(2)
    bundle.cluster.script(fault, begin)
    try:
        time.sleep(AWAY_SECONDS)  # that is how long the fault is
    finally:
        bundle.cluster.script(fault, end)
    over = time.time()
    bundle.finish(job, timeout=600)
    name = f"{fault} {begin} for {AWAY_SECONDS:.0f} s"
    tell(outcome(bundle, name, [job], over, "full or away|trying again for|it works again"))
    bundle.done(name, [job], start)
    assert "The study is complete." in bundle.log(job)
    assert list(bundle.workers(job)) == [0, 1, 2, 3]


KILL = ("pkill", "--oldest", "--signal=KILL", "--full", "^[^ ]*python -u .*optuna_mnist")


@pytest.mark.parametrize("fault", ["a worker is killed", "a node is lost", "scancel"])
def test_interrupted(fault: str, watched: Bundle, tell: Callable[[Outcome], None]) -> None:
    """What a worker had that was killed is trained to its end by another, or by the next job."""
    bundle, start = watched, time.monotonic()
    jobs = [bundle.submit()]
    bundle.wait_finished(2)
    since, line = time.time(), "the worker died.*"
    if fault == "scancel":
        line = "back to the queue"
        bundle.cluster.run("login", "scancel", str(jobs[0]))
        assert bundle.cluster.wait_end(jobs[0], 600) == "CANCELLED"
        jobs.append(bundle.submit())
    elif fault == "a node is lost":
        line = "NODE FAIL.*|node failure.*|CANCELLED.*|requeue.*"
        bundle.cluster.script("crash", "n2")
    else:
        bundle.cluster.run("n1", *KILL)
    try:
        if fault == "a node is lost":
            bundle.cluster.wait_state(jobs[0], {"PENDING"}, 600)
        bundle.finish(jobs[-1], timeout=600)
    finally:
        if fault == "a node is lost":
            bundle.cluster.script("restart", "n2")
    again = "yes" if len(jobs) > 1 else "no"
    tell(outcome(bundle, fault, jobs, since, line, again))
    bundle.done(fault, jobs, start)


def test_no_fault(watched: Bundle, tell: Callable[[Outcome], None]) -> None:
    """What the rest is held against; with FILE_SYSTEM=gluster-stale it is a fault of its own."""
    bundle, start = watched, time.monotonic()
    job = bundle.submit()
    bundle.finish(job, timeout=600)
    tell(outcome(bundle, "no fault", [job], time.time(), "increments|cannot share the file"))
    bundle.done("no fault", [job], start)


def test_export_none(watched: Bundle, tell: Callable[[Outcome], None]) -> None:
    """`sbatch --export=NONE`: the tasks have the settings that the script has."""
    bundle, start = watched, time.monotonic()
    script = bundle.cluster.shared / bundle.scripts.lstrip("/") / SCRIPT
    text = script.read_text().replace("TOTAL_TRIALS:-500", "TOTAL_TRIALS:-6")
    here = "\nexport TRAIN_IMAGES=1000 OMP_NUM_THREADS=1 LEASE_GRACE=15 "
    script.write_text(text.replace("module load …", here))
    job = bundle.cluster.sbatch("--export=NONE", SCRIPT, folder=bundle.scripts)
    bundle.finish(job, timeout=600)
    tell(outcome(bundle, "--export=NONE", [job], time.time(), "The study is complete"))
    bundle.done("--export=NONE", [job], start, total=6)


def test_long_epoch(watched: Bundle, tell: Callable[[Outcome], None]) -> None:
    """An epoch longer than the rest of the job is interrupted; the successor goes on.

    The report is last: on a slow file system the job may end in its middle.
    """
    bundle, start = watched, time.monotonic()
    seconds = 'open("long", "w") and 600 if not trial.number and not os.path.exists("long") else 0'
    bundle.insert(f"import os, time; time.sleep({seconds})", before="loss, _ = evaluate(")
    jobs, since = [bundle.submit("--time=3", CHAIN_JOBS="9", TOTAL_TRIALS="6")], 0.0
    while True:
        state = bundle.cluster.wait_end(jobs[-1], 600)
        assert state in ("COMPLETED", "TIMEOUT"), bundle.log(jobs[-1])
        since = since or time.time()
        if "The study is complete." in bundle.log(jobs[-1]):
            break
        found = re.search(r"^Submitted batch job (\d+)$", bundle.log(jobs[-1]), re.MULTILINE)
        assert found, bundle.log(jobs[-1])
        jobs.append(int(found[1]))
    assert len(jobs) > 1
    line = "the running epoch is interrupted"
    tell(outcome(bundle, "an epoch longer than the job", jobs, since, line, "by itself"))
    bundle.done("an epoch longer than the job", jobs, start, total=6)
