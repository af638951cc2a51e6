"""The rehearsal cluster as a fixture, and the table of scenarios at the end of the run.

    pytest tests/cluster               as root; the first time builds the cluster (about 3 minutes)
    CLUSTER_KEEP=1 pytest …            leaves it running; then: bash tests/cluster/cluster.sh exec …
    FILE_SYSTEM=gluster pytest …       on GlusterFS; gluster-stale: with its default caches

Where no cluster can run (not root, a kernel without overlay or fuse) the tests are skipped with
the reason; with CI set they fail, so that a green run there means that they ran.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.rehearsal import CANNOT_RUN_HERE, STATE, Cluster, Outcome, Scenario

# They take long.
collect_ignore = [] if "FILE_SYSTEM" in os.environ else ["test_faults.py", "test_own_postgresql.py"]
DAEMONS = {"slurmd", "slurmctld", "munged", "bindfs", "glusterd", "glusterfsd", "glusterfs"}


def traces() -> list[str]:
    """Return what a cluster would leave on the machine: mounts, network devices, processes."""
    mounts = [line for line in Path("/proc/mounts").read_text().splitlines() if str(STATE) in line]
    devices = [path.name for path in Path("/sys/class/net").iterdir()]
    processes = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            processes.append(path.read_text().strip())
        except OSError:  # it has just ended
            continue
    daemons = [name for name in processes if name in DAEMONS]
    return sorted(mounts + devices + daemons)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Yield a fresh cluster; afterwards nothing of it may be left on the machine."""
    cluster = Cluster()
    if os.geteuid() == 0:
        cluster.script("down", timeout=600)
    before = traces()
    started = cluster.script("up", check=False, timeout=1800)
    print(started.stdout, started.stderr, sep="")
    if started.returncode == CANNOT_RUN_HERE and "CI" not in os.environ:
        pytest.skip(started.stderr.strip())
    assert started.returncode == 0, started.stdout + started.stderr
    cluster.script("file-system", os.environ.get("FILE_SYSTEM", "bind"), timeout=600)
    yield cluster
    if "CLUSTER_KEEP" not in os.environ:
        cluster.script("down", timeout=600)
        assert traces() == before


rows = pytest.StashKey[list[Scenario]]()
outcomes = pytest.StashKey[list[Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the tables that scenarios and faults write to."""
    config.stash[rows] = []
    config.stash[outcomes] = []


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Return the function that adds a row to the table."""
    return request.config.stash[rows].append


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[Outcome], None]:
    """Return the function that adds a row to the fault matrix."""
    return request.config.stash[outcomes].append


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print the table of scenarios, and the fault matrix."""
    if config.stash.get(outcomes, []):
        show_outcomes(terminalreporter, config.stash[outcomes])
    if not config.stash.get(rows, []):
        return
    terminalreporter.section("scenarios on the rehearsal cluster")
    layout = "{:<44} {:>7}  {:<10} {:<40} {:>7}"
    terminalreporter.write_line(layout.format("scenario", "workers", "hosts", "trials", "seconds"))
    for row in config.stash[rows]:
        seconds = f"{row.seconds:.1f}"
        terminalreporter.write_line(
            layout.format(row.name, row.workers, row.hosts, row.trials, seconds)
        )


def show_outcomes(terminalreporter: pytest.TerminalReporter, found: list[Outcome]) -> None:
    """Print the fault matrix."""
    terminalreporter.section("fault matrix")
    layout = "{:<28} {:<13} {:>11} {:>12} {:>9}  {}"
    head = ("fault", "file system", "begun again", "resubmitted", "going on", "what is said")
    terminalreporter.write_line(layout.format(*head))
    for row in found:
        seconds = f"{row.seconds:.0f} s"
        line = layout.format(row.fault, row.file_system, row.again, row.resubmitted, seconds, "")
        terminalreporter.write_line(line + row.told)
