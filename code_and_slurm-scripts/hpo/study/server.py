"""One process owns study.db and serves it, where the file system's locks do not hold between nodes.

    python -m hpo.study.server WORKERS    started by hpo/job/job.sh on the job's first node

check_cluster.py finds such file systems (Lustre mounted with localflock, for one).  There SQLite
would be destroyed by two nodes that write at the same time.  The server listens on the node's own
address, one port per worker, because a storage has one owner and leases tell the workers apart by
it.  It writes the ports to study.db.server beside study.db, where the workers of the job read
them, and removes that file when it ends.  Nothing but the job's own network sees the ports, but
there is no password: it is not for a machine open to the internet.
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from dataclasses import replace
from pathlib import Path

import optuna

from hpo import packages
from hpo.files import whole
from hpo.settings import Settings, UserError, run_script
from hpo.study.optuna_private import make_server
from hpo.study.served import Server, server_path
from hpo.study.storage import SQLiteStorage
from hpo.study.upkeep import Upkeep

THREADS = 4  # per worker: its main thread, its upkeep, and reserve


def serve(settings: Settings, workers: int) -> None:
    """Serve the study of `settings` to so many workers until SIGTERM.

    Raises:
        UserError: grpcio or protobuf is missing.
    """
    packages.need("A served study", "grpcio", "protobuf")
    path = settings.sqlite_path
    assert path
    host, ports = socket.gethostname(), _free_ports(workers)
    storages = [
        SQLiteStorage.of(replace(settings, token=""), path, f"worker {rank}, job {settings.job_id}")
        for rank in range(workers)
    ]
    servers = [
        make_server(storage, host, port, THREADS)
        for storage, port in zip(storages, ports, strict=True)
    ]
    for server in servers:
        server.start()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: ended.set())
    _announce(path, Server(settings.job_id, host, ports))
    study = optuna.load_study(study_name=settings.study_name, storage=storages[0])
    try:
        # For all workers what each does for itself elsewhere: returns and backups.
        with Upkeep(study, settings):
            ended.wait()
    finally:
        server_path(path).unlink()
        for server in servers:
            server.stop(grace=5).wait()


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _announce(database: Path, server: Server) -> None:
    with whole(server_path(database)) as temporary:
        temporary.write_text(json.dumps(server._asdict()))


def main() -> int:
    """Serve the study of the environment; return the exit status."""
    settings = Settings.from_env()
    if settings.sqlite_path is None:
        raise UserError(f"STUDY_DB={settings.study_db!r} has a server of its own")
    serve(settings, int(sys.argv[1]))
    return 0


if __name__ == "__main__":
    run_script(main)
