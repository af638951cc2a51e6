#!/usr/bin/env python3
"""Preflight: do nodes, locks, GPUs, packages, data and disk allow a shared study?

    python check_cluster.py             on one machine, by hand
    srun python check_cluster.py        on every task of a job; the batch script does so

The tasks meet in a folder beside study.db, and task 0 prints one table (✓ fine, – a remark, ✗ to be
mended, with what to do about it).  Exit status of task 0: 0 all is well; 1 something must be
mended; 3 all is well but for the locks or file caches between the nodes, or they could not be
tested in time, and the batch script then has one process serve the study (hpo/study/serving).
Of the other tasks: 0.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from hpo import gpu, script
from hpo.job.meeting import ARRIVAL, PATIENCE, Facts, Meeting, wait_for
from hpo.packages import installed, pip_command, version_of
from hpo.settings import SCRIPTS, Settings, UserError, run_script

INCREMENTS = 25  # of the counter, by each task …
COUNT_SECONDS = 30.0  # … in this time: behind a slow link they are fewer
FREE_BYTES = 2 * 1024**3  # for study.db and checkpoints
OK, REMARK, BAD = "✓", "–", "✗"

SERVE = "the study must be served by one process (the job does so)"


class Row(NamedTuple):
    """One line of the table."""

    mark: str
    check: str
    found: str
    cure: str = ""


def main() -> int:
    """Run all checks; return the exit status."""
    settings = Settings.from_env()
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    attempt = int(os.environ.get("PREFLIGHT", "1"))  # job.sh
    meeting = Meeting(place(settings, attempt), settings.rank, tasks)
    meeting.say("facts", own_facts(settings))
    facts = meeting.hear("facts", ARRIVAL)
    if stray := meeting.strays(facts):
        print(f"check_cluster.py: {stray}", file=sys.stderr)
        meeting.leave()
        return 0
    rows = [shared_folder(facts, tasks)]
    if rows[0].mark == OK:
        if settings.sqlite_path:  # a database server has locks of its own
            rows += [locks(meeting, facts), counter(meeting, facts)]
    elif len(facts) < tasks:
        meeting.close()
    meeting.leave()
    if settings.rank:
        return 0
    for earlier in range(1, attempt):  # a disk, or a file server, has ended it
        shutil.rmtree(place(settings, earlier), ignore_errors=True)
    rows += [
        gpus(facts, settings.gpus_per_trial),
        versions(facts),
        data(facts),
        disk(facts),
        time_left(settings),
    ]
    print_table(rows)
    bad = [row.check for row in rows if row.mark == BAD]
    serve = bad and set(bad) <= {"locks", "SQLite"}
    return 0 if not bad else 3 if serve else 1


def place(settings: Settings, attempt: int) -> Path:
    """Return the folder in which the tasks meet: another one for each attempt of the job."""
    name = f".check_cluster-{settings.job_id or 'local'}"
    return settings.beside / (name if attempt == 1 else f"{name}-{attempt}")


def own_facts(settings: Settings) -> Facts:
    """Return what this task sees: its host, folder, GPU, packages, data and disk."""
    facts: Facts = {"host": os.uname().nodename, "folder": (SCRIPTS / "hpo").stat().st_mtime_ns}
    facts["packages"] = {name: installed(name) for name in ("optuna", "torch", "torchvision")}
    facts |= gpu_facts()
    facts["free"] = shutil.disk_usage(settings.beside).free
    facts["data"] = data_problem(settings.py_script)
    return facts


def data_problem(py_script: str) -> str | None:
    """Return what the script's prepare() finds wrong with its data; None if it has none."""
    if not script.defines(py_script, "prepare"):
        return None
    try:
        script.prepare(script.load(py_script))
    except UserError as error:
        return str(error)
    return ""


def gpu_facts() -> Facts:
    """Return the GPUs that this task can use, by name and UUID, and why one cannot be used."""
    facts: Facts = {"gpus": [], "uuids": [], "trouble": "", "cpu_torch": False}
    if not installed("torch"):
        return facts
    if not gpu.has_cuda():
        return {**facts, "cpu_torch": bool(gpu.promised())}
    import torch

    try:
        number = torch.cuda.device_count()
        facts["gpus"] = [torch.cuda.get_device_name(index) for index in range(number)]
        facts["uuids"] = gpu.uuids()
        number = number or bool(gpu.promised())  # then one that is lost says why
        facts["trouble"] = next(filter(None, map(gpu.trouble, range(number))), "")
    except (RuntimeError, AssertionError) as error:  # a driver, or a GPU, that has broken down
        facts["trouble"] = str(error).splitlines()[0]
    return facts


def hosts_of(facts: dict[int, Facts]) -> list[str]:
    """Return the names of the hosts, each once, in the order of the tasks."""
    return list(dict.fromkeys(facts[rank]["host"] for rank in sorted(facts)))


def shared_folder(facts: dict[int, Facts], tasks: int) -> Row:
    """Whether all tasks met, and see the same bundle."""
    hosts = hosts_of(facts)
    missing = sorted(set(range(tasks)) - set(facts))
    if missing:
        found = f"tasks {missing} have not come within {ARRIVAL:.0f} s"
        cure = "their nodes are slow, or do not see this folder: what they say stands in this log"
        return Row(BAD, "folder", found, f"{cure}; without a node: sbatch --exclude=NODE …")
    if len({each["folder"] for each in facts.values()}) > 1:
        return Row(BAD, "folder", f"differs between {hosts}", "copy the bundle to /work or /tmpdir")
    return Row(OK, "folder", f"{tasks} tasks on {len(hosts)} hosts ({', '.join(hosts)}) see it")


def locks(meeting: Meeting, facts: dict[int, Facts]) -> Row:
    """Whether a POSIX lock that task 0 holds excludes the tasks of the other hosts."""
    path = meeting.folder / "lock"
    if len(hosts_of(facts)) == 1:
        return Row(REMARK, "locks", "one host only: nothing to test between hosts")
    got, held = False, True
    with path.open("a") as file:
        if meeting.rank == 0:
            fcntl.lockf(file, fcntl.LOCK_EX)
            (meeting.folder / "locked").touch()
        else:
            held = wait_for((meeting.folder / "locked").exists, PATIENCE)
            elsewhere = facts[meeting.rank]["host"] != facts[0]["host"]
            got = held and elsewhere and could_lock(file.fileno())
        meeting.say("locks", {"got": got, "tried": held})
        heard = meeting.hear("locks")  # task 0 holds its lock until all have tried
    intruders = sorted({facts[rank]["host"] for rank, said in heard.items() if said["got"]})
    if intruders:
        found = f"a lock held on {facts[0]['host']} does not exclude {', '.join(intruders)}"
        return Row(BAD, "locks", found, SERVE)
    tried = {rank for rank, said in heard.items() if said["tried"]}
    return late("locks", tried, facts) or Row(OK, "locks", "a lock on one host excludes the others")


def late(check: str, heard: set[int], facts: dict[int, Facts]) -> Row | None:
    """Return the row of a check that not all tasks have finished: slow, which is not broken."""
    if not (missing := sorted(set(facts) - heard)):
        return None
    hosts = ", ".join(sorted({facts[rank]["host"] for rank in missing}))
    found = f"not finished within {PATIENCE:.0f} s by tasks {missing} on {hosts}: slow, not broken"
    return Row(BAD, check, found, f"not tested, so {SERVE}")


def could_lock(descriptor: int) -> bool:
    """Whether this task gets the lock at once."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def counter(meeting: Meeting, facts: dict[int, Facts]) -> Row:
    """Whether a number that all tasks increment at once in an SQLite file ends exact."""
    path, error, times = meeting.folder / "counter.db", "", 0
    if meeting.rank == 0:
        # Closed before anybody counts: on GlusterFS, who kept the connection open that had made the
        # file did not see what the others wrote.
        with closing(sqlite3.connect(path)) as db, db:
            db.execute("CREATE TABLE counter (value INTEGER)")
            db.execute("INSERT INTO counter VALUES (0)")
        (meeting.folder / "counter.ready").touch()
    if wait_for((meeting.folder / "counter.ready").exists, PATIENCE):
        try:
            times = increment(path)
        except sqlite3.Error as problem:
            error = str(problem)
        meeting.say("counter", {"error": error, "times": times})
    heard = meeting.hear("counter")
    if slow := late("SQLite", set(heard), facts):
        return slow
    errors = sorted({said["error"] for said in heard.values()} - {""})
    wanted, found = sum(said["times"] for said in heard.values()), read_counter(path)
    text = f"{found} of {wanted} increments by {meeting.tasks} tasks arrived"
    if errors:
        return Row(BAD, "SQLite", "; ".join([text, *errors]), SERVE)
    if not wanted:
        return Row(BAD, "SQLite", f"no task got the lock within {COUNT_SECONDS:.0f} s", SERVE)
    if found != wanted:
        return Row(BAD, "SQLite", f"{text}; the nodes' file caches differ", SERVE)
    if wanted < meeting.tasks * INCREMENTS:
        text += f"; slow: no more in {COUNT_SECONDS:.0f} s"
    return Row(OK, "SQLite", text)


def increment(path: Path) -> int:
    """Add to the counter as a worker writes to the study: one short transaction each time.

    Returns how often, in the time that there is.
    """
    end, times = time.monotonic() + COUNT_SECONDS, 0
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        while times == 0 or (times < INCREMENTS and time.monotonic() < end):
            db.execute(f"PRAGMA busy_timeout = {max(int(1000 * (end - time.monotonic())), 0)}")
            try:
                db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if "locked" in str(error):
                    break  # others were faster
                raise
            (value,) = db.execute("SELECT value FROM counter").fetchone()
            db.execute("UPDATE counter SET value = ?", (value + 1,))
            db.execute(f"PRAGMA busy_timeout = {int(1000 * PATIENCE)}")  # somebody reads
            db.execute("COMMIT")
            times += 1
    return times


def read_counter(path: Path) -> int | str:
    """Return the counter, or what SQLite says of a file that broken locks have destroyed."""
    try:
        with closing(sqlite3.connect(path)) as db:
            return int(db.execute("SELECT value FROM counter").fetchone()[0])
    except sqlite3.Error as error:
        return str(error)


def gpus(facts: dict[int, Facts], needed: int = 1) -> Row:
    """Whether each task has GPUs of its own that work, and as many as GPUS_PER_TRIAL."""
    names = {name for each in facts.values() for name in each["gpus"]}
    if broken := [rank for rank, each in facts.items() if each["trouble"]]:
        first = facts[broken[0]]
        cure = "nvidia-smi on that node; another node: sbatch --exclude=NODE …"
        found = f"tasks {broken} cannot use theirs, on {first['host']}: {first['trouble']}"
        return Row(BAD, "GPUs", found, cure)
    if not names:
        # Of a rehearsal; or pip has installed one that hides the image's.
        why = "is one without CUDA" if any(f["cpu_torch"] for f in facts.values()) else "sees none"
        return Row(REMARK, "GPUs", f"PyTorch {why}: the workers will use the CPU")
    if without := [rank for rank, each in facts.items() if not each["gpus"]]:
        return Row(BAD, "GPUs", f"tasks {without} see none", "see --gres and --gpus-per-task")
    if few := [rank for rank, each in facts.items() if len(each["gpus"]) < needed]:
        cure = f"--ntasks-per-node=1 and --gpus-per-task={needed} in the batch script"
        return Row(BAD, "GPUs", f"tasks {few} see fewer than GPUS_PER_TRIAL={needed}", cure)
    if shared := sharing(facts):
        cure = "see --ntasks-per-node and --gpus-per-task"
        return Row(BAD, "GPUs", f"tasks {shared} share one", cure)
    text = ", ".join(sorted(names))
    if len(facts) > 1 and not all(all(each["uuids"]) for each in facts.values()):
        return Row(REMARK, "GPUs", f"{text}; their UUIDs are not known: one for each task?")
    return Row(OK, "GPUs", f"{len(facts)} tasks, each with its own ({text})")


def sharing(facts: dict[int, Facts]) -> list[int]:
    """Return the tasks that see a GPU of another task.  A GPU is its UUID, whatever its number."""
    owners: dict[tuple[str, str], list[int]] = {}
    for rank, each in facts.items():
        for uuid in filter(None, each["uuids"]):
            owners.setdefault((each["host"], uuid), []).append(rank)
    return sorted({rank for ranks in owners.values() if len(ranks) > 1 for rank in ranks})


def versions(facts: dict[int, Facts]) -> Row:
    """Whether all tasks have the same versions, and the tested Optuna."""
    first = facts[min(facts)]["packages"]
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in first.items())
    tested = version_of("optuna")
    if any(each["packages"] != first for each in facts.values()):
        return Row(BAD, "packages", "differ between the hosts", "use one image and one HOME")
    if first["optuna"] != tested:
        return Row(BAD, "packages", f"{text} (tested: {tested})", pip_command("optuna"))
    return Row(OK, "packages", text)


def data(facts: dict[int, Facts]) -> Row:
    """Whether the data is there and whole, as far as the script's prepare() says so."""
    found = {each["data"] for each in facts.values()}
    if None in found:
        return Row(REMARK, "data", "the script has no prepare(), which would check it")
    if problems := found - {""}:
        return Row(BAD, "data", "cannot be used", " / ".join(sorted(problems)))
    return Row(OK, "data", "prepared by the script")


def disk(facts: dict[int, Facts]) -> Row:
    """Whether there is room for the study and its checkpoints."""
    free = min(each["free"] for each in facts.values())
    text = f"{free / 1024**3:.0f} GiB free"
    cure = "delete something, or put STUDY_DB on another file system"
    return Row(OK, "disk", text) if free > FREE_BYTES else Row(BAD, "disk", text, cure)


def time_left(settings: Settings) -> Row:
    """How long the job still runs."""
    if (left := settings.job_end - time.time()) == float("inf"):
        return Row(REMARK, "time", "nothing limits it")
    mark = OK if left > 180 else REMARK
    return Row(
        mark, "time", f"{left / 60:.0f} min until the job ends; the last 90 s are for ending"
    )


def print_table(rows: list[Row]) -> None:
    """Print the table, each problem with its cure below it."""
    for row in rows:
        print(f"  {row.mark} {row.check:9} {row.found}")
        if row.mark == BAD:
            print(f"      → {row.cure}")


if __name__ == "__main__":
    run_script(main)
