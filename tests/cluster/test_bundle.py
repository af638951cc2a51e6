"""The bundle on the rehearsal cluster: README.txt's commands, the sbatch script unmodified.

Each scenario runs in a fresh copy of the last commit (`git archive HEAD`) under /work, as the
ordinary user, and adds a row to the table at the end of the run.
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.rehearsal import STATE, Cluster, Scenario
from common import BUNDLE

SCRIPT = "run-optuna-multinode_Turpan.sh"
README = (BUNDLE / "README.txt").read_text()
FINISHED = ("COMPLETE", "PRUNED", "FAIL")
QUICK = {"TOTAL_TRIALS": "12", "TRAIN_IMAGES": "1000"}


def readme_command(start: str) -> str:
    """Return the command of README.txt that begins with `start`."""
    found = re.search(rf"^ +({re.escape(start)}.*)$", README, re.MULTILINE)
    assert found, f"README.txt has no command that begins with: {start}"
    return found[1]


@dataclass
class Bundle:
    """A copy of the bundle on the cluster, and what its study and logs say."""

    cluster: Cluster
    folder: str
    record: Callable[[Scenario], None]

    @property
    def scripts(self) -> str:
        """The folder that jobs are submitted from."""
        return f"{self.folder}/code_and_slurm-scripts"

    def submit(self, *options: str, **variables: str) -> int:
        """Submit the script; the environment and options of sbatch are all that differs."""
        return self.cluster.sbatch(*options, SCRIPT, folder=self.scripts, **{**QUICK, **variables})

    def log(self, job: int, worker: int | None = None) -> str:
        """Return the log of a job, or of one of its workers."""
        name = f"{job}.out" if worker is None else f"{job}.{worker}.out"
        return self.cluster.read(f"{self.folder}/logs/{name}")

    def finish(self, job: int, timeout: float = 300) -> None:
        """Wait for a job that must succeed."""
        state = self.cluster.wait_end(job, timeout)
        assert state == "COMPLETED", f"job {job}: {state}\n{self.log(job)}"

    def trials(self) -> list[tuple[int, str]]:
        """Return number and state of every trial of the one study."""
        path = self.cluster.shared / self.scripts.lstrip("/") / "study.db"
        if not path.exists():
            return []
        with sqlite3.connect(path, timeout=30) as database:
            rows = database.execute("SELECT number, state FROM trials ORDER BY number")
            return [(number, state) for number, state in rows]

    def workers(self, job: int) -> dict[int, str]:
        """Return each worker that wrote a log, with the host that it ran on."""
        files = (self.cluster.shared / self.folder.lstrip("/") / "logs").glob(f"{job}.*.out")
        numbers = sorted(int(path.name.split(".")[1]) for path in files)
        found = {}
        for number in numbers:
            lines = re.findall(rf"worker {number} on (\w+): trial", self.log(job, number))
            found[number] = lines[-1] if lines else "?"
        return found

    def done(self, name: str, job: int, seconds: float, total: int = 12) -> None:
        """Check that the study is whole, and add the scenario to the table."""
        trials = self.trials()
        states = Counter(state for _, state in trials)
        workers = self.workers(job)
        hosts = ",".join(sorted(set(workers.values())))
        text = ", ".join(f"{states[state]} {state.lower()}" for state in FINISHED)
        self.record(Scenario(name, len(workers), hosts, text, seconds))
        assert [number for number, _ in trials] == list(range(total))
        assert set(states) <= {"COMPLETE", "PRUNED"}, states


@pytest.fixture(scope="session")
def with_optuna(cluster: Cluster) -> Cluster:
    """Install Optuna with README.txt's two commands: a shell in the container, and pip in it."""
    shell = readme_command("apptainer shell").split()
    pip = readme_command("pip install --user optuna")
    done = cluster.run("login", *shell, options=["--online"], stdin=f"{pip}\n", timeout=300)
    assert "Successfully installed" in done.stdout
    return cluster


@pytest.fixture
def bundle(
    with_optuna: Cluster, request: pytest.FixtureRequest, record: Callable[[Scenario], None]
) -> Iterator[Bundle]:
    """Copy the bundle to /work/groupe/chercheur; end what is left of its jobs afterwards."""
    cluster = with_optuna
    folder = f"{cluster.work}/{request.node.name}"
    place = cluster.shared / folder.lstrip("/")
    place.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(BUNDLE), "archive", "HEAD"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    subprocess.run(["chown", "-R", "1000:1000", str(place)], check=True)
    yield Bundle(cluster, folder, record)
    cluster.run("login", "scancel", "--user", cluster.user)
    cluster.wait(
        lambda: "" if cluster.run("login", "squeue", "--noheader").stdout else "empty",
        60,
        "an empty queue",
    )
    shutil.rmtree(place)


def files(cluster: Cluster) -> set[Path]:
    """Return every file on the cluster, but for Slurm's own."""
    roots = [cluster.shared, *STATE.glob("*/upper")]
    slurm = re.compile(r"/upper/(var/(log|spool)|run|etc)/")
    found = (path for root in roots for path in root.rglob("*"))
    return {path for path in found if not slurm.search(str(path)) and not path.is_dir()}


def test_guide(bundle: Bundle) -> None:
    """2 nodes × 2 GPUs: four workers, one study, logs where README says, the best model."""
    before = files(bundle.cluster)
    start = time.monotonic()
    job = bundle.submit()
    bundle.finish(job)
    seconds = time.monotonic() - start
    bundle.done("the guide: 2 nodes × 2 GPUs", job, seconds)
    workers = bundle.workers(job)
    assert list(workers) == [0, 1, 2, 3]
    assert Counter(workers.values()) == {"n1": 2, "n2": 2}
    assert "best_value" in bundle.log(job)

    best = readme_command("apptainer exec --bind /tmpdir,/work --nv").split()
    shown = bundle.cluster.run("login", *best, options=["--cd", bundle.scripts]).stdout
    assert re.search(r"^12 of 12 trials", shown, re.MULTILINE), shown
    assert re.search(r"^best_value +\d\.\d+", shown, re.MULTILINE), shown
    assert re.search(r"^test accuracy +0\.\d+", shown, re.MULTILINE), shown

    allowed = tuple(
        str(bundle.cluster.shared / folder.lstrip("/"))
        for folder in (bundle.folder, bundle.cluster.home)
    )
    new = [str(path) for path in files(bundle.cluster) - before]
    assert [path for path in new if not path.startswith(allowed)] == []
