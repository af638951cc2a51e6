"""A study copied as a whole: from one database to another, and from a server into its backup."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial

from hpo.settings import Settings, UserError, study_url
from hpo.study import leases, tables
from hpo.study.engines import Transaction
from hpo.study.engines.kept import refuse_loss
from hpo.study.engines.postgresql import PostgreSQL
from hpo.study.engines.sqlite_file import StudyFile, is_young, new_database, whole_copy
from hpo.study.opening import clear_errors, open_storage, open_study
from hpo.study.optuna_private import FrozenStudy, storage_of, study_id
from hpo.study.storage import StudyStorage
from hpo.study.studies import insert_study
from hpo.values import SQLITE_PREFIX


class _Content(NamedTuple):
    study: FrozenStudy
    trials: Sequence[FrozenTrial]
    leases: dict[int, tuple[Any, ...]]  # by the trial's number


def backup(storage: StudyStorage, number: int, target: Path, max_age: float) -> bool:
    """Copy the study with that id to an SQLite file unless that is younger than max_age seconds.

    The copy is consistent, and on the disk before it takes the name.  Returns whether one was made.
    Raises EngineError, OSError.
    """
    engine = storage.file
    if isinstance(engine, StudyFile):
        return engine.backup(target, max_age)
    assert isinstance(engine, PostgreSQL)
    if is_young(target, max_age):
        return False
    with engine.alone():  # a slower worker's older copy must not replace this one
        if is_young(target, max_age):
            return False
        with (
            closing(_in_memory(_read(storage, number))) as memory,
            whole_copy(memory, str(target)) as copy,
        ):
            refuse_loss(copy, str(target))
            os.replace(copy, target)
    return True


def copy_study(settings: Settings, url: str) -> str:
    """Copy STUDY_NAME from the database `url` to STUDY_DB, with its checkpoints.

    All of it or nothing.  Returns a line that says what was copied.

    Raises:
        UserError: it is not there, somebody runs it, or STUDY_DB has a study of that name.
    """
    source = replace(settings, study_db=study_url(url))
    if source.study_db == settings.study_db:
        raise UserError(f"--copy-from and STUDY_DB are the same: {settings.shown_db}")
    study = open_study(source)
    with clear_errors(source):
        storage, number = storage_of(study), study_id(study)
        content = _read(storage, number)
        if content.leases:  # a worker renews them several times in that time
            time.sleep(settings.lease_grace / 3)
            _check_quiet(content, _read(storage, number), source)
    with clear_errors(settings):
        _check_free(settings)
        copied = _copy_folder(source.checkpoints, settings.checkpoints)
        try:
            _write_to(
                settings, content, lambda: _check_quiet(content, _read(storage, number), source)
            )
        except BaseException:
            if copied:
                shutil.rmtree(settings.checkpoints)
            raise
    return (
        f"study {settings.study_name}: {len(content.trials)} trials copied from "
        f"{source.shown_db} to {settings.shown_db}"
    )


def restore(settings: Settings, engine: PostgreSQL) -> int:
    """Put the study's last copy into a new database, which nobody uses yet; return its trials.

    What ran when the copy was made waits again.  Raises UserError for a copy that is damaged.
    """
    copy = settings.backup_path
    if not copy or not copy.exists():
        return 0
    study = open_study(replace(settings, study_db=f"{SQLITE_PREFIX}{copy}"))
    content = _read(storage_of(study), study_id(study))
    with engine.write() as db:
        _write(db, content)
        db.execute("UPDATE leases SET owner = NULL")
        db.execute("UPDATE trials SET state = 'WAITING' WHERE state = 'RUNNING'")
    return len(content.trials)


def _read(storage: BaseStorage, number: int) -> _Content:
    """Return all of a study.  The leases first: a trial that ends meanwhile needs none."""
    (study,) = (s for s in storage.get_all_studies() if study_id(s) == number)
    held = leases.rows(storage.file, number) if isinstance(storage, StudyStorage) else {}
    return _Content(study, storage.get_all_trials(number, deepcopy=False), held)


def _write(db: Transaction, content: _Content) -> None:
    study = content.study
    number = insert_study(db, study.directions, study.study_name)
    for kind, attributes in (("user", study.user_attrs), ("system", study.system_attrs)):
        for key, value in attributes.items():
            tables.set_attribute(db, f"study_{kind}", number, key, value)
    for trial in content.trials:
        trial_id = tables.insert_trial(db, number, trial)
        if not trial.state.is_finished():
            leases.insert(db, trial_id, trial.state, content.leases.get(trial.number))


def _in_memory(content: _Content) -> Any:
    memory = new_database()
    _write(memory, content)
    memory.commit()
    return memory


def _write_to(settings: Settings, content: _Content, check: Callable[[], None]) -> None:
    """Write a study to STUDY_DB; `check` is called last, and what it raises undoes all."""
    path = settings.sqlite_path
    if path and not path.exists():
        with (
            closing(_in_memory(content)) as memory,
            whole_copy(memory, str(path)) as copy,
        ):
            check()
            os.link(copy, path)
        return
    storage = open_storage(settings, create=True)
    assert isinstance(storage, StudyStorage)
    with storage.file.write() as db:
        _write(db, content)
        check()


def _check_free(settings: Settings) -> None:
    """Raise UserError unless STUDY_DB can take the study."""
    if not settings.sqlite_path and not settings.postgresql_url:
        raise UserError("--copy-from copies to sqlite:/// or postgresql:// alone")
    if settings.sqlite_path and not settings.sqlite_path.exists():
        return
    names = [s.study_name for s in open_storage(settings, create=True).get_all_studies()]
    if settings.study_name in names:
        raise UserError(
            f"{settings.shown_db} has a study {settings.study_name!r} already: nothing was copied"
        )


def _check_quiet(before: _Content, after: _Content, source: Settings) -> None:
    """Raise UserError if somebody has worked on the study in between."""
    numbers = [[(t.number, t.state) for t in content.trials] for content in (before, after)]
    if before.leases != after.leases or numbers[0] != numbers[1]:
        raise UserError(f"somebody runs the study in {source.shown_db}: stop its workers first")


def _copy_folder(source: Path, target: Path) -> bool:
    """Copy a study's checkpoints, if there are any; return whether there were."""
    if not source.is_dir():
        return False
    if target.exists():
        raise UserError(f"{target} is there already, of another study: nothing was copied")
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        shutil.copytree(source, temporary)
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True
