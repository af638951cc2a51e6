"""A PostgreSQL server of Debian's for tests, which listens on a socket file, and its databases."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian puts them
AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
USER = "postgres"
GRANT = "GRANT USAGE ON SCHEMA public TO public"


class PostgreSQLServer:
    """A server; `start` and `stop` it as often as you like.  Needs root."""

    def __init__(self, folder: Path, options: str = "") -> None:
        self.folder = folder  # its path must be short: that of a socket is
        folder.mkdir(mode=0o755)
        shutil.chown(folder, USER)
        self._run("initdb", "-E", "UTF8", "-D", folder / "data", "-A", "trust", "--no-sync")
        self._options = (
            f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off "
            f"-c max_connections=200 {options}"
        )
        self.start()

    def _run(self, program: str, *words: str | Path) -> None:
        command = [*AS_POSTGRES, PROGRAMS[-1] / program, *words]
        subprocess.run(command, check=True, cwd="/", stdout=subprocess.DEVNULL)

    def _control(self, *words: str | Path) -> None:
        self._run("pg_ctl", "-D", self.folder / "data", "-w", "-l", self.folder / "log", *words)

    def start(self) -> None:
        """Start it; returns when it takes connections."""
        self._control("-o", self._options, "start")

    def stop(self, mode: str = "immediate") -> None:
        """Stop it as a crash would, or "fast"."""
        self._control("-m", mode, "stop")

    def signal(self, number: int) -> None:
        """Send a signal to all of its processes: SIGSTOP, then SIGCONT."""
        first = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        os.kill(first, number)  # it starts no others then
        for pid in Path(f"/proc/{first}/task/{first}/children").read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), number)

    def url(self, name: str, user: str = USER) -> str:
        """Return the URL of a database."""
        return f"postgresql://{user}@/{name}?host={self.folder}"

    def sql(self, name: str, statement: str, args: Sequence[Any] = ()) -> list[Any]:
        """Execute one statement in a database; return its rows."""
        return ask(self.url(name), statement, args)

    def empty(self, name: str) -> str:
        """Give a database that is empty, whoever has used it; return its URL."""
        if not self.sql("postgres", "SELECT 1 FROM pg_database WHERE datname = %s", [name]):
            self.sql("postgres", f"CREATE DATABASE {name}")  # takes as long as 100 tests
        self._end_sessions(name)
        for statement in ("DROP SCHEMA public CASCADE", "CREATE SCHEMA public", GRANT):
            self.sql(name, statement)
        return self.url(name)

    def with_study(self, name: str) -> str:
        """Give the database, emptied before, of which only a new study is left; return its URL."""
        self._end_sessions(name)
        self.sql(name, "TRUNCATE studies RESTART IDENTITY CASCADE")
        self.sql(name, "INSERT INTO studies (study_name) VALUES ('study')")
        self.sql(name, "INSERT INTO study_directions (study_id, objective, direction) "
                       "VALUES (1, 0, 'MINIMIZE')")  # fmt: skip
        return self.url(name)

    def _end_sessions(self, name: str) -> None:
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s"
        self.sql("postgres", end, [name])


def ask(url: str, statement: str, args: Sequence[Any] = ()) -> list[Any]:
    """Execute one statement; return its rows."""
    with psycopg.connect(url, autocommit=True) as db:
        cursor = db.execute(statement, args or None)  # type: ignore[arg-type, unused-ignore]
        return cursor.fetchall() if cursor.description else []


def wanted() -> str:
    """Return why there can be no server here; "" where one can be started."""
    if PROGRAMS and not os.geteuid():
        return ""
    assert "CI" not in os.environ, "CI must have PostgreSQL, and be root"
    return "needs Debian's package postgresql, and root to start it as its own user"
