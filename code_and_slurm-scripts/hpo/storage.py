"""STUDY_DB → an Optuna storage, and the one place where a study is created, opened and checked.

    study = create_or_open_study(settings)    init_optuna_db.py and the workers
    study = open_study(settings)              check_best_model.py: never creates anything

A study remembers which script's objective it belongs to (user attribute `py_script`) and its
direction; a worker with another objective is refused rather than allowed to mix two searches.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.study import Study, StudyDirection

from hpo.settings import SCRIPTS, Settings, UserError

SQLITE_HEADER = b"SQLite format 3\0"
BUSY_TIMEOUT = 60.0  # seconds that SQLite waits for another worker's lock


def create_or_open_study(settings: Settings) -> Study:
    """Open the study of `settings`, and create it first where it does not exist.

    Safe to call again and again, and from many processes at the same instant.

    Raises:
        UserError: the database cannot be used, or holds that study with another direction or
            objective.
    """
    if settings.sqlite_path and not settings.sqlite_path.exists():
        _create_sqlite_file(settings, settings.sqlite_path)
    return _add_study(open_storage(settings), settings)


def open_study(settings: Settings) -> Study:
    """Open a study that exists.

    Raises:
        UserError: there is no such database, or no study of that name in it.
    """
    if settings.sqlite_path and not settings.sqlite_path.exists():
        raise UserError(
            f"there is no study yet: {settings.sqlite_path} does not exist; "
            "start workers first, or set STUDY_DB"
        )
    storage = open_storage(settings)
    names = optuna.get_all_study_names(storage=storage)
    if settings.study_name not in names:
        known = ", ".join(sorted(names)) or "none"
        raise UserError(
            f"STUDY_NAME={settings.study_name!r} is not in {settings.study_db}; "
            f"studies there: {known}"
        )
    return optuna.load_study(study_name=settings.study_name, storage=storage)


def open_storage(settings: Settings) -> BaseStorage:
    """Return the storage behind STUDY_DB.

    Raises:
        UserError: it cannot be reached, or its file is no database.
    """
    scheme, _, rest = settings.study_db.partition("://")
    if settings.sqlite_path:
        _refuse_other_file(settings.sqlite_path)
        options = {"connect_args": {"timeout": BUSY_TIMEOUT}}
        return RDBStorage(settings.study_db, engine_kwargs=options)
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


def _grpc_storage(address: str) -> BaseStorage:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"STUDY_DB='grpc://{address}' needs a host and a port: grpc://host:13000")
    try:
        return optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    except ImportError as error:
        raise UserError(
            f"STUDY_DB='grpc://{address}' needs two more packages: pip install grpcio protobuf"
        ) from error


def _refuse_other_file(path: Path) -> None:
    """Stop at a file that is no SQLite database before any library touches it."""
    try:
        with path.open("rb") as file:
            header = file.read(len(SQLITE_HEADER))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if header != SQLITE_HEADER:
        raise UserError(
            f"{path} is not an SQLite database, so it was left as it is; "
            "move it away or set STUDY_DB to another file"
        )


def _create_sqlite_file(settings: Settings, path: Path) -> None:
    """Make the database with its study under another name, then give it its name in one step.

    Several workers that create tables in one file at the same time disturb each other (28 of 32
    crashed).  link() fails if another process was faster, and needs no lock, so it also works
    where the file system's locks do not hold between nodes.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.new-")
    os.close(handle)
    temporary = Path(name)
    try:
        storage = RDBStorage(f"sqlite:///{temporary}")
        _add_study(storage, settings)
        storage.engine.dispose()
        temporary.chmod(0o644)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        pass  # another process has just made it: use that one
    finally:
        temporary.unlink()


def _add_study(storage: BaseStorage, settings: Settings) -> Study:
    """Create the study, or take the one that has its name; refuse it if it is another's."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # "Using an existing study": not news
    study = optuna.create_study(
        study_name=settings.study_name,
        storage=storage,
        direction=StudyDirection[settings.direction.upper()],
        load_if_exists=True,
    )
    owner = study.user_attrs.get("py_script", settings.py_script)
    found = (owner, [direction.name.lower() for direction in study.directions])
    if found != (settings.py_script, [settings.direction]):
        raise UserError(
            f"study {study.study_name!r} belongs to {owner} ({', '.join(found[1])}), not to "
            f"{settings.py_script} ({settings.direction}); choose another STUDY_NAME"
        )
    if "py_script" not in study.user_attrs:
        study.set_user_attr("py_script", settings.py_script)
    return study
