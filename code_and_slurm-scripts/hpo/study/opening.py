"""STUDY_DB → an Optuna storage, and the one place where a study is created, opened and checked.

    study = create_or_open_study(settings)    init_optuna_db.py and the workers
    study = open_study(settings)              check_best_model.py: never creates anything, and needs
                                              no permission to write

sqlite:/// is the bundle's own storage (storage.py); postgresql://, mysql://, journal:/// and
grpc:// are Optuna's.  A study remembers which script's objective it belongs to (user attribute
`py_script`), its direction, and its inputs: another objective is refused rather than mixed in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import Study, StudyDirection

from hpo import packages
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.study.served import ServedStorage, Server, find_server, server_path
from hpo.study.sqlite_file import StudyFileError, create_study_file
from hpo.study.storage import SQLiteStorage
from hpo.values import check_writable


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
        check_writable(path)
    with clear_errors(settings):
        if path and not path.exists():
            create_study_file(str(path), settings.study_name, settings.directions)
        return _add_study(open_storage(settings), settings)


def open_study(settings: Settings) -> Study:
    """Open a study that exists.

    Raises:
        UserError: there is no such database, or no study of that name in it; or this Optuna was
            not tested.
    """
    packages.check_optuna()
    try:
        missing = settings.sqlite_path and not settings.sqlite_path.exists()
    except OSError as error:  # a folder that may not be read
        raise UserError(f"{settings.sqlite_path} cannot be read: {error.strerror}") from error
    if missing:
        raise UserError(
            f"there is no study yet: {settings.sqlite_path} does not exist; "
            "start workers first, or set STUDY_DB"
        )
    with clear_errors(settings):
        storage = open_storage(settings)
        names = optuna.get_all_study_names(storage=storage)
        if settings.study_name in names:
            return optuna.load_study(study_name=settings.study_name, storage=storage)
    known = ", ".join(sorted(names)) or "none"
    raise UserError(
        f"STUDY_NAME={settings.study_name!r} is not in {settings.study_db}; studies there: {known}"
    )


def open_storage(settings: Settings) -> BaseStorage:
    """Return the storage behind STUDY_DB; raises UserError if it needs what is not there."""
    scheme, _, rest = settings.study_db.partition("://")
    if settings.sqlite_path and (server := find_server(settings.sqlite_path)):
        return _served_storage(settings, server)
    if settings.sqlite_path:
        path = settings.sqlite_path
        return SQLiteStorage.of(settings, path, settings.signature, readonly=not _may_write(path))
    if scheme == "journal":
        from optuna.storages.journal import JournalFileBackend

        path = SCRIPTS / rest.removeprefix("/")  # relative to the scripts' folder, like sqlite:///
        return JournalStorage(JournalFileBackend(str(path)))
    if scheme == "grpc":
        return _grpc_storage(rest)
    try:
        return RDBStorage(settings.study_db)
    except Exception as error:  # the driver is missing, or nobody answers: both are the user's
        raise UserError(f"STUDY_DB={settings.study_db!r} cannot be opened: {error}") from error


def _served_storage(settings: Settings, server: Server) -> BaseStorage:
    """Where locks do not hold between nodes, nobody but the serving process opens study.db."""
    assert settings.sqlite_path
    if settings.job_id == server.job_id:
        packages.need("A served study", "grpcio", "protobuf")
        return ServedStorage(host=server.host, port=server.ports[settings.rank])
    backup = settings.backup_path
    if settings.job_id or not backup or not backup.exists():
        raise UserError(
            f"job {server.job_id} on {server.host} serves {settings.sqlite_path}: wait until it "
            f"has ended (if it has, delete {server_path(settings.sqlite_path)})"
        )
    print(f"(as of less than a minute ago: {server.host} owns the study, this is its backup)")
    return SQLiteStorage(backup, worker="reader", readonly=not _may_write(backup))


def _may_write(path: Path) -> bool:
    """Whether a study can be changed; looking at it needs no more than to read the file."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


@contextmanager
def clear_errors(settings: Settings) -> Iterator[None]:
    """Turn what can be wrong with the study's file into one clear line."""
    try:
        yield
    except StudyFileError as error:
        backup = settings.backup_path
        hint = f"; its last backup is {backup}" if backup and backup.exists() else ""
        raise UserError(f"{error}{hint}") from error


def _grpc_storage(address: str) -> BaseStorage:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"STUDY_DB='grpc://{address}' needs a host and a port: grpc://host:13000")
    packages.need(f"STUDY_DB='grpc://{address}'", "grpcio", "protobuf")
    return optuna.storages.GrpcStorageProxy(host=host, port=int(port))


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
