"""The studies of one database: made, deleted, read, as plain SQL; their trials are in held.py."""

from __future__ import annotations

import json
import uuid
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from optuna.exceptions import DuplicatedStudyError
from optuna.study import StudyDirection

from hpo.study.engines import Engine, Transaction
from hpo.study.optuna_private import FrozenStudy
from hpo.study.optuna_private import study_id as id_of_study
from hpo.study.tables import set_attribute
from hpo.words import to_json

SET_ONCE = """INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (?, ?, ?)
ON CONFLICT (study_id, key) DO NOTHING"""
# Trials are numbered in the order of their ids, and none is ever deleted alone: to count them all
# would take longer with each trial, while everybody waits for the lock.
NEXT_NUMBER = """SELECT coalesce((SELECT number + 1 FROM trials t WHERE t.study_id = s.study_id
ORDER BY trial_id DESC LIMIT 1), 0) FROM studies s WHERE study_id = ?"""


def next_number(db: Transaction, study_id: int) -> int:
    """Return the number of a study's next trial: how many it has. Raises KeyError."""
    if (row := db.execute(NEXT_NUMBER, (study_id,)).fetchone()) is None:
        raise KeyError(f"There is no study {study_id}.")
    return int(row[0])


def insert_study(db: Transaction, directions: Sequence[StudyDirection], name: str) -> int:
    """Add a study and return its id. Raises DuplicatedStudyError."""
    added = db.execute(
        "INSERT INTO studies (study_name) VALUES (?) ON CONFLICT (study_name) DO NOTHING", (name,)
    )
    if not added.rowcount:
        raise DuplicatedStudyError(f"There is already a study {name!r}.")
    study_id = int(added.lastrowid or 0)
    for objective, direction in enumerate(directions):
        db.execute(
            "INSERT INTO study_directions (study_id, objective, direction) VALUES (?, ?, ?)",
            (study_id, objective, direction.name),
        )
    return study_id


class Studies:
    """The rows of Optuna's tables that are about studies."""

    def __init__(self, file: Engine) -> None:
        self._file = file

    def create(self, directions: Sequence[StudyDirection], name: str | None) -> int:
        """Add a study and return its id. Raises DuplicatedStudyError."""
        name = name if name is not None else f"no-name-{uuid.uuid4()}"
        with self._file.write() as db:
            return insert_study(db, directions, name)

    def delete(self, study_id: int) -> None:
        """Delete a study and its trials. Raises KeyError."""
        trials = "SELECT trial_id FROM trials WHERE study_id = ?"
        of_trials = "params values intermediate_values heartbeats user_attributes system_attributes"
        of_study = "trials study_directions study_user_attributes study_system_attributes studies"
        with self._file.write() as db:
            if not db.execute("SELECT 1 FROM studies WHERE study_id = ?", (study_id,)).fetchone():
                raise KeyError(f"There is no study {study_id}.")
            for table in of_trials.split():
                db.execute(f"DELETE FROM trial_{table} WHERE trial_id IN ({trials})", (study_id,))
            for table in of_study.split():
                db.execute(f"DELETE FROM {table} WHERE study_id = ?", (study_id,))

    def set_attribute(self, kind: str, study_id: int, key: str, value: Any) -> None:
        """Set an attribute; `kind` is study_user or study_system. Raises KeyError."""
        self.get(study_id)
        with self._file.write() as db:
            set_attribute(db, kind, study_id, key, value)

    def set_once(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute unless it is there, whoever else tries it at the same time."""
        with self._file.write() as db:
            db.execute(SET_ONCE, (study_id, key, to_json(value)))

    def id_of(self, name: str) -> int:
        """Return the id of a study. Raises KeyError."""
        rows = self._file.read("SELECT study_id FROM studies WHERE study_name = ?", (name,))
        if not rows:
            raise KeyError(f"There is no study {name!r}.")
        return int(rows[0][0])

    def get(self, study_id: int) -> FrozenStudy:
        """Return a study. Raises KeyError."""
        for study in self.all():
            if id_of_study(study) == study_id:
                return study
        raise KeyError(f"There is no study {study_id}.")

    def all(self) -> list[FrozenStudy]:
        """Return all studies, in order."""
        rows = self._file.read(
            "SELECT 0, study_id, 0, study_name, NULL FROM studies "
            "UNION ALL SELECT 1, study_id, objective, CAST(direction AS VARCHAR), NULL "
            "FROM study_directions "
            "UNION ALL SELECT 2, study_id, 0, key, value_json FROM study_user_attributes "
            "UNION ALL SELECT 3, study_id, 0, key, value_json FROM study_system_attributes "
            "ORDER BY 1, 2, 3"
        )
        names: dict[int, str] = {}
        directions: dict[int, list[StudyDirection]] = defaultdict(list)
        attributes: dict[tuple[int, int], dict[str, Any]] = defaultdict(dict)
        for kind, study_id, _, text, value in rows:
            if kind == 0:
                names[study_id] = text
            elif kind == 1:
                directions[study_id].append(StudyDirection[text])
            else:
                attributes[kind, study_id][text] = json.loads(value)
        return [
            FrozenStudy(name, None, attributes[2, id_], attributes[3, id_], id_,
                        directions=directions[id_])
            for id_, name in names.items()
        ]  # fmt: skip
