"""A PostgreSQL server of Debian's for tests, which listens on a socket file, and its databases."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psycopg

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian puts them
AS_POSTGRES = ("setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups")
USER = "postgres"


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
        self._names = 0
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

    def url(self, name: str, user: str = USER) -> str:
        """Return the URL of a database."""
        return f"postgresql://{user}@/{name}?host={self.folder}"

    def sql(self, name: str, statement: str, args: Sequence[Any] = ()) -> list[Any]:
        """Execute one statement in a database; return its rows."""
        return ask(self.url(name), statement, args)

    def create(self, template: str = "template1") -> str:
        """Create a database and return its name."""
        self._names += 1
        name = f"study{self._names}"
        self.sql("postgres", f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def drop(self, name: str) -> None:
        """Drop a database, whoever uses it."""
        self.sql("postgres", f"DROP DATABASE {name} WITH (FORCE)")


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
