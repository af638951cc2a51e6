"""One process owns study.db and serves it, where the file system's locks do not hold between nodes.

    python -m hpo.served_storage TASKS    started by hpo/job.sh on the job's first node

check_cluster.py finds such file systems (Lustre mounted with localflock, for one).  There SQLite
would be destroyed by two nodes that write at the same time.  The server listens on the node's own
address, one port per worker, because a storage has one owner and leases tell the workers apart by
it.  It writes the ports to study.db.server beside study.db, where the workers of the job read
them, and removes that file when it ends.  Nothing but the job's own network sees the ports, but
there is no password: it is not for a machine open to the internet.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import GrpcStorageProxy
from optuna.trial import FrozenTrial

from hpo.settings import Settings, UserError, run_script
from hpo.sqlite_storage import NoTrialLeft, SQLiteStorage

NO_TRIAL_LEFT = "no trial left"  # how NoTrialLeft travels: gRPC knows Optuna's errors only
THREADS = 4  # per worker: its main thread, its upkeep, and reserve


class Server(NamedTuple):
    """Who serves a study: the content of study.db.server."""

    job_id: str
    host: str
    ports: list[int]  # by the rank of the worker


def server_path(database: Path) -> Path:
    """Return the name of the file that says that a study is being served."""
    return database.with_name(f"{database.name}.server")


def find_server(database: Path) -> Server | None:
    """Return who serves the study in `database`; None where everybody opens the file itself."""
    try:
        return Server(**json.loads(server_path(database).read_text()))
    except FileNotFoundError:
        return None


def forget_dead_server(settings: Settings) -> None:
    """Remove study.db.server if the job that wrote it has left Slurm's queue."""
    server = find_server(settings.sqlite_path) if settings.sqlite_path else None
    if not server or not settings.sqlite_path or settings.alive_jobs is None:
        return
    number = server.job_id.split(".")[0]
    requeued = number == settings.job_id.split(".")[0] and server.job_id != settings.job_id
    if requeued or number not in settings.alive_jobs:
        server_path(settings.sqlite_path).unlink(missing_ok=True)


class ServedStorage(GrpcStorageProxy):
    """A worker's view of a study that another process owns."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial.  Raises NoTrialLeft instead of going over TOTAL_TRIALS."""
        try:
            return super().create_new_trial(study_id, template_trial)
        except KeyError as error:
            if NO_TRIAL_LEFT in str(error.__cause__):
                raise NoTrialLeft("The study has all of its trials.") from error
            raise

    def renew_lease(self, trial_id: int) -> None:
        """Say that the trial is alive: every write of its holder renews the lease."""
        self.set_trial_system_attr(trial_id, "alive", os.getpid())

    def count_leases(self, study_id: int) -> int:
        """Return how many trials of the study are running."""
        running = (optuna.trial.TrialState.RUNNING,)
        return len(self.get_all_trials(study_id, deepcopy=False, states=running))


class _ServersStorage(SQLiteStorage):
    """The storage behind one worker's port."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        try:
            return super().create_new_trial(study_id, template_trial)
        except NoTrialLeft as error:
            raise KeyError(NO_TRIAL_LEFT) from error


def serve(settings: Settings, tasks: int) -> None:
    """Serve the study of `settings` to `tasks` workers until SIGTERM."""
    from concurrent.futures import ThreadPoolExecutor

    try:
        from optuna.storages._grpc.server import make_server

        ports = _free_ports(tasks)
        storages = [_storage(settings, rank) for rank in range(tasks)]
        host = socket.gethostname()
        servers = [
            make_server(storage, host, port, ThreadPoolExecutor(THREADS))
            for storage, port in zip(storages, ports, strict=True)
        ]
    except ImportError as error:
        raise UserError(f"grpcio and protobuf are missing ({error})") from error
    for server in servers:
        server.start()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: ended.set())
    assert settings.sqlite_path
    _announce(settings.sqlite_path, Server(settings.job_id, host, ports))
    try:
        _look_after(storages[0], settings, ended)
    finally:
        server_path(settings.sqlite_path).unlink()
        for server in servers:
            server.stop(grace=5).wait()


def _look_after(storage: SQLiteStorage, settings: Settings, ended: threading.Event) -> None:
    """Do for all workers what each does for itself elsewhere: returns and backups."""
    from hpo.upkeep import Upkeep

    study = optuna.load_study(study_name=settings.study_name, storage=storage)
    with Upkeep(study, settings):
        ended.wait()


def _storage(settings: Settings, rank: int) -> SQLiteStorage:
    assert settings.sqlite_path
    return _ServersStorage(
        settings.sqlite_path,
        owner=f"worker {rank}",
        label=f"worker {rank}",
        job_id=settings.job_id,
        total_trials=settings.total_trials,
        grace=settings.lease_grace,
    )


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _announce(database: Path, server: Server) -> None:
    content: dict[str, Any] = server._asdict()
    handle, temporary = tempfile.mkstemp(dir=database.parent, prefix=f".{database.name}.server-")
    with os.fdopen(handle, "w") as file:
        json.dump(content, file)
    os.replace(temporary, server_path(database))


def main() -> int:
    """Serve the study of the environment; return the exit status."""
    settings = Settings.from_env()
    if settings.sqlite_path is None:
        raise UserError(f"STUDY_DB={settings.study_db!r} has a server of its own")
    serve(settings, int(sys.argv[1]))
    return 0


if __name__ == "__main__":
    run_script(main)
