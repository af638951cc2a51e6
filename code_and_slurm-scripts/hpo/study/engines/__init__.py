"""The databases under the storage: an engine is the little in which they differ.

    sqlite_file   one file: a lock for all writers, a version that tells whether anybody wrote,
                  copies, damage
    turn          of SQLite's: who writes next, where some are slower than others
    postgresql    a server: row locks, connections that are lost and made anew
    unanswered    of a server that stands still: its connections are given up
    kept          of both: a backup is not replaced by a study that has lost trials

What the storage says to them is the same SQL, with ? for each value.  Where SQLite's one lock for
all writers makes a difference, PostgreSQL is asked for the row's (`lock`), before what depends on
it is read: a SELECT that counts and locks at once counts what was there before it had to wait.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

from optuna.exceptions import StorageInternalError

SCHEMA = "v3.2.0.a"  # Optuna 5.0's own name for its tables (alembic_version)

# One thread at a time, for all studies of the process. Taken around fork() as well, so that a
# child never inherits a half-done transaction, which it would roll back in the parent's file.
LOCK = threading.RLock()
os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)


class EngineError(StorageInternalError):
    """The database cannot be used; the message says which one, why, and what to do."""


class Version(NamedTuple):
    """Of a database, as one process sees it: if it is the same, nothing has changed."""

    connection: int  # the process's first, second, …; `others` begins anew in each
    writes: int  # of this process
    others: int  # it moves when somebody else has written


class Cursor(Protocol):
    """What a statement has done."""

    @property
    def rowcount(self) -> int:
        """How many rows it has changed."""

    @property
    def lastrowid(self) -> int | None:
        """The id of the row that it has inserted."""

    def fetchone(self) -> Any:
        """Return the next row; None after the last."""

    def __iter__(self) -> Iterator[Any]:
        """Return the rows."""


class Transaction(Protocol):
    """What is done inside `Engine.write`."""

    def execute(self, sql: str, args: Sequence[Any] = ..., /) -> Cursor:
        """Execute one statement."""


class Engine(Protocol):
    """One database and this process's connection to it; safe with threads, fork and pickle."""

    has_leases: bool  # False where stock Optuna's study is looked at by who may not write
    largest_step: int  # of a report

    def read(self, sql: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of one SELECT, which is one consistent picture."""

    def read_changed(
        self, known: Version | None, sql: str, args: Sequence[Any]
    ) -> tuple[Version, list[tuple[Any, ...]] | None]:
        """Return the version, and all rows of one SELECT unless that version is `known`."""

    def write(self) -> AbstractContextManager[Transaction]:
        """Give one transaction: all of it is on the disk at the end, or nothing."""

    def lock(self, db: Transaction, table: str, row_id: int) -> None:
        """Let no other transaction change a row of studies or trials, nor add to that study."""

    def close(self) -> None:
        """Close the connection; the next use opens another."""
