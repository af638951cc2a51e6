"""STUDY_DB → an Optuna storage, and the one place where a study is created, opened and checked.

    reach(settings)                           init_optuna_db.py, before what takes longer
    study = create_or_open_study(settings)    the same, and the workers
    study = open_study(settings)              check_best_model.py: never creates anything, and needs
                                              no permission to write

sqlite:/// and postgresql:// are the bundle's own storage (storage.py); mysql://, journal:/// and
grpc:// are Optuna's.  A study remembers which script's objective it belongs to (user attribute
`py_script`), its direction, and its inputs: another objective is refused rather than mixed in.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import Study, StudyDirection

from hpo import packages, values
from hpo.files import AWAY
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.study.engines import EngineError
from hpo.study.engines.postgresql import NoTables, PostgreSQL, ServerAway
from hpo.study.engines.sqlite_errors import DiskFull, StudyBusy
from hpo.study.engines.sqlite_file import StudyFile, create_study_file
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.serving.served import (
    Leased,
    ServedStorage,
    Server,
    ServerGone,
    database_of,
    find_server,
    server_path,
)
from hpo.study.storage import StudyStorage
from hpo.study.trials import Counts
from hpo.values import SiteAway, check_writable
from hpo.words import duration, one_line

BACKUP = ".backup"  # study.db.backup is a copy of study.db
DRIVERS = {"MySQLdb": "mysqlclient", "pymysql": "PyMySQL"}  # what pip calls them
MAY_PASS = (DiskFull, StudyBusy, ServerAway, ServerGone)
CONNECT_SECONDS = 5  # until an unreachable server is an error


def create_or_open_study(settings: Settings) -> Study:
    """Open the study of `settings`, and create it first where it does not exist.

    Safe to call again and again, and from many processes at the same instant.

    Raises:
        UserError: the database cannot be used, or holds that study with another direction or
            objective; or this Optuna was not tested.
    """
    packages.check_optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # "Using an existing study": not news
    path = settings.sqlite_path
    if path:
        _refuse_backup(path)
        check_writable(path)
    with clear_errors(settings):
        if path and not path.exists():
            create_study_file(str(path), settings.study_name, settings.directions)
        return _add_study(open_storage(settings, create=True), settings)


def reach(settings: Settings) -> None:
    """Ask whether the server of a study answers; make nothing there.

    Before what takes longer: a script may import torch.  A MySQL is not asked, where Optuna would
    make its tables.

    Raises:
        UserError: nobody answers, or what is there is no study of this Optuna.
    """
    if settings.postgresql_url or settings.study_db.startswith("grpc:"):
        with clear_errors(settings), suppress(NoTables):
            open_storage(settings).remove_session()


def open_study(settings: Settings) -> Study:
    """Open a study that exists.

    Raises:
        UserError: there is no such database, or no study of that name in it; or this Optuna was
            not tested.
    """
    packages.check_optuna()
    path = settings.sqlite_path or _journal_path(settings)
    try:
        missing = path and not path.exists()
    except OSError as error:  # a folder that may not be read
        if error.errno in AWAY:
            raise
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if missing:
        raise UserError(
            f"there is no study yet: {path} does not exist; start workers first, or set STUDY_DB"
        )
    with clear_errors(settings):
        storage = open_storage(settings)
        names = optuna.get_all_study_names(storage=storage)
        if settings.study_name in names:
            return optuna.load_study(study_name=settings.study_name, storage=storage)
    known = ", ".join(sorted(names)) or "none"
    raise UserError(
        f"STUDY_NAME={settings.study_name!r} is not in {settings.shown_db}; studies there: {known}"
    )


def is_gone(study: Study) -> bool:
    """Whether somebody has deleted the study since it was opened."""
    try:
        storage_of(study).get_study_name_from_id(study_id(study))
    except KeyError:
        return True
    return False


def open_storage(settings: Settings, create: bool = False) -> BaseStorage:
    """Return the storage behind STUDY_DB; what is only looked at, may be a backup.

    In a PostgreSQL database nothing is made unless `create` is true.

    Raises:
        UserError: a package is missing, nobody answers, or another job serves the study.
    """
    if path := settings.sqlite_path:
        if server := find_server(path):
            return _served_storage(settings, server, create)
        readonly = _is_backup(path) or not _may_write(path)
        return StudyStorage.of(settings, path, settings.signature, readonly=readonly)
    if settings.study_db == values.OWN_SERVER:
        return _own_storage(settings, create)
    if url := settings.postgresql_url:
        return StudyStorage.of(settings, PostgreSQL(url, create=create), settings.signature)
    try:
        return _stock_storage(settings)
    except UserError:
        raise
    except Exception as error:  # nobody answers, or it is no study: both are the user's
        text = values.without_password(one_line(error) or type(error).__name__)
        raise UserError(f"STUDY_DB={settings.shown_db!r} cannot be opened: {text}") from error


def _served_storage(settings: Settings, server: Server, create: bool) -> BaseStorage:
    """Where locks do not hold between nodes, nobody but the serving process opens study.db."""
    path, backup = settings.sqlite_path, settings.backup_path
    assert path
    assert backup
    if server.is_of(settings):
        packages.need("A served study", "grpcio", "protobuf")
        return ServedStorage(server, settings.rank, settings.total_trials)
    if create or not backup.exists():
        raise UserError(
            f"{server} serves {path}: wait until it has ended "
            f"(if it has, delete {server_path(path)})"
        )
    return StudyStorage(backup, worker="reader", readonly=True)


def _own_storage(settings: Settings, create: bool) -> BaseStorage:
    """A PostgreSQL inside the job is for its own processes; all others read the last copy."""
    server, backup = find_server(database_of(settings)), settings.backup_path
    assert backup
    if server and server.is_of(settings):
        url = server.postgresql_url
        return StudyStorage.of(settings, PostgreSQL(url, create=create), settings.signature)
    if create or not backup.exists():
        raise UserError(
            f"{server} has this study: wait until it has ended"
            if server
            else f"STUDY_DB={settings.study_db} is there while a launch script runs, and its copy "
            f"afterwards: bash run-optuna-local.sh, or sbatch; there is no {backup}"
        )
    return StudyStorage(backup, worker="reader", readonly=True)


def _stock_storage(settings: Settings) -> BaseStorage:
    """Return one of Optuna's own storages; whatever it raises, it cannot be used."""
    if path := _journal_path(settings):
        from optuna.storages.journal import JournalFileBackend

        if path.is_file():
            with path.open("rb") as file:
                if file.read(1) not in (b"", b"{"):
                    raise UserError(f"{path} is no journal of Optuna's. It was left as it is.")
        return JournalStorage(JournalFileBackend(str(path)))
    scheme, _, rest = settings.study_db.partition("://")
    if scheme == "grpc":
        return _grpc_storage(rest)
    _check_driver(settings)
    connect: dict[str, Any] = {"connect_args": {"connect_timeout": CONNECT_SECONDS}}
    return RDBStorage(settings.study_db, engine_kwargs=connect)


def _journal_path(settings: Settings) -> Path | None:
    """Return the file of a journal:/// URL, relative to the scripts' folder, like sqlite:///."""
    scheme, _, rest = settings.study_db.partition("://")
    return SCRIPTS / rest.removeprefix("/") if scheme == "journal" else None


def _check_driver(settings: Settings) -> None:
    """Raise UserError with the name of the driver's package, if that is missing."""
    from sqlalchemy import make_url

    try:
        make_url(settings.study_db).get_dialect().import_dbapi()
    except ModuleNotFoundError as error:
        module = str(error.name)
        packages.need(f"STUDY_DB={settings.shown_db!r}", DRIVERS.get(module, module))
        raise  # the package is there, and something that it needs is not


def _is_backup(path: Path) -> bool:
    return path.name.endswith(BACKUP)


def _refuse_backup(path: Path) -> None:
    """Only readers open a backup: the next one would erase what a worker has done in it."""
    if _is_backup(path):
        study = path.with_name(path.name.removesuffix(BACKUP))
        raise UserError(
            f"{path} is a backup, which can be looked at only; to go on from it, copy it to "
            f"{study} while no job runs"
        )


def backup_in_use(study: optuna.Study) -> str:
    """Return which backup an open study is, and its age; "" for one that is no backup."""
    storage = storage_of(study)
    if not isinstance(storage, StudyStorage) or not isinstance(storage.file, StudyFile):
        return ""
    if not _is_backup(path := Path(storage.file.path)):
        return ""
    made = path.stat().st_mtime
    server = find_server(path.with_name(path.name.removesuffix(BACKUP)))
    return (
        f"(a backup, made {duration(max(0.0, time.time() - made))} ago, at "
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(made))}"
        + (f": {server} serves the study itself)" if server else ")")
    )


def stuck(study: optuna.Study, counts: Counts) -> str:
    """Return what to do about RUNNING trials where no lease says who runs them; "" without any."""
    if not counts.running or isinstance(storage_of(study), Leased):
        return ""
    return (
        f"{counts.running} of its trials are RUNNING: on a worker, or for ever if that died, for "
        "this storage has no leases; when no worker runs: python init_optuna_db.py --retry-stuck"
    )


def _may_write(path: Path) -> bool:
    """Whether a study can be changed; looking at it needs no more than to read the file."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


@contextmanager
def clear_errors(settings: Settings) -> Iterator[None]:
    """Turn what can be wrong with the study's database into one clear line."""
    try:
        yield
    except EngineError as error:
        backup = settings.backup_path
        hint = f"; its last backup is {backup}" if backup and backup.exists() else ""
        kind = SiteAway if isinstance(error, MAY_PASS) else UserError
        raise kind(f"{error}{hint}") from error


def _grpc_storage(address: str) -> BaseStorage:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"STUDY_DB='grpc://{address}' needs a host and a port: grpc://host:13000")
    packages.need(f"STUDY_DB='grpc://{address}'", "grpcio", "protobuf")
    storage = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    storage.wait_server_ready(timeout=CONNECT_SECONDS)  # raises ConnectionError
    return storage


def _add_study(storage: BaseStorage, settings: Settings) -> Study:
    """Create the study, or take the one that has its name; refuse it if it is another's."""
    study = optuna.create_study(
        study_name=settings.study_name,
        storage=storage,
        directions=[StudyDirection[direction.upper()] for direction in settings.directions],
        load_if_exists=True,
    )
    owner = study.user_attrs.get("py_script", settings.py_script)
    found = (owner, [direction.name.lower() for direction in study.directions])
    if found != (settings.py_script, list(settings.directions)):
        raise UserError(
            f"study {study.study_name!r} belongs to {owner} ({', '.join(found[1])}), not to "
            f"{settings.py_script} ({', '.join(settings.directions)}); choose another STUDY_NAME"
        )
    _remember_inputs(study, settings)
    if "py_script" not in study.user_attrs:
        study.set_user_attr("py_script", settings.py_script)
        study.set_user_attr("total_trials", settings.total_trials)
    return study


def _remember_inputs(study: Study, settings: Settings) -> None:
    """Trials of other data or of another space cannot be compared: refuse DATA, SMALL, …"""
    mine = settings.inputs()
    known = study.user_attrs.get("inputs", {} if "py_script" in study.user_attrs else mine)
    if known != mine:
        words = " ".join(f"{name}={value}" for name, value in known.items())
        raise UserError(
            f"study {study.study_name!r} was begun with {words or 'none of ' + ', '.join(mine)}; "
            "give the same, or choose another STUDY_NAME"
        )
    if mine and "inputs" not in study.user_attrs:
        study.set_user_attr("inputs", mine)
