"""Optuna's tables: how studies and trials stand in them, read and written as plain SQL.

What is the same whoever asks is here: all that concerns studies, trials as rows, and the memory
of what was read. Whose trial it is, and who may write, is in sqlite_storage.py.
"""

from __future__ import annotations

import json
import math
import sqlite3
import sys
import uuid
from bisect import insort
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import lru_cache
from operator import attrgetter
from typing import Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.study_file import StudyFile

ALL = tuple(TrialState)
FINISHED = tuple(state for state in TrialState if state.is_finished())
BY_ID = attrgetter("_trial_id")
# Most trials have the same few distributions: parse each text once.
parse_distribution = lru_cache(maxsize=4096)(json_to_distribution)

# All there is to know about some trials, as rows (kind, trial, position, …), in one statement:
# so it is one consistent picture under one shared lock. Its text is nearly always the same, so
# that sqlite3 finds it prepared; the + keeps SQLite from the index on study_id, which is all rows.
READ_TRIALS = """
WITH picked AS (SELECT * FROM trials WHERE trial_id > ? AND +study_id = ?
                UNION ALL SELECT * FROM trials WHERE trial_id IN ({marks})),
     full AS (SELECT trial_id FROM picked WHERE state IN ({states}))
SELECT 0, trial_id, number, state, datetime_start, datetime_complete FROM picked
UNION ALL SELECT 1, trial_id, param_id, param_name, param_value, distribution_json
    FROM trial_params WHERE trial_id IN full
UNION ALL SELECT 2, trial_id, objective, value, value_type, NULL
    FROM trial_values WHERE trial_id IN full
UNION ALL SELECT 3, trial_id, step, intermediate_value, intermediate_value_type, NULL
    FROM trial_intermediate_values WHERE trial_id IN full
UNION ALL SELECT 4, trial_id, trial_user_attribute_id, key, value_json, NULL
    FROM trial_user_attributes WHERE trial_id IN full
UNION ALL SELECT 5, trial_id, trial_system_attribute_id, key, value_json, NULL
    FROM trial_system_attributes WHERE trial_id IN full
UNION ALL SELECT 6, study_id, 0, NULL, NULL, NULL FROM studies WHERE study_id = ?
ORDER BY 1, 2, 3
"""
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


class TrialCache:
    """What this process has read of a study's trials. Those that are finished never change."""

    def __init__(self, study_id: int) -> None:
        self.study_id = study_id
        self.finished: dict[int, FrozenTrial] = {}
        self._unfinished: set[int] = set()
        self._last = -1  # the highest trial id seen
        # The finished trials in some states, in order; pruners ask for the same after each report.
        self._selected: dict[tuple[TrialState, ...], list[FrozenTrial]] = {}

    def count(self) -> int:
        """Return how many trials the study has, as far as they were read."""
        return len(self.finished) + len(self._unfinished)

    def read(self, file: StudyFile, states: tuple[TrialState, ...]) -> list[FrozenTrial]:
        """Read what can have changed; return the trials in `states`, in order.

        Raises KeyError if there is no such study.
        """
        full = [state for state in TrialState if state in states or state in FINISHED]
        rows = read_rows(file, full, list(self._unfinished), self._last, self.study_id)
        if not rows:
            raise KeyError(f"There is no study {self.study_id}.")
        changed = build_trials(rows)
        for trial_id, trial in changed.items():
            if trial.state.is_finished():
                self._finish(trial)
            else:
                self._unfinished.add(trial_id)
            self._last = max(self._last, trial_id)
        if states not in self._selected:
            finished = sorted(self.finished.values(), key=BY_ID)
            self._selected[states] = [trial for trial in finished if trial.state in states]
        trials = self._selected[states].copy()
        for trial in changed.values():
            if trial.state in states and not trial.state.is_finished():
                insort(trials, trial, key=BY_ID)
        return trials

    def _finish(self, trial: FrozenTrial) -> None:
        self._unfinished.discard(trial._trial_id)
        if trial._trial_id in self.finished:
            return
        self.finished[trial._trial_id] = trial
        for states, trials in self._selected.items():
            if trial.state in states:
                insort(trials, trial, key=BY_ID)


def read_rows(
    file: StudyFile,
    states: Sequence[TrialState],
    trial_ids: list[int],
    after: int = sys.maxsize,
    study_id: int = -1,
) -> list[tuple[Any, ...]]:
    """Return these trials and those of a study `after` an id; in full if in these states."""
    if len(trial_ids) > 10_000:  # too many to be named in SQL: read the study anew
        trial_ids, after = [], -1
    names = ",".join(f"'{state.name}'" for state in states)
    ids = trial_ids + [-1] * ((1 << len(trial_ids).bit_length()) - len(trial_ids))
    sql = READ_TRIALS.format(marks=",".join("?" * len(ids)), states=names)
    return file.read(sql, (after, study_id, *ids, study_id))


def read_trial(file: StudyFile, trial_id: int) -> FrozenTrial:
    """Return one trial. Raises KeyError."""
    rows = read_rows(file, ALL, [trial_id])
    if not rows:
        raise KeyError(f"There is no trial {trial_id}.")
    return build_trials(rows)[trial_id]


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


def finish(db: sqlite3.Connection, trial_id: int, state: TrialState) -> None:
    db.execute(
        "UPDATE trials SET state = ?, datetime_complete = ? WHERE trial_id = ?",
        (state.name, to_text(datetime.now()), trial_id),
    )
    db.execute("DELETE FROM leases WHERE trial_id = ?", (trial_id,))


def set_attribute(db: sqlite3.Connection, kind: str, row_id: int, key: str, value: Any) -> None:
    column = "trial_id" if kind.startswith("trial") else "study_id"
    db.execute(SET_ATTRIBUTE.format(kind=kind, id=column), (row_id, key, json.dumps(value)))


def build_trials(rows: list[tuple[Any, ...]]) -> dict[int, FrozenTrial]:
    """Make trials of the rows of READ_TRIALS."""
    found: dict[int, dict[str, Any]] = {}
    for kind, trial_id, position, a, b, c in rows:
        if kind == 0:
            found[trial_id] = {
                "number": position, "trial_id": trial_id, "state": TrialState[a],
                "datetime_start": to_time(b), "datetime_complete": to_time(c), "params": {},
                "distributions": {}, "values": [], "intermediate_values": {}, "user_attrs": {},
                "system_attrs": {},
            }  # fmt: skip
        elif kind == 1:
            distribution = found[trial_id]["distributions"][a] = parse_distribution(c)
            found[trial_id]["params"][a] = distribution.to_external_repr(b)
        elif kind == 2:
            found[trial_id]["values"].append(to_float(a, b))
        elif kind == 3:
            found[trial_id]["intermediate_values"][position] = to_float(a, b)
        elif kind in (4, 5):
            found[trial_id]["user_attrs" if kind == 4 else "system_attrs"][a] = json.loads(b)
    return {
        trial_id: FrozenTrial(value=None, **{**fields, "values": fields["values"] or None})
        for trial_id, fields in found.items()
    }


def to_stored(value: float) -> tuple[float | None, str]:
    """Return a float as Optuna stores it: SQLite itself has neither NaN nor infinity."""
    value = float(value)
    if math.isfinite(value):
        return value, "FINITE"
    return None, "NAN" if math.isnan(value) else "INF_POS" if value > 0 else "INF_NEG"


def to_float(value: float | None, kind: str) -> float:
    special = {"NAN": math.nan, "INF_POS": math.inf, "INF_NEG": -math.inf}
    return special[kind] if value is None else value


def to_text(local: datetime | None) -> str | None:
    """Return a local time as Optuna 5 stores it: UTC, without a zone."""
    if local is None:
        return None
    return local.astimezone(timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")


def to_time(text: str | None) -> datetime | None:
    if text is None:
        return None
    utc = datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
    return utc.astimezone().replace(tzinfo=None)
