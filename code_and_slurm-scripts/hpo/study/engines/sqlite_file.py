"""The study's file: one SQLite connection, short transactions, backups, and clear errors.

Everything here is about the file; what is in it is held.py's and studies.py's business. The
rules, and the failure that each of them prevents:

* Rollback journal, never WAL: WAL needs memory shared by all hosts, which no file system gives.
  It stays as study.db-journal, its header empty (PERSIST): to create and delete it for each
  commit costs two more rounds with the disk, or with a file server.
* synchronous=FULL: a trial that was reported as finished survives a power cut.
* BEGIN IMMEDIATE: who reads and then writes cannot meet "database is locked" half-way.
* Our own retry: SQLite's sleeps up to 100 ms at a time; its bad name for parallel work is that.
* A turn (turn.py): who is behind a slow link would lose every race for the lock.
* Never open() this file in a process that uses it: closing any descriptor of a file drops all
  of the process's POSIX locks on it.
"""

from __future__ import annotations

import os
import random
import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from optuna.storages import RDBStorage
from optuna.study import StudyDirection

from hpo.files import sync
from hpo.study.engines import LOCK, SCHEMA, Transaction, Version
from hpo.study.engines.kept import has_all, mark, refuse_loss
from hpo.study.engines.sqlite_errors import CorruptStudy, StudyBusy, StudyFileError, explain
from hpo.study.engines.turn import Turn

T = TypeVar("T")

# Ours, beside Optuna's tables; Optuna ignores it. `owner` is NULL while the trial waits in the
# queue; the row goes when the trial is finished. The trigger is for a study that stock Optuna
# deletes: SQLite gives its trial ids to the next study.
LEASES = (
    """CREATE TABLE IF NOT EXISTS leases (
    trial_id INTEGER PRIMARY KEY, owner TEXT, job_id TEXT NOT NULL, host TEXT NOT NULL,
    counter INTEGER NOT NULL, attempts INTEGER NOT NULL)""",
    """CREATE TRIGGER IF NOT EXISTS lease_of_deleted_trial AFTER DELETE ON trials
    BEGIN DELETE FROM leases WHERE trial_id = OLD.trial_id; END""",
)


_inherited: list[sqlite3.Connection] = []  # a parent's connections: kept, because closing acts


def create_study_file(
    path: str, study_name: str | None = None, directions: Sequence[str] = ("minimize",)
) -> bool:
    """Make the file with Optuna's own tables, and its first study if a name is given.

    Safe when several processes do it at once, even where file locks do not work: the whole file
    is built under another name, and a hard link gives it its own, which only one process can do.
    Returns whether this call made the file. Raises DiskFull, StudyFileError, or OSError where
    the folder is missing.
    """
    with (
        closing(new_database(study_name, directions)) as memory,
        whole_copy(memory, path) as copy,
    ):
        try:
            os.link(copy, path)
        except FileExistsError:
            return False
    return True


def new_database(
    study_name: str | None = None, directions: Sequence[str] = ("minimize",)
) -> sqlite3.Connection:
    """Return a database in memory with all tables, and its first study if a name is given."""
    memory = sqlite3.connect(":memory:")
    stock = RDBStorage("sqlite://", engine_kwargs={"creator": lambda: memory})
    if study_name is not None:
        stock.create_new_study([StudyDirection[d.upper()] for d in directions], study_name)
    stock.remove_session()
    stock.engine.dispose(close=False)  # the connection stays
    for statement in LEASES:
        memory.execute(statement)
    memory.commit()
    return memory


@contextmanager
def whole_copy(source: sqlite3.Connection, target: str) -> Iterator[str]:
    """Give the path of a copy of `source` beside `target`, on the disk; removed at the end."""
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.new")
    try:
        # SQLite would never let the group write, whatever the umask says; nor into the journal.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        with closing(sqlite3.connect(temporary)) as copy:
            copy.execute("PRAGMA journal_mode = OFF")  # nobody else sees this file yet
            source.backup(copy, sleep=0.005)
            if copy.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("database disk image is malformed")
        sync(temporary)
        yield temporary
        sync(folder)
    except sqlite3.Error as error:
        raise explain(error, target) from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def is_young(path: str | os.PathLike[str], max_age: float) -> bool:
    """Return whether there is a file that was written less than `max_age` seconds ago."""
    try:
        # A time in the future was set by a host with another clock: it says nothing.
        return 0 <= time.time() - os.stat(path).st_mtime < max_age
    except FileNotFoundError:
        return False


class StudyFile:
    """One SQLite file and this process's connection to it; created if it does not exist.

    `timeout` is in seconds: how long to wait for the lock. With `readonly` nothing is ever
    written: for who may not. Safe with threads, fork and pickle.
    Raises CorruptStudy, StudyBusy, DiskFull or StudyFileError, all of them StudyFileError.
    """

    largest_step = 2**63 - 1

    def __init__(
        self, path: str | os.PathLike[str], timeout: float = 60.0, readonly: bool = False
    ) -> None:
        self.path = os.path.abspath(path)
        self.timeout, self.readonly = timeout, readonly
        self.has_leases = True
        self._connection: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._connections = self._writes = 0
        self._turn = Turn(self.path)
        if not os.path.exists(self.path):
            create_study_file(self.path)
        self._check()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_turn": Turn(self.path)}

    def _check(self) -> None:
        if os.path.getsize(self.path) == 0:
            raise CorruptStudy(f"{self.path} is empty. It was left as it is: delete it to start.")
        if (health := self.read("PRAGMA quick_check(1)")[0][0]) != "ok":
            raise CorruptStudy(f"{self.path} is damaged ({health}). It was left as it is.")
        tables = {name for (name,) in self.read("SELECT name FROM sqlite_master")}
        if not {"trials", "alembic_version"} <= tables:
            raise CorruptStudy(f"{self.path} is no Optuna study. It was left as it is.")
        if (version := self.read("SELECT version_num FROM alembic_version")) != [(SCHEMA,)]:
            raise StudyFileError(f"{self.path} is of another Optuna ({version}): not {SCHEMA}.")
        if {"leases", "lease_of_deleted_trial"} <= tables:
            return
        self.has_leases = not self.readonly
        if not self.readonly:  # a study that stock Optuna made
            with self.write() as db:
                for statement in LEASES:
                    db.execute(statement)

    def connection(self) -> sqlite3.Connection:
        """Return this process's connection; after a fork, a new one."""
        if self._connection is not None and self._pid != os.getpid():
            _inherited.append(self._connection)
            self._connection = None
        if self._connection is None:
            self._pid = os.getpid()
            self._connections += 1
            self._connection = sqlite3.connect(
                # Never create a second, empty file.
                f"{Path(self.path).as_uri()}?mode={'ro' if self.readonly else 'rw'}",
                uri=True, timeout=0, isolation_level=None, check_same_thread=False,
            )  # fmt: skip
            settings = ("journal_mode = PERSIST", "synchronous = FULL", "temp_store = MEMORY")
            for setting in settings[2:] if self.readonly else settings:
                self._patiently(self._connection.execute, f"PRAGMA {setting}").fetchall()
        return self._connection

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with LOCK:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
                self._connection = None
            self._turn.close()

    def _patiently(self, step: Callable[..., T], *args: Any) -> T:
        """Call `step` until the lock is free. Raises StudyBusy after `timeout` idle seconds."""
        start = since = time.monotonic()
        seen = 0  # the last write: who loses every race, behind a slow link, waits on
        while True:
            try:
                return step(*args)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                now = time.monotonic()
                if not seen or now - since > self.timeout:
                    before, seen, since = seen, os.stat(self.path).st_mtime_ns, now
                    if seen == before:
                        raise StudyBusy(
                            f"{self.path} stayed locked for {self.timeout:.0f} s, and nobody wrote."
                            " Is a worker stopped half-way, or has this file system no locks (see "
                            "check_cluster.py)?"
                        ) from error
            # At first below a millisecond; later up to 20 ms, to spare a network file system.
            time.sleep(random.uniform(0.0002, min(0.001 + (now - start) / 50, 0.02)))

    def read(self, sql: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of one SELECT, which is one consistent picture."""
        with LOCK:
            try:
                db = self.connection()
                return self._patiently(lambda: db.execute(sql, args).fetchall())
            except sqlite3.Error as error:
                raise explain(error, self.path) from error

    def read_changed(
        self, known: Version | None, sql: str, args: Sequence[Any]
    ) -> tuple[Version, list[tuple[Any, ...]] | None]:
        """Return the file's version, and all rows of one SELECT unless that version is `known`."""
        with LOCK:
            try:
                return self._patiently(self._read_changed, self.connection(), known, sql, args)
            except sqlite3.Error as error:
                raise explain(error, self.path) from error

    def _read_changed(
        self, db: sqlite3.Connection, known: Version | None, sql: str, args: Sequence[Any]
    ) -> tuple[Version, list[tuple[Any, ...]] | None]:
        db.execute("BEGIN")  # one shared lock for both: the rows are those of this version
        try:
            (others,) = db.execute("PRAGMA data_version").fetchone()
            version = Version(self._connections, self._writes, others)
            return version, None if version == known else db.execute(sql, args).fetchall()
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")  # nothing was written

    def lock(self, db: Transaction, table: str, row_id: int) -> None:
        """Do nothing: BEGIN IMMEDIATE has locked the file."""

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """Give the connection inside one transaction: all of it is on the disk, or nothing."""
        with LOCK:
            db = None
            try:
                db = self.connection()
                with self._turn:
                    self._patiently(db.execute, "BEGIN IMMEDIATE")
                self._writes += 1
                yield db
                self._patiently(db.execute, "COMMIT")
            except BaseException as error:
                if db is not None and db.in_transaction:
                    try:
                        db.execute("ROLLBACK")
                    except sqlite3.Error:
                        self.close()  # the next one to open the file rolls it back
                if isinstance(error, sqlite3.Error):
                    raise explain(error, self.path) from error
                raise

    def backup(self, target: str | os.PathLike[str], max_age: float = 60.0) -> bool:
        """Copy the study to `target` unless that is younger than `max_age` seconds.

        The copy is consistent (sqlite3's backup), checked and on the disk before it takes the
        name; a damaged study never replaces a good backup, nor does one that has lost trials, or
        that a faster worker has overtaken.
        Returns whether a copy was made.  Raises EngineError.
        """
        target = os.path.abspath(target)
        if is_young(target, max_age):
            return False
        before = mark(target)
        with (
            closing(sqlite3.connect(f"{Path(self.path).as_uri()}?mode=rw", uri=True)) as source,
            whole_copy(source, target) as copy,
        ):
            if mark(target) != before and has_all(target, copy):
                return False  # of two workers that end together, the last results stay
            refuse_loss(copy, target)
            os.replace(copy, target)
        return True
