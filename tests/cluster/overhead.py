"""What a trial costs on the rehearsal cluster's file systems: ours, Optuna's SQLite, its journal.

    python tests/cluster/overhead.py                    as root, about 7 minutes
    python tests/cluster/overhead.py gluster 3          one file system, three rounds
    python tests/cluster/overhead.py share              on GlusterFS, n2 behind a slow link: its
                                                        share of the trials; about 15 minutes

Trials of 1 s with 4 reports, of one worker on n1, and of 4 on n1 and n2 (two each): the
milliseconds of a trial that are not its own.  The storages are measured in turn in each round; the
medians are printed, and the median of each round's ratio to ours.  On GlusterFS, too: how often
one worker's trial asks the file server for something, which no other work on the machine changes.

What share should show: behind 5 ms n2 has half of its fair share or more, 25 % of the trials.  On a
quiet machine it has 26 % of trials of 1 s, and 39 % of trials of 10 s; behind 20 ms none, and 30 %.
Other work on the machine takes more from n2: 12 % of trials of 1 s behind 5 ms with 20 processes
per core.

The workers are processes of this machine, that see a host's /work/groupe through the host's own
mount: its caches and locks are that host's.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import mean, median
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "benchmarks")]

from storage_engines import Engine, Journal, Stock, one_trial, warm_up  # noqa: E402

from cluster.rehearsal import STATE, Cluster  # noqa: E402

from optuna.samplers import RandomSampler  # isort: skip # noqa: E402

ENGINES: tuple[type[Engine], ...] = (Engine, Stock, Journal)
HOSTS = ("n1", "n2")
SECONDS, TRIALS = 1.0, 3
SHARES = (
    # link of n2, seconds of a trial, seconds that are measured
    ("whole", 1.0, 60.0),
    ("5", 1.0, 60.0),
    ("20", 1.0, 60.0),
    ("20 1", 1.0, 60.0),
    ("whole", 10.0, 180.0),
    ("5", 10.0, 180.0),
    ("20", 10.0, 180.0),
)
USER, PLACE = 1000, Path("/mnt")
PR_SET_SECUREBITS, NO_SETUID_FIXUP = 28, 4
CLONE_NEWNS, OPEN_TREE_CLONE, AT_FDCWD, MOVE_MOUNT_F_EMPTY_PATH = 0x20000, 1, -100, 4
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *arguments: object) -> int:
    """Call a function of the C library and return what it returns.  Raises OSError."""
    if (result := int(getattr(LIBC, name)(*arguments))) < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def see(host: str, file_system: str) -> Path:
    """Show /work/groupe, as `host` has mounted it, to this process; return the user's folder."""
    place = PLACE / f"{file_system}-{host}"
    pid = (STATE / host / "pid").read_text().split()[0]
    here, there = (os.open(f"/proc/{who}/ns/mnt", os.O_RDONLY) for who in ("self", pid))
    call("setns", there, CLONE_NEWNS)
    tree = call("open_tree", AT_FDCWD, b"/work/groupe", OPEN_TREE_CLONE)
    call("setns", here, CLONE_NEWNS)
    place.mkdir()
    call("move_mount", tree, b"", AT_FDCWD, os.fsencode(place), MOVE_MOUNT_F_EMPTY_PATH)
    for descriptor in (here, there, tree):
        os.close(descriptor)
    return place / Cluster.user


@contextmanager
def as_user() -> Iterator[None]:
    """Be the ordinary user, for root SQLite does more; what Python is made of may be root's."""
    os.setegid(USER)
    os.seteuid(USER)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def asked() -> int:
    """Return how often the file server was asked since the last call; 0 if there is none."""
    if Cluster().file_system == "bind":
        return 0
    command = ("gluster", "volume", "profile", "gluster", "info", "incremental")
    options = ["--user", "root", "--cd", "/"]
    told = Cluster().run("storage", *command, options=options, timeout=600).stdout
    return sum(int(count) for count in re.findall(r"[1-9][\d.]* [nu]s +(\d+) +[A-Z]+$", told, re.M))


def work(rank: int, places: list[Path], engines: list[Engine], rounds: int, step: Barrier) -> None:
    """Run trials on each storage, when it is its turn; print the mean milliseconds of a trial."""
    sampler = RandomSampler(seed=rank)
    for engine in engines:
        folder = places[rank % len(places)] / engine.path.parent.name
        engine.path = folder / engine.path.name
    studies = [engine.study(rank, sampler) for engine in engines]
    for study in studies:  # what is done once is no cost of a trial
        study.tell(trial := study.ask(), one_trial(trial, 0.0))
    step.wait()
    for _ in range(rounds):
        for name, study in enumerate(studies):
            step.wait()
            time.sleep(random.Random(rank).uniform(0, SECONDS))  # never in step
            start = time.monotonic()
            for _ in range(TRIALS):
                study.tell(trial := study.ask(), one_trial(trial, SECONDS))
            took = (time.monotonic() - start) / TRIALS - SECONDS
            (places[0] / engines[name].path.parent.name / f"took-{rank}").write_text(str(took))
            step.wait()


def measure(places: list[Path], workers: int, rounds: int) -> list[list[tuple[float, float]]]:
    """Return milliseconds and requests per trial, for each storage in each round."""
    step = multiprocessing.Barrier(workers + 1, timeout=600)
    found: list[list[tuple[float, float]]] = []
    with as_user(), tempfile.TemporaryDirectory(dir=places[0]) as folder:
        engines = [engine(Path(folder)) for engine in ENGINES]
        arguments = (places, engines, rounds, step)
        context = multiprocessing.get_context("fork")
        processes = [context.Process(target=work, args=(n, *arguments)) for n in range(workers)]
        for process in processes:
            process.start()
        step.wait()  # all have begun: that is in no count
        for _ in range(rounds):
            found.append([])
            for _ in engines:
                found[-1].append(_one(Path(folder), workers, step))
        for process in processes:
            process.join()
    return found


def _one(folder: Path, workers: int, step: Barrier) -> tuple[float, float]:
    """Let the workers run trials on the next storage."""
    os.seteuid(0)
    asked()
    step.wait()
    step.wait()
    requests = asked()
    os.seteuid(USER)
    took = [float((folder / f"took-{rank}").read_text()) for rank in range(workers)]
    return 1000 * mean(took), requests / TRIALS / workers


def show(file_system: str, workers: int, found: list[list[tuple[float, float]]]) -> None:
    """Print a row for each storage."""
    for number, engine in enumerate(ENGINES):
        times = [row[number][0] for row in found]
        ratio = median(row[number][0] / row[0][0] for row in found)
        requests = median(row[number][1] for row in found)
        print(
            f"{file_system:11} {workers:7}  {engine.name:14} {median(times):7.0f} ms"
            f"  x {ratio:5.2f} {f'{requests:9.0f}' if requests else '         '}"
            f"   ({' '.join(f'{time:.0f}' for time in times)})",
            flush=True,
        )


def share(cluster: Cluster) -> None:
    """Print which part of the trials the node behind a slow link has, of a fair half."""
    for number, (link, seconds, measured) in enumerate(SHARES):
        places = [see(host, f"gluster-{number}") for host in HOSTS]
        with as_user(), tempfile.TemporaryDirectory(dir=places[0]) as folder:
            engine = Engine(Path(folder))
            step, counts = multiprocessing.Barrier(5, timeout=600), multiprocessing.Array("i", 4)
            context = multiprocessing.get_context("fork")
            arguments = (places, engine, seconds, measured, step, counts)
            processes = [context.Process(target=count, args=(n, *arguments)) for n in range(4)]
            for process in processes:
                process.start()
            step.wait()  # all have run a trial
            set_link(cluster, link)
            step.wait()
            for process in processes:
                process.join()
            set_link(cluster, "whole")
        each = [int(counts[rank]) for rank in range(4)]
        slow, every = each[1] + each[3], sum(each)
        ended = sum(process.exitcode != 0 for process in processes)
        name = {"whole": "as n1"}.get(link, f"{link.split()[0]} ms" + ", 1 % lost" * (" " in link))
        print(
            f"trials of {seconds:2.0f} s, n2 {name:16} {slow:4} of {every:4}: {slow / every:4.0%}"
            f"   workers that ended: {ended}   load {os.getloadavg()[0]:.1f}",
            flush=True,
        )


def set_link(cluster: Cluster, link: str) -> None:
    """Let n2's cable be so; the process is the ordinary user before and after."""
    os.seteuid(0)
    cluster.script("link", "n2", *link.split())
    os.seteuid(USER)


def count(
    rank: int, places: list[Path], engine: Engine, seconds: float, measured: float,
    step: Barrier, counts: Any,
) -> None:  # fmt: skip
    """Run trials, and count those that end in time; those of ranks 1 and 3 are on n2."""
    engine.path = places[rank % 2] / engine.path.parent.name / engine.path.name
    study = engine.study(rank, RandomSampler(seed=rank))
    study.tell(trial := study.ask(), one_trial(trial, 0.0))
    step.wait()
    step.wait()
    end = time.monotonic() + measured
    while time.monotonic() < end:
        study.tell(trial := study.ask(), one_trial(trial, seconds))
        counts[rank] += time.monotonic() < end


def main(file_systems: list[str], rounds: int) -> None:
    """Print the table; the cluster is left as it was, or down."""
    call("unshare", CLONE_NEWNS)  # the mounts end with this process
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", PLACE], check=True)
    call("prctl", PR_SET_SECUREBITS, NO_SETUID_FIXUP, 0, 0, 0)
    cluster = Cluster()
    runs = (STATE / "switch" / "pid").exists()
    cluster.script("up", timeout=1800)
    warm_up(RandomSampler())
    print(f"load {os.getloadavg()[0] / (os.cpu_count() or 1):.1f} per core")
    try:
        if file_systems == ["share"]:
            with cluster.on("gluster"):
                share(cluster)
        else:
            side_by_side(cluster, file_systems, rounds)
    finally:
        if not runs:
            cluster.script("down", timeout=600)


def side_by_side(cluster: Cluster, file_systems: list[str], rounds: int) -> None:
    """Print the table of the storages."""
    print("file system workers  storage         per trial   to ours  requests   (each round)")
    for file_system in file_systems:
        with cluster.on(file_system):
            if file_system != "bind":
                start = ("gluster", "volume", "profile", "gluster", "start")
                options = ["--user", "root", "--cd", "/"]
                cluster.run("storage", *start, options=options, check=False)
            places = [see(host, file_system) for host in HOSTS]
            for workers in (1, 4):
                show(file_system, workers, measure(places, workers, rounds))


if __name__ == "__main__":
    main(sys.argv[1:2] or ["bind", "gluster"], int(sys.argv[2]) if sys.argv[2:] else 7)
