"""Workers that are killed while they hold a trial: what is left of a study on each storage.

    python tests/benchmarks/storage_kill_table.py [SEED [STORAGE…]]      takes six minutes

The bundle's own worker loop: 8 processes, 100 trials of four epochs, 60 SIGKILLs at workers that
hold a trial, LEASE_GRACE=6; who dies is started again until all have ended.  MAX_ATTEMPTS=99: by
chance a trial is killed more than twice, which is no fault of the storage.  The last three storages
are Optuna's own.  PostgreSQL takes part where Debian's package is installed, and root asks; MySQL
where Debian's mariadb-server is, and PyMySQL.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "code_and_slurm-scripts"
sys.path[:0] = [str(SCRIPTS), str(ROOT / "tests" / "helpers")]

from optuna.exceptions import ExperimentalWarning  # noqa: E402
from optuna.trial import TrialState  # noqa: E402

from hpo.settings import Settings  # noqa: E402
from hpo.study.opening import create_or_open_study, open_study  # noqa: E402
from hpo.study.optuna_private import storage_of  # noqa: E402
from hpo.study.serving.served import find_server  # noqa: E402
from postgresql_server import PostgreSQLServer, wanted  # noqa: E402

warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's gRPC client is
OBJECTIVE = ROOT / "tests" / "benchmarks" / "storage_kill_objective.py"
WORKERS, TRIALS, KILLS = 8, 100, 60
PAUSE = 0.2  # seconds between two kills, on average
LIMIT = 600.0  # seconds for one storage
PROXY = """import sys, optuna
storage = optuna.storages.get_storage(sys.argv[1])
optuna.storages.run_grpc_proxy_server(storage, host="localhost", port=int(sys.argv[2]))"""


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve a file as hpo/job/job.sh does where the nodes cannot share it."""
    url = f"sqlite:///{folder}/study.db"
    storage_of(create_or_open_study(Settings.from_env(STUDY_DB=url))).remove_session()
    os.environ |= {"STUDY_DB": url, "SLURM_JOB_ID": "77"}
    command = [sys.executable, "-m", "hpo.study.serving.server", str(WORKERS), socket.gethostname()]
    keeper = subprocess.Popen(
        ["bash", "hpo/job/keep_serving.sh", f"{folder}/server.out", *command], cwd=SCRIPTS
    )
    while not find_server(folder / "study.db"):
        assert keeper.poll() is None, (folder / "server.out").read_text()
        time.sleep(0.05)
    yield url
    keeper.terminate()
    keeper.wait()
    del os.environ["SLURM_JOB_ID"]


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """Start a server of its own."""
    server = PostgreSQLServer(Path(f"/tmp/pg-{os.getpid()}"))
    yield server.empty("study")
    server.stop()
    shutil.rmtree(server.folder)


@contextmanager
def mysql(folder: Path) -> Iterator[str]:
    """Start a MariaDB of its own, which listens on a socket file."""
    files = (f"--datadir={folder}/data", "--user=root")
    subprocess.run(
        ["mariadb-install-db", "--no-defaults", *files, "--auth-root-authentication-method=normal"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    options = (f"--socket={folder}/socket", "--skip-networking", "--log-error")
    server = subprocess.Popen(["mariadbd", "--no-defaults", *files, *options])
    create = ("mariadb", "--no-defaults", options[0], "-e", "CREATE DATABASE study")
    while subprocess.run(create, stderr=subprocess.DEVNULL).returncode:
        assert server.poll() is None, "mariadbd has ended"
        time.sleep(0.1)
    yield f"mysql+pymysql://root@localhost/study?unix_socket={folder}/socket"
    server.terminate()
    server.wait()


def missing(name: str) -> str:
    """Return why a storage cannot take part here; "" where it can."""
    if name == "postgresql":
        return wanted()
    if name == "mysql" and not (shutil.which("mariadbd") and find_spec("pymysql")):
        return "needs Debian's mariadb-server, and pip install PyMySQL"
    return ""


@contextmanager
def optunas_grpc(folder: Path) -> Iterator[str]:
    """Start Optuna's own proxy, before its own SQLite storage."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", PROXY, f"sqlite:///{folder}/study.db", str(port)]
    proxy = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    time.sleep(3)  # it has ten seconds more until a client gives it up
    yield f"grpc://localhost:{port}"
    proxy.kill()
    proxy.wait()


STORAGES: dict[str, Callable[[Path], AbstractContextManager[str]]] = {
    "sqlite": lambda folder: nullcontext(f"sqlite:///{folder}/study.db"),
    "served": served,
    "postgresql": postgresql,
    "mysql": mysql,
    "journal": lambda folder: nullcontext(f"journal:///{folder}/journal.log"),
    "Optuna's gRPC": optunas_grpc,
}


def start(rank: int, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(OBJECTIVE)], stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, "WORKER_RANK": str(rank)},
        )  # fmt: skip


def storm(folder: Path, seed: int) -> int:
    """Kill, and start again, until all have ended by themselves; return how many were killed."""
    chance, kills, begin = random.Random(seed), 0, time.monotonic()
    workers = [start(rank, folder / f"{rank}.log") for rank in range(WORKERS)]
    next_kill = begin
    while time.monotonic() < begin + LIMIT:
        for rank, worker in enumerate(workers):
            if worker.poll() not in (None, 0):
                workers[rank] = start(rank, folder / f"{rank}.log")
        if all(worker.poll() == 0 for worker in workers):
            return kills
        holders = [r for r in range(WORKERS) if _holds(folder / f"holds-{r}", workers[r])]
        if holders and kills < KILLS and time.monotonic() > next_kill:
            victim = chance.choice(holders)
            workers[victim].send_signal(signal.SIGKILL)
            workers[victim].wait()
            kills += 1
            next_kill = time.monotonic() + chance.uniform(0, 2 * PAUSE)
            (folder / "kills").write_bytes(b"x" * kills)
        time.sleep(0.02)
    for worker in workers:
        worker.kill()
        worker.wait()
    print(f"not all workers have ended within {LIMIT:.0f} s")
    return kills


def _holds(path: Path, worker: subprocess.Popen[bytes]) -> bool:
    return worker.poll() is None and path.exists() and path.read_text() == str(worker.pid)


def row(name: str, seed: int) -> str:
    """Return one row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "kills").touch()
        os.environ["STORM"] = temporary
        with STORAGES[name](folder) as url:
            os.environ["STUDY_DB"] = url
            settings = Settings.from_env(STUDY_DB=url)
            begin = time.monotonic()
            kills = storm(folder, seed)
            seconds = time.monotonic() - begin
            study = open_study(settings)
            states = [trial.state for trial in study.get_trials(deepcopy=False)]
            storage_of(study).remove_session()
            shutil.rmtree(settings.checkpoints.parent, ignore_errors=True)
            if settings.backup_path:
                settings.backup_path.unlink(missing_ok=True)
    ended = sum(state in (TrialState.COMPLETE, TrialState.PRUNED) for state in states)
    found = len(states) - TRIALS, states.count(TrialState.RUNNING), len(states) - ended
    numbers = "".join(f"{number:>16}" for number in (kills, *found, round(seconds)))
    return f"{name:<14}{numbers}"


def main() -> None:
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else 0
    os.environ |= {
        "STUDY_NAME": "storm", "TOTAL_TRIALS": str(TRIALS), "LEASE_GRACE": "6", "PRUNER": "none",
        "MAX_ATTEMPTS": "99",
        "PYTHONPATH": str(SCRIPTS), "PY_SCRIPT": str(OBJECTIVE), "OMP_NUM_THREADS": "1",
        "STORM_SIZE": f"{TRIALS} {KILLS} {WORKERS}",
    }  # fmt: skip
    heads = ("kills", "too many", "stuck RUNNING", "without result", "seconds")
    print(f"{f'seed {seed}':<14}" + "".join(f"{head:>16}" for head in heads), flush=True)
    for name in sys.argv[2:] or STORAGES:
        if why := missing(name):
            print(f"{name}: {why}")
        else:
            print(row(name, seed), flush=True)


if __name__ == "__main__":
    main()
