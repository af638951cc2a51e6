"""STUDY_DB=postgresql:job: the study in a PostgreSQL that runs inside the job, on its first node.

    python -m hpo.study.serving.own_server begin FOLDER NODE…      hpo/job/own_server.sh, which
    python -m hpo.study.serving.own_server fill FOLDER             starts the server in between, and
    python -m hpo.study.serving.own_server end                     ends it

begin   makes the password, in FOLDER, and prints the address and the port to listen at
fill    waits for the server, and puts the study's last copy into it; then postgresql-job.server,
        beside the scripts and for its owner alone, says where it is and with which password
end     copies the study once more (the workers do so every minute), and takes that file away
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hpo.settings import Settings, UserError, run_script
from hpo.study.copying import backup, restore
from hpo.study.engines.postgresql import PostgreSQL, ServerAway
from hpo.study.leases import has_ended
from hpo.study.opening import clear_errors, open_storage
from hpo.study.optuna_private import study_id
from hpo.study.serving.served import Server, announce, database_of, find_server, server_path
from hpo.study.serving.server import new_secret, own_address
from hpo.study.storage import StudyStorage
from hpo.values import OWN_SERVER

START_SECONDS = 60.0  # until a server that does not answer is given up


def begin(settings: Settings, folder: Path, nodes: Sequence[str]) -> int:
    """Prepare a server; return the exit status.  Raises UserError where one runs already."""
    _forget_dead(settings)
    address = own_address(nodes)
    with socket.create_server((address.strip("[]"), 0)) as free:
        port = free.getsockname()[1]
    server = Server(settings.job_id, socket.gethostname(), address, [port], new_secret())
    for name, text in (("password", server.secret), ("server", json.dumps(server._asdict()))):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
    print(address.strip("[]"), port)
    return 0


def _forget_dead(settings: Settings) -> None:
    database = database_of(settings)
    if not (before := find_server(database)):
        return
    ended = has_ended(before.job_id, settings.job_id, settings.alive_jobs)
    mine = before.is_of(settings) and before.host == socket.gethostname()
    if not ended and not (mine and not _listens(before)):
        raise UserError(
            f"{before} has this study: wait until it has ended (if it has, delete "
            f"{server_path(database)})"
        )
    server_path(database).unlink(missing_ok=True)


def _listens(server: Server) -> bool:
    with suppress(OSError):
        socket.create_connection((server.address.strip("[]"), server.ports[0]), 5).close()
        return True
    return False


def fill(settings: Settings, folder: Path) -> int:
    """Wait for the server, fill it, and say where it is; return the exit status."""
    server = Server(**json.loads((folder / "server").read_text()))
    with clear_errors(settings):
        engine = _patiently(server)
        trials = restore(settings, engine)
        engine.close()
    if not announce(database_of(settings), server):
        raise UserError(f"{find_server(database_of(settings))} has this study by now")
    print(f"PostgreSQL runs on {server.host} for this job; {trials} trials from the last copy")
    return 0


def _patiently(server: Server) -> PostgreSQL:
    begin = time.monotonic()
    while True:
        try:
            return PostgreSQL(server.postgresql_url)
        except ServerAway:
            if time.monotonic() - begin > START_SECONDS:
                raise
        time.sleep(0.2)


def end(settings: Settings) -> int:
    """Copy the study a last time, and let nobody look for the server; return the exit status."""
    database = database_of(settings)
    try:
        with clear_errors(settings):
            storage = open_storage(settings)
            assert isinstance(storage, StudyStorage)
            for study in storage.get_all_studies():
                if study.study_name == settings.study_name and settings.backup_path:
                    backup(storage, study_id(study), settings.backup_path, 0.0)
    finally:
        server_path(database).unlink(missing_ok=True)
    return 0


def main() -> int:
    """Do what the command line says; return the exit status."""
    settings = Settings.from_env()
    if settings.shown_db != OWN_SERVER:
        raise UserError(f"STUDY_DB={settings.shown_db!r} is not {OWN_SERVER}")
    what, *words = sys.argv[1:]
    if what == "begin":
        return begin(settings, Path(words[0]), words[1:])
    return fill(settings, Path(words[0])) if what == "fill" else end(settings)


if __name__ == "__main__":
    run_script(main)
