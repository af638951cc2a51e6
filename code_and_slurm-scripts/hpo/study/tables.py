"""Optuna's tables: how trials are written to them, as plain SQL.

What is the same whoever asks is here. Whose trial it is, and who may write, is in held.py; how
trials are read, in cache.py; what is about studies, in studies.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.trial import FrozenTrial, TrialState

from hpo.study.engines import Engine, Transaction
from hpo.words import to_json

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


def new_trial(now: datetime) -> FrozenTrial:
    return FrozenTrial(
        number=-1, trial_id=-1, state=TrialState.RUNNING, value=None, datetime_start=now,
        datetime_complete=None, params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={},
    )  # fmt: skip


def insert_trial(db: Transaction, study_id: int, trial: FrozenTrial) -> int:
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


def set_values(db: Transaction, trial_id: int, values: Sequence[float] | None) -> None:
    for objective, value in enumerate(values or ()):
        db.execute(SET_VALUE, (trial_id, objective, *to_stored(value)))


def finish(db: Transaction, trial_id: int, state: TrialState) -> datetime:
    now = datetime.now()
    db.execute(
        "UPDATE trials SET state = ?, datetime_complete = ? WHERE trial_id = ?",
        (state.name, to_text(now), trial_id),
    )
    db.execute("DELETE FROM leases WHERE trial_id = ?", (trial_id,))
    return now


def set_attribute(db: Transaction, kind: str, row_id: int, key: str, value: Any) -> None:
    column = "trial_id" if kind.startswith("trial") else "study_id"
    db.execute(SET_ATTRIBUTE.format(kind=kind, id=column), (row_id, key, to_json(value)))


def to_stored(value: float) -> tuple[float | None, str]:
    """Return a float as Optuna stores it: SQLite itself has neither NaN nor infinity."""
    value = float(value)
    if math.isfinite(value):
        return value, "FINITE"
    return None, "NAN" if math.isnan(value) else "INF_POS" if value > 0 else "INF_NEG"


def fitting(step: int, engine: Engine) -> int:
    """Return the step of a report.  Raises ValueError if the database could not hold it."""
    if step > engine.largest_step:
        raise ValueError(f"the step {step} of a report is too large: at most {engine.largest_step}")
    return step


def to_text(local: datetime | None) -> str | None:
    """Return a local time as Optuna 5 stores it: UTC, without a zone."""
    if local is None:
        return None
    return local.astimezone(timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")
