"""A PostgreSQL database (13 or newer): connections, row locks, tables, and clear errors.

The rules, and the failure that each of them prevents:

* Isolation is READ COMMITTED: an UPDATE waits for a row and then looks at it anew, so that a claim
  or a lease needs no second try.  What is counted is counted after the study's row is locked.
* A connection that is lost is made anew, for RECONNECT seconds, before a transaction begins or a
  SELECT is asked: a server that restarts costs a wait.  One that is lost inside a transaction is an
  error: nobody knows whether a COMMIT has arrived.
* A worker that is frozen inside a transaction loses it after IDLE seconds: it holds up nobody.
* The plan is always a loop over indexes: without statistics, which a new table has not,
  PostgreSQL would read all reports of a study to find those of one trial.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from importlib import import_module
from typing import Any, TypeVar

from optuna.storages import RDBStorage

from hpo import packages
from hpo.study.engines import LOCK, SCHEMA, EngineError, Transaction, Version
from hpo.study.engines.unanswered import answered
from hpo.values import UserError, password_of, without_password
from hpo.words import one_line

T = TypeVar("T")

DRIVERS = ("psycopg", "psycopg2")  # in this order
OLDEST = 13
CONNECT = 3  # seconds to wait for one address of the server; there may be two
IDLE = 20  # seconds that a transaction may stand still
LONGEST_PAUSE = 2.0  # seconds between two attempts to connect
RECONNECT = 15.0  # seconds to try for; hpo/site.py goes on, and knows when the job ends
KEY = 0x6F707475  # of the advisory lock of who makes the tables
# A server that has vanished without a word is noticed within half a minute.
ALIVE = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 4,
    "tcp_user_timeout": 30_000,  # milliseconds
}
SESSION = (
    "SET datestyle TO ISO; SET lock_timeout TO '{timeout:.0f}s'; "
    f"SET idle_in_transaction_session_timeout TO '{IDLE}s'; "
    "SET enable_hashjoin TO off; SET enable_mergejoin TO off; "
    "SET default_transaction_isolation TO 'read committed'"
)
# Ours, beside Optuna's tables, as in sqlite_file.py; it goes with a trial that stock deletes.
LEASES = """CREATE TABLE IF NOT EXISTS leases (
    trial_id INTEGER PRIMARY KEY REFERENCES trials ON DELETE CASCADE, owner TEXT,
    job_id TEXT NOT NULL, host TEXT NOT NULL, counter INTEGER NOT NULL,
    attempts INTEGER NOT NULL)"""
LOOK = """SELECT to_regclass('alembic_version') IS NOT NULL, to_regclass('trials') IS NOT NULL,
    to_regclass('studies') IS NOT NULL, to_regclass('leases') IS NOT NULL,
    current_setting('server_version_num')::integer, current_schema() IS NOT NULL
    AND has_schema_privilege(current_schema(), 'CREATE')"""
NUMBER = "SELECT version_num FROM alembic_version"

_inherited: list[Any] = []  # a parent's connections: kept, because closing acts


class ServerError(EngineError):
    """The server cannot be reached, or has refused; nothing was changed."""


class ServerAway(ServerError):
    """Nobody answers, or the server is starting or stopping: it may be there again in a minute."""


class NoTables(ServerError):
    """There is no study in this database yet."""


def driver() -> Any:
    """Return psycopg, or else psycopg2.  Raises UserError, with the command, if none is there."""
    for name in DRIVERS:
        with suppress(ImportError):
            return import_module(name)
    packages.need("STUDY_DB=postgresql://…", "psycopg[binary]")
    raise UserError("psycopg is installed, but cannot be imported: is libpq missing?")


@lru_cache(maxsize=256)
def to_driver(sql: str) -> str:
    """Return a statement as both drivers want it."""
    return sql.replace("?", "%s")


def is_away(error: BaseException) -> bool:
    """Return whether a server has not answered, or is starting or stopping (by the text)."""
    text = str(error)
    final = any(word in text for word in ("FATAL:", "ERROR:", "Name or service not known"))
    return not final or any(word in text for word in ("starting up", "shut", "terminating"))


class _Cursor:
    """What a statement has done; see engines.Cursor."""

    def __init__(self, connection: Any, sql: str, args: Sequence[Any]) -> None:
        self._connection, self._cursor = connection, connection.cursor()
        with answered(connection.fileno()):
            self._cursor.execute(to_driver(sql), tuple(args) or None)

    @property
    def rowcount(self) -> int:
        return int(self._cursor.rowcount)

    @property
    def lastrowid(self) -> int:
        (row,) = _Cursor(self._connection, "SELECT lastval()", ())
        return int(row[0])

    def fetchone(self) -> Any:
        return self._cursor.fetchone()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._cursor.fetchall())


class _Transaction:
    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def execute(self, sql: str, args: Sequence[Any] = (), /) -> _Cursor:
        return _Cursor(self._connection, sql, args)


class PostgreSQL:
    """One PostgreSQL database and this process's connection to it.

    `url` is as libpq takes it.  The tables are made if there are none, unless `create` is false:
    then nothing is ever created.  `timeout` is in seconds: how long to wait for a row's lock, and,
    RECONNECT at most, for a server that was there before.  Safe with threads, fork and pickle.
    Raises ServerError, NoTables; UserError without a driver.
    """

    def __init__(self, url: str, timeout: float = 60.0, create: bool = True) -> None:
        self._url, self.timeout = url, timeout
        self.name = without_password(url)
        self.has_leases, self.largest_step = True, 2**31 - 1  # Optuna's column has 32 bits
        self._connection: Any = None
        self._pid = os.getpid()
        self._reads = 0
        self._driver = driver()
        with self._explained():
            self._connection = self._connect()  # the first time, without patience
        self._check(create)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connection": None, "_driver": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._driver = driver()

    # ---- tables ----------------------------------------------------------------------------

    def _check(self, create: bool) -> None:
        """Raise ServerError for what is no study of this Optuna; make the tables if wanted."""
        version, trials, studies, leases, server, may_create = self._look()
        if server < OLDEST * 10_000:
            raise ServerError(f"{self.name}: PostgreSQL {server // 10_000} is older than {OLDEST}")
        if not (version or trials or studies):
            if not create:
                raise NoTables(f"there is no study yet in {self.name}; start workers first")
            self._may(may_create)
            self._make_tables()
        elif not (version and trials and studies):
            raise ServerError(
                f"{self.name} has tables of another program (alembic_version, studies, trials). "
                "It was left as it is: give a database, or a schema, of its own"
            )
        if (found := self.read(NUMBER)) != [(SCHEMA,)]:
            named = ", ".join(name for (name,) in found) or "none"
            raise ServerError(f"{self.name} is of another Optuna ({named}): not {SCHEMA}")
        if not leases and create and trials:  # a study that stock Optuna made
            self._may(may_create)
            with self.write() as db:
                db.execute(f"SELECT pg_advisory_xact_lock({KEY})")
                db.execute(LEASES)
        self.has_leases = bool(leases) or create

    def _look(self) -> tuple[Any, ...]:
        """Return what is there; tables that another process is just making are waited for."""
        found = self.read(LOOK)[0]
        if any(found[:3]) and not (all(found[:3]) and self.read(NUMBER)):
            with self._explained(), closing(self._connect()) as db:
                _Cursor(db, f"SELECT pg_advisory_lock({KEY})", ())
            found = self.read(LOOK)[0]
        return found

    def _may(self, allowed: bool) -> None:
        if not allowed:
            raise ServerError(
                f"{self.name}: this user may not create tables there; its owner can allow it: "
                "GRANT CREATE ON SCHEMA public TO …"
            )

    def _make_tables(self) -> None:
        """Let Optuna make its tables, and make ours; one process at a time."""
        with self._explained(), closing(self._connect()) as db:
            _Cursor(db, f"SELECT pg_advisory_lock({KEY})", ())
            try:
                stock = RDBStorage(
                    f"postgresql+{self._driver.__name__}://",
                    engine_kwargs={"creator": self._new_connection},
                )
            except Exception as error:  # SQLAlchemy's, around the driver's
                raise getattr(error, "orig", None) or error from error
            stock.remove_session()
            stock.engine.dispose()
            _Cursor(db, LEASES, ())

    # ---- connections -----------------------------------------------------------------------

    def _new_connection(self) -> Any:
        given = {**ALIVE, "connect_timeout": CONNECT, "client_encoding": "utf8"}
        return self._driver.connect(self._url, **given, application_name="optuna")

    def _connect(self) -> Any:
        connection = self._new_connection()
        connection.autocommit = True
        _Cursor(connection, SESSION.format(timeout=max(1.0, self.timeout)), ())
        return connection

    def connection(self) -> Any:
        """Return this process's connection; after a fork, a new one."""
        if self._connection is not None and self._pid != os.getpid():
            _inherited.append(self._connection)
            self._connection = None
        if self._connection is None:
            self._connection = self._connect()
            self._pid = os.getpid()
        return self._connection

    def close(self) -> None:
        """Close the connection; the next use opens another."""
        with LOCK:
            if self._connection is not None and self._pid == os.getpid():
                with suppress(self._driver.Error):
                    self._connection.close()
                self._connection = None

    def _patiently(self, step: Callable[[Any], T]) -> T:
        """Do what can be done twice; while the server is away, again on a new connection."""
        start, pause, limit = time.monotonic(), 0.05, min(RECONNECT, self.timeout)
        while True:
            try:
                return step(self.connection())
            except self._driver.Error as error:
                if self._connection is not None and not self._connection.closed:
                    raise
                self.close()
                if time.monotonic() - start > limit:
                    raise ServerAway(
                        f"{self.name} has been away for {limit:.0f} s ({self._one_line(error)})"
                    ) from error
            except BaseException:
                self.close()  # a signal's exception: an answer may still be under way
                raise
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    # ---- reads and writes ------------------------------------------------------------------

    def read(self, sql: str, args: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return all rows of one SELECT, which is one consistent picture."""
        with LOCK, self._explained():
            return self._patiently(lambda connection: list(_Cursor(connection, sql, args)))

    def read_changed(
        self, known: Version | None, sql: str, args: Sequence[Any]
    ) -> tuple[Version, list[tuple[Any, ...]] | None]:
        """Return all rows of one SELECT: to ask whether anybody wrote would cost as much."""
        with LOCK:
            self._reads += 1
            return Version(0, 0, self._reads), self.read(sql, args)

    @contextmanager
    def write(self) -> Iterator[Transaction]:
        """Give one transaction: all of it is on the server's disk, or nothing."""
        with LOCK, self._explained():
            self._patiently(lambda connection: _Cursor(connection, "BEGIN", ()))
            try:
                db = _Transaction(self._connection)
                yield db
                db.execute("COMMIT")
            except BaseException:
                try:
                    _Cursor(self._connection, "ROLLBACK", ())
                except self._driver.Error:
                    self.close()  # then the server rolls it back
                raise

    def lock(self, db: Transaction, table: str, row_id: int) -> None:
        """Wait for a row of studies or trials; until the end nobody else changes it."""
        column = {"studies": "study_id", "trials": "trial_id"}[table]
        db.execute(f"SELECT 1 FROM {table} WHERE {column} = ? FOR UPDATE", (row_id,))

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until nobody else is in here: no other process that uses this database."""
        with self._explained():
            db = self._connect()
        with closing(db):
            with self._explained():
                _Cursor(db, f"SELECT pg_advisory_lock({KEY + 1})", ())
            yield

    # ---- errors ----------------------------------------------------------------------------

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what the server or the network did into one line; a bug of ours stays as it is."""
        try:
            yield
        except self._driver.Error as error:
            code = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
            if code == "55P03":
                raise ServerError(
                    f"{self.name}: somebody held a lock for {self.timeout:.0f} s"
                ) from error
            ours = (self._driver.OperationalError, self._driver.InternalError)
            if isinstance(error, ours) or code in ("42501", "25006"):
                kind = ServerAway if is_away(error) else ServerError
                raise kind(f"{self.name}: {self._one_line(error)}") from error
            raise

    def _one_line(self, error: BaseException) -> str:
        text = one_line(error, 300)
        for secret in password_of(self._url):
            text = text.replace(secret, "***")
        return text
