"""Optuna's tables: how studies and trials are written to them, as plain SQL.

What is the same whoever asks is here. Whose trial it is, and who may write, is in
sqlite_storage.py; how trials are read, in trial_cache.py.
"""

from __future__ import annotations

import json
import math
import sqlite3
import uuid
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.study_file import StudyFile

SET_ATTRIBUTE = """INSERT INTO {kind}_attributes ({id}, key, value_json) VALUES (?, ?, ?)
ON CONFLICT ({id}, key) DO UPDATE SET value_json = excluded.value_json"""
SET_PARAM = """INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)
VALUES (?, ?, ?, ?) ON CONFLICT (trial_id, param_name) DO NOTHING"""
SET_REPORT = """INSERT INTO trial_intermediate_values
(trial_id, step, intermediate_value, intermediate_value_type) VALUES (?, ?, ?, ?)
ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value,
    intermediate_value_type = excluded.intermediate_value_type"""
SET_VALUE = """INSERT INTO trial_values (trial_id, objective, value, value_type)
VALUES (?, ?, ?, ?) ON CONFLICT (trial_id, objective)
DO UPDATE SET value = excluded.value, value_type = excluded.value_type"""


class Studies(BaseStorage):
    """The half of an Optuna storage that is about studies; the other half is SQLiteStorage."""

    file: StudyFile

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Add a study and return its id. Raises DuplicatedStudyError."""
        name = study_name if study_name is not None else f"no-name-{uuid.uuid4()}"
        try:
            with self.file.write() as db:
                cursor = db.execute("INSERT INTO studies (study_name) VALUES (?)", (name,))
                study_id = int(cursor.lastrowid or 0)
                db.executemany(
                    "INSERT INTO study_directions (study_id, objective, direction) VALUES (?,?,?)",
                    [(study_id, i, direction.name) for i, direction in enumerate(directions)],
                )
        except sqlite3.IntegrityError:
            raise DuplicatedStudyError(f"There is already a study {name!r}.") from None
        return study_id

    def delete_study(self, study_id: int) -> None:
        """Delete a study and its trials. Raises KeyError."""
        trials = "SELECT trial_id FROM trials WHERE study_id = ?"
        of_trials = "params values intermediate_values heartbeats user_attributes system_attributes"
        of_study = "trials study_directions study_user_attributes study_system_attributes studies"
        with self.file.write() as db:
            if not db.execute("SELECT 1 FROM studies WHERE study_id = ?", (study_id,)).fetchone():
                raise KeyError(f"There is no study {study_id}.")
            for table in of_trials.split():
                db.execute(f"DELETE FROM trial_{table} WHERE trial_id IN ({trials})", (study_id,))
            for table in of_study.split():
                db.execute(f"DELETE FROM {table} WHERE study_id = ?", (study_id,))

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute. Raises KeyError."""
        self._set_study_attribute("study_user", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's. Raises KeyError."""
        self._set_study_attribute("study_system", study_id, key, value)

    def _set_study_attribute(self, kind: str, study_id: int, key: str, value: Any) -> None:
        self.get_study_name_from_id(study_id)
        with self.file.write() as db:
            set_attribute(db, kind, study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Raises KeyError."""
        rows = self.file.read("SELECT study_id FROM studies WHERE study_name = ?", (study_name,))
        if not rows:
            raise KeyError(f"There is no study {study_name!r}.")
        return int(rows[0][0])

    def get_study_name_from_id(self, study_id: int) -> str:
        """Raises KeyError."""
        return self._get_study(study_id).study_name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Raises KeyError."""
        return self._get_study(study_id).directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Raises KeyError."""
        return self._get_study(study_id).user_attrs

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Raises KeyError."""
        return self._get_study(study_id).system_attrs

    def _get_study(self, study_id: int) -> FrozenStudy:
        for study in self.get_all_studies():
            if study._study_id == study_id:
                return study
        raise KeyError(f"There is no study {study_id}.")

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies of the file, in order."""
        rows = self.file.read(
            "SELECT 0, study_id, 0, study_name, NULL FROM studies "
            "UNION ALL SELECT 1, study_id, objective, direction, NULL FROM study_directions "
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


def new_trial(now: datetime) -> FrozenTrial:
    return FrozenTrial(
        number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, datetime_start=now,
        datetime_complete=None, params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={},
    )  # fmt: skip


def insert_trial(db: sqlite3.Connection, study_id: int, trial: FrozenTrial) -> int:
    times = (to_text(trial.datetime_start), to_text(trial.datetime_complete))
    cursor = db.execute(
        "INSERT INTO trials (study_id, number, state, datetime_start, datetime_complete) "
        "VALUES (?, ?, ?, ?, ?)",
        (study_id, trial.number, trial.state.name, *times),
    )
    trial_id = int(cursor.lastrowid or 0)
    for name, distribution in trial.distributions.items():
        value = distribution.to_internal_repr(trial.params[name])
        db.execute(SET_PARAM, (trial_id, name, value, distribution_to_json(distribution)))
    for step, report in trial.intermediate_values.items():
        db.execute(SET_REPORT, (trial_id, step, *to_stored(report)))
    for key, attribute in trial.user_attrs.items():
        set_attribute(db, "trial_user", trial_id, key, attribute)
    for key, attribute in trial.system_attrs.items():
        set_attribute(db, "trial_system", trial_id, key, attribute)
    set_values(db, trial_id, trial.values)
    return trial_id


def set_values(db: sqlite3.Connection, trial_id: int, values: Sequence[float] | None) -> None:
    for objective, value in enumerate(values or ()):
        db.execute(SET_VALUE, (trial_id, objective, *to_stored(value)))


def finish(db: sqlite3.Connection, trial_id: int, state: TrialState) -> datetime:
    now = datetime.now()
    db.execute(
        "UPDATE trials SET state = ?, datetime_complete = ? WHERE trial_id = ?",
        (state.name, to_text(now), trial_id),
    )
    db.execute("DELETE FROM leases WHERE trial_id = ?", (trial_id,))
    return now


def set_attribute(db: sqlite3.Connection, kind: str, row_id: int, key: str, value: Any) -> None:
    column = "trial_id" if kind.startswith("trial") else "study_id"
    db.execute(SET_ATTRIBUTE.format(kind=kind, id=column), (row_id, key, json.dumps(value)))


def to_stored(value: float) -> tuple[float | None, str]:
    """Return a float as Optuna stores it: SQLite itself has neither NaN nor infinity."""
    value = float(value)
    if math.isfinite(value):
        return value, "FINITE"
    return None, "NAN" if math.isnan(value) else "INF_POS" if value > 0 else "INF_NEG"


def to_text(local: datetime | None) -> str | None:
    """Return a local time as Optuna 5 stores it: UTC, without a zone."""
    if local is None:
        return None
    return local.astimezone(timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")
