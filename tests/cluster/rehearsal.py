"""The rehearsal cluster from Python: `cluster.sh`, and Slurm's commands as the ordinary user."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
STATE = Path(os.environ.get("CLUSTER_STATE", "/var/lib/optuna-turpan-cluster"))
CANNOT_RUN_HERE = 3  # exit status of cluster.sh
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Scenario:
    """One row of the table."""

    name: str
    workers: int
    hosts: str
    trials: str
    seconds: float


class Outcome(NamedTuple):
    """One row of the fault matrix."""

    fault: str
    file_system: str
    again: int  # trials that were begun again
    resubmitted: str
    seconds: float  # until an epoch was trained of what was hit
    told: str


class Cluster:
    """`cluster.sh` and, on its login node, Slurm's commands as the ordinary user."""

    image = "/work/conteneurs/sessions-interactives/pytorch-24.02-py3-calmip-si.sif"
    user = "chercheur"
    home = "/users/groupe/chercheur"
    work = "/work/groupe/chercheur"

    @property
    def file_system(self) -> str:
        """What lies under /work/groupe and /tmpdir: bind, gluster or gluster-stale."""
        file = STATE / "file-system"
        return file.read_text().strip() if file.exists() else "bind"

    @property
    def shared(self) -> Path:
        """Where the machine sees /work, /tmpdir and /users: as the login node does."""
        if self.file_system == "bind":
            return STATE / "shared"
        pid = (STATE / "controller" / "pid").read_text().split()[0]
        return Path("/proc", pid, "root")

    def script(
        self, *arguments: str, check: bool = True, stdin: str = "", timeout: float = 600
    ) -> subprocess.CompletedProcess[str]:
        """Run `cluster.sh ARGUMENTS`."""
        command = ["bash", str(HERE / "cluster.sh"), *arguments]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=timeout, check=False
        )
        if check and done.returncode:
            raise AssertionError(
                f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done

    def run(
        self,
        host: str,
        *command: str,
        options: Sequence[str] = (),
        check: bool = True,
        stdin: str = "",
        timeout: float = 600,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; `options` are those of `cluster.sh exec`."""
        arguments = ("exec", host, *options, "--", *command)
        return self.script(*arguments, check=check, stdin=stdin, timeout=timeout)

    def python(self, host: str, code: str) -> str:
        """Run Python code in the image on a host and return what it prints."""
        apptainer = ("apptainer", "--silent", "exec", "--nv", "--bind", "/tmpdir,/work")
        return self.run(host, *apptainer, self.image, "python", "-", stdin=code).stdout

    def sbatch(self, *arguments: str, folder: str = "", stdin: str = "", **variables: str) -> int:
        """Submit a job from a folder and return its number."""
        environment = [f"{name}={value}" for name, value in variables.items()]
        options = ("--cd", folder or self.work)
        command = ("env", *environment, "sbatch", "--parsable", *arguments)
        return int(self.run("login", *command, options=options, stdin=stdin).stdout)

    def job(self, number: int) -> dict[str, str]:
        """Return what Slurm says about a job, as JobState, NodeList, Restarts, …"""
        text = self.run("login", "scontrol", "--oneliner", "show", "job", str(number)).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait_state(self, number: int, states: set[str], timeout: float) -> str:
        """Wait until a job is in one of `states`."""
        return self.wait(
            lambda: found if (found := self.job(number)["JobState"]) in states else "",
            timeout,
            f"job {number} to be {' or '.join(sorted(states))}",
        )

    def wait_end(self, number: int, timeout: float) -> str:
        """Wait until a job is no longer in the queue, and return its last state."""
        return self.wait_state(number, ENDED, timeout)

    def wait(self, condition: Callable[[], str], timeout: float, what: str) -> str:
        """Wait until `condition` returns something, and return that."""
        end = time.monotonic() + timeout
        while not (found := condition()):
            if time.monotonic() > end:
                queue = self.run("login", "squeue").stdout
                raise AssertionError(f"waited {timeout:.0f} s for {what}\n{queue}")
            time.sleep(0.5)
        return found

    def read(self, path: str) -> str:
        """Return the text of a file below /work, /tmpdir or /users; "" if there is none."""
        file = self.shared / path.lstrip("/")
        return file.read_text() if file.exists() else ""

    @contextmanager
    def on(self, file_system: str) -> Iterator[None]:
        """The hosts share a file system of another kind, within this context."""
        was = self.file_system
        self.script("file-system", file_system, timeout=600)
        try:
            yield
        finally:
            self.script("file-system", was, timeout=600)

    @contextmanager
    def broken_locks(self) -> Iterator[None]:
        """POSIX locks hold on one host only, within this context."""
        self.script("broken-locks", "on")
        try:
            yield
        finally:
            self.script("broken-locks", "off")
