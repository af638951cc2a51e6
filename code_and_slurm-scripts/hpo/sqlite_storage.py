"""An Optuna storage for many workers on one SQLite file: each trial is run once, to its end.

The tables are Optuna's own, so stock Optuna, its dashboard or a stock worker may open the same
file at any time. What differs from Optuna's own SQLite storage:

* One transaction per event, and the parameters of a trial go with its first report: 6 commits
  for a trial with 8 parameters and 4 reports, in place of 23.
* Incremental reads: finished trials are kept in memory, and what changed is one SELECT.
* Atomic claims: study.ask() takes a waiting trial, or makes a new one up to `total_trials`.
* Leases: a claim gives the right to report and to finish; every write renews it and checks it in
  the same transaction. A lease that is no longer renewed is taken back, the trial returns to the
  queue with its parameters and intermediate values, and its former holder can write no more.
"""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import sqlite3
import time
import uuid
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from operator import attrgetter
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import DuplicatedStudyError, OptunaError, UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from hpo.study_file import LOCK, StudyFile

RUNNING, WAITING, FAIL = TrialState.RUNNING, TrialState.WAITING, TrialState.FAIL
FINISHED = tuple(state for state in TrialState if state.is_finished())
parse_distribution = lru_cache(maxsize=4096)(json_to_distribution)

# All there is to know about some trials, as rows (kind, trial, position, …), in one statement:
# so it is one consistent picture under one shared lock.
READ_TRIALS = """
WITH picked AS (SELECT * FROM trials WHERE {which}),
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
UNION ALL SELECT 6, study_id, 0, NULL, NULL, NULL FROM studies WHERE study_id = {study_id}
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
TAKE_LEASE = """INSERT INTO leases (trial_id, owner, job_id, host, counter, attempts)
VALUES (?, ?, ?, ?, 0, 0) ON CONFLICT (trial_id) DO UPDATE SET owner = excluded.owner,
    job_id = excluded.job_id, host = excluded.host, counter = counter + 1"""
RENEW_LEASE = """UPDATE leases SET counter = counter + 1 WHERE trial_id = ? AND owner = ?
AND EXISTS (SELECT 1 FROM trials WHERE trial_id = leases.trial_id AND state = 'RUNNING')"""


class NoTrialLeft(OptunaError):
    """The study has all of its trials; some of them may still be running elsewhere."""


class LeaseLost(UpdateFinishedTrialError):
    """The trial is no longer this worker's: it was returned to the queue, or finished elsewhere.

    Nothing was written, and nothing more can be: drop the trial.
    """


@dataclass
class _Held:
    """A trial that this process runs: as it is now, and the parameters not yet in the file."""

    study_id: int
    trial: FrozenTrial
    unwritten: dict[str, tuple[float, BaseDistribution]] = field(default_factory=dict)


@dataclass
class _Known:
    """What this process has read of a study; the finished trials never change."""

    finished: dict[int, FrozenTrial] = field(default_factory=dict)
    unfinished: set[int] = field(default_factory=set)
    last: int = -1  # the highest trial id seen


@dataclass
class _Watched:
    """Another worker's lease as last seen, and for how many seconds it has not moved."""

    lease: tuple[str, int]
    looked: float
    still: float = 0.0


class SQLiteStorage(BaseStorage):
    """Optuna's storage on one SQLite file, shared by many workers.

    `owner` names this worker, for people (an unforgeable suffix is added). `job_id` is the Slurm
    job that it belongs to, "" for none. `total_trials` is the number of trials the study ends
    with, None for no limit. `grace` is in seconds: a lease that has not moved for so long, on the
    observer's own clock, is stale. After `max_attempts` crashes a trial is FAIL. `timeout` is in
    seconds: how long to wait for the file's lock.
    Raises hpo.study_file.StudyFileError (CorruptStudy, StudyBusy, DiskFull).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        owner: str,
        job_id: str = "",
        total_trials: int | None = None,
        grace: float = 60.0,
        max_attempts: int = 3,
        timeout: float = 60.0,
    ) -> None:
        self.file = StudyFile(path, timeout)
        self.owner = f"{owner}/{uuid.uuid4().hex[:12]}"
        self.job_id, self.total_trials = job_id, total_trials
        self.grace, self.max_attempts = grace, max_attempts
        self._forget()

    def _forget(self) -> None:
        self._held: dict[int, _Held] = {}
        self._known: dict[int, _Known] = {}
        self._watched: dict[int, _Watched] = {}
        self._distributions: dict[tuple[int, str], BaseDistribution] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for name in ("_held", "_known", "_watched", "_distributions"):
            del state[name]  # a copy in another process reads for itself
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def remove_session(self) -> None:
        """Close the connection to the file; the next use opens another."""
        self.file.close()

    # ---- claim, renew, return --------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial; without a template it is this worker's, with a lease.

        The trials are counted in the same transaction: raises NoTrialLeft instead of going over
        `total_trials`, whatever else happens at the same time. Raises KeyError without a study.
        """
        known = self._known.get(study_id, _Known())
        if self.total_trials is not None:
            if len(known.finished) + len(known.unfinished) >= self.total_trials:
                raise NoTrialLeft(f"The study has its {self.total_trials} trials.")  # no lock
        now = datetime.now()
        trial = copy.deepcopy(template_trial) or _new_trial(now)
        with LOCK:
            with self.file.write() as db:
                trial.number = self._next_number(db, study_id)
                trial._trial_id = _insert_trial(db, study_id, trial)
                if template_trial is None:
                    self._take_lease(db, trial._trial_id)
            if template_trial is None:
                self._held[trial._trial_id] = _Held(study_id, trial)
        return trial._trial_id

    def _next_number(self, db: sqlite3.Connection, study_id: int) -> int:
        row = db.execute(
            "SELECT (SELECT count(*) FROM trials t WHERE t.study_id = s.study_id) "
            "FROM studies s WHERE study_id = ?",
            (study_id,),
        ).fetchone()
        if row is None:
            raise KeyError(f"There is no study {study_id}.")
        if self.total_trials is not None and row[0] >= self.total_trials:
            raise NoTrialLeft(f"The study has its {self.total_trials} trials.")
        return int(row[0])

    def _take_lease(self, db: sqlite3.Connection, trial_id: int) -> None:
        host = socket.gethostname()
        db.execute(TAKE_LEASE, (trial_id, self.owner, self.job_id, host))

    def _claim(self, trial_id: int) -> bool:
        """Take a waiting trial, with its lease; False if somebody else was faster."""
        state = "SELECT state, study_id FROM trials WHERE trial_id = ?"
        if not (rows := self.file.read(state, (trial_id,))):
            raise KeyError(f"There is no trial {trial_id}.")
        if rows[0][0] == "WAITING":  # otherwise do not even ask for the lock
            with LOCK:
                with self.file.write() as db:
                    claimed = db.execute(
                        "UPDATE trials SET state = 'RUNNING', datetime_start = ? "
                        "WHERE trial_id = ? AND state = 'WAITING'",
                        (_to_text(datetime.now()), trial_id),
                    ).rowcount
                    if claimed:
                        self._take_lease(db, trial_id)
                if claimed:
                    self._held[trial_id] = _Held(rows[0][1], self._read_trial(trial_id))
                    return True
        self.check_trial_is_updatable(trial_id, TrialState[rows[0][0]])
        return False

    def renew_lease(self, trial_id: int) -> None:
        """Say that the trial is alive, and write its parameters if they wait for a report.

        Call it from a thread several times per grace period. Raises LeaseLost.
        """
        with LOCK:
            with self.file.write() as db:
                self._begin_change(db, trial_id)
            self._written(trial_id)

    def return_trial(self, trial_id: int, *, crashed: bool) -> TrialState:
        """Give this worker's trial back: WAITING, with its parameters and intermediate values.

        After `max_attempts` crashes it is FAIL instead. Returns its new state. Raises LeaseLost.
        """
        with LOCK:
            with self.file.write() as db:
                self._begin_change(db, trial_id)
                state = self._give_back(db, trial_id, crashed)
            self._held.pop(trial_id, None)
        return state

    def return_stale_trials(
        self, study_id: int, *, alive_jobs: Collection[str] | None = None
    ) -> list[int]:
        """Return the trials of dead workers, as crashed; call it a few times per grace period.

        A lease is stale when its counter has not moved for `grace` seconds of this host's
        monotonic clock (clocks of different hosts are never compared), or at once when
        `alive_jobs` is given and its job is not in it. Returns the numbers of the trials.
        """
        leases = self.file.read(
            "SELECT trial_id, number, owner, counter, job_id FROM leases JOIN trials "
            "USING (trial_id) WHERE study_id = ? AND state = 'RUNNING' AND owner <> ?",
            (study_id, self.owner),
        )
        stale = []
        with LOCK:
            before, self._watched = self._watched, {}
            for trial_id, number, owner, counter, job_id in leases:
                watched = self._watch(trial_id, (owner, counter), before.get(trial_id))
                gone = alive_jobs is not None and job_id and job_id not in alive_jobs
                if gone or watched.still >= self.grace:
                    stale.append((trial_id, number, owner, counter))
        return [number for trial_id, number, *lease in stale if self._take_back(trial_id, *lease)]

    def _watch(self, trial_id: int, lease: tuple[str, int], before: _Watched | None) -> _Watched:
        now = time.monotonic()
        watched = _Watched(lease, now)
        if before is not None and before.lease == lease:
            # A gap in which this observer itself was stopped (a suspended host, a file system
            # that hangs) counts half a grace at most: then the others may have been, too.
            watched.still = before.still + min(now - before.looked, self.grace / 2)
        self._watched[trial_id] = watched
        return watched

    def _take_back(self, trial_id: int, owner: str, counter: int) -> bool:
        with self.file.write() as db:
            still_so = db.execute(
                "UPDATE leases SET owner = NULL WHERE trial_id = ? AND owner = ? AND counter = ? "
                "AND EXISTS (SELECT 1 FROM trials t WHERE t.trial_id = leases.trial_id "
                "AND state = 'RUNNING')",
                (trial_id, owner, counter),
            ).rowcount
            if still_so:
                self._give_back(db, trial_id, crashed=True)
        return bool(still_so)

    def _give_back(self, db: sqlite3.Connection, trial_id: int, crashed: bool) -> TrialState:
        db.execute(
            "UPDATE leases SET owner = NULL, attempts = attempts + ? WHERE trial_id = ?",
            (int(crashed), trial_id),
        )
        attempts, host, job_id = db.execute(
            "SELECT attempts, host, job_id FROM leases WHERE trial_id = ?", (trial_id,)
        ).fetchone()
        if not crashed or attempts < self.max_attempts:
            db.execute("UPDATE trials SET state = 'WAITING' WHERE trial_id = ?", (trial_id,))
            return WAITING
        reason = f"crashed {attempts} times, the last time on {host}"
        reason += f" in job {job_id}" if job_id else ""
        _set_attribute(db, "trial_user", trial_id, "fail_reason", reason)
        _finish(db, trial_id, FAIL)
        return FAIL

    # ---- writes of the trial's holder ------------------------------------------------------

    def _begin_change(self, db: sqlite3.Connection, trial_id: int) -> None:
        """Check the right to change a trial, renew its lease, and write what waits.

        A trial without a lease (stock Optuna's) may be changed by everybody until it is finished.
        Raises LeaseLost, UpdateFinishedTrialError, or KeyError when there is no such trial.
        """
        if db.execute(RENEW_LEASE, (trial_id, self.owner)).rowcount:
            held = self._held.get(trial_id)
            for name, (value, distribution) in (held.unwritten if held else {}).items():
                db.execute(SET_PARAM, (trial_id, name, value, distribution_to_json(distribution)))
            return
        row = db.execute(
            "SELECT state, number, owner, leases.trial_id FROM trials LEFT JOIN leases "
            "USING (trial_id) WHERE trials.trial_id = ?",
            (trial_id,),
        ).fetchone()
        if row is None:
            raise KeyError(f"There is no trial {trial_id}.")
        state, number, owner, leased = row
        if self._held.pop(trial_id, None) or leased:
            by = f"held by {owner}" if owner else f"now {state}"
            raise LeaseLost(f"Trial {number} is no longer this worker's: it is {by}.")
        if TrialState[state].is_finished():
            raise UpdateFinishedTrialError(f"Trial {number} is finished: it cannot be changed.")

    def _written(self, trial_id: int, **changes: Any) -> None:
        """Note in memory what the last transaction wrote (to a copy: readers keep the old one)."""
        if (held := self._held.get(trial_id)) is None:
            return
        held.unwritten = {}
        held.trial = copy.copy(held.trial)
        for name, entries in changes.items():
            setattr(held.trial, name, {**getattr(held.trial, name), **entries})

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter; of a trial held here, it is written with the next report.

        If the process dies before, the trial returns without it and draws another.
        Raises ValueError for a distribution that does not fit the study's.
        """
        with LOCK:
            held = self._held.get(trial_id)
            if held is not None:
                self._check_distribution(held.study_id, param_name, distribution)
                if param_name not in held.trial.params:
                    value = distribution.to_external_repr(param_value_internal)
                    held.unwritten[param_name] = (param_value_internal, distribution)
                    trial = held.trial = copy.copy(held.trial)
                    trial.params = {**trial.params, param_name: value}
                    trial.distributions = {**trial.distributions, param_name: distribution}
                return
            with self.file.write() as db:
                self._begin_change(db, trial_id)
                study = "SELECT study_id FROM trials WHERE trial_id = ?"
                (study_id,) = db.execute(study, (trial_id,)).fetchone()
                self._check_distribution(study_id, param_name, distribution)
                text = distribution_to_json(distribution)
                db.execute(SET_PARAM, (trial_id, param_name, param_value_internal, text))

    def _check_distribution(self, study_id: int, name: str, distribution: BaseDistribution) -> None:
        if (study_id, name) not in self._distributions:
            rows = self.file.read(
                "SELECT distribution_json FROM trials JOIN trial_params USING (trial_id) "
                "WHERE study_id = ? AND param_name = ? LIMIT 1",
                (study_id, name),
            )
            first = json_to_distribution(rows[0][0]) if rows else distribution
            self._distributions[study_id, name] = first
        check_distribution_compatibility(self._distributions[study_id, name], distribution)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Report a value. Raises LeaseLost, UpdateFinishedTrialError, KeyError."""
        with LOCK:
            with self.file.write() as db:
                self._begin_change(db, trial_id)
                db.execute(SET_REPORT, (trial_id, step, *_to_stored(intermediate_value)))
            self._written(trial_id, intermediate_values={step: float(intermediate_value)})

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute. Raises LeaseLost, UpdateFinishedTrialError, KeyError."""
        self._set_trial_attribute("user", trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's. Raises LeaseLost, UpdateFinishedTrialError, KeyError."""
        self._set_trial_attribute("system", trial_id, key, value)

    def _set_trial_attribute(self, kind: str, trial_id: int, key: str, value: Any) -> None:
        with LOCK:
            with self.file.write() as db:
                self._begin_change(db, trial_id)
                _set_attribute(db, f"trial_{kind}", trial_id, key, value)
            self._written(trial_id, **{f"{kind}_attrs": {key: json.loads(json.dumps(value))}})

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Claim (RUNNING; False if it was not waiting), return (WAITING) or finish a trial.

        Raises LeaseLost, UpdateFinishedTrialError, KeyError.
        """
        if state == RUNNING:
            return self._claim(trial_id)
        with LOCK:
            with self.file.write() as db:
                self._begin_change(db, trial_id)
                _set_values(db, trial_id, values)
                if state == WAITING:
                    free = "UPDATE leases SET owner = NULL WHERE trial_id = ?"
                    db.execute(free, (trial_id,))
                    db.execute("UPDATE trials SET state = ? WHERE trial_id = ?", (WAITING.name, trial_id))
                else:
                    _finish(db, trial_id, state)
            self._held.pop(trial_id, None)
        return True

    # ---- reads -----------------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial: from memory if it is finished or held here. Raises KeyError."""
        with LOCK:
            for known in self._known.values():
                if trial_id in known.finished:
                    return known.finished[trial_id]
            if (held := self._held.get(trial_id)) is None:
                return self._read_trial(trial_id)
            trial = copy.copy(held.trial)  # optuna.Trial writes into what it is given
            trial.params, trial.distributions = dict(trial.params), dict(trial.distributions)
            trial.user_attrs, trial.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
            trial.intermediate_values = dict(trial.intermediate_values)
            return trial

    def _read_trial(self, trial_id: int) -> FrozenTrial:
        states = ",".join(f"'{state.name}'" for state in TrialState)
        rows = self.file.read(
            READ_TRIALS.format(which=f"trial_id = {trial_id:d}", states=states, study_id=-1)
        )
        if not rows:
            raise KeyError(f"There is no trial {trial_id}.")
        return _build_trials(rows)[trial_id]

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of a study in these states, in order. Raises KeyError."""
        with LOCK:
            known = self._known.get(study_id, _Known())
            wanted = [state for state in TrialState if states is None or state in states]
            trials = self._read_changes(study_id, known, wanted)
            self._known[study_id] = known
            if states is None:
                trials += known.finished.values()
            elif any(state in FINISHED for state in wanted):
                trials += [trial for trial in known.finished.values() if trial.state in wanted]
        trials.sort(key=attrgetter("_trial_id"))
        return copy.deepcopy(trials) if deepcopy else trials

    def _read_changes(
        self, study_id: int, known: _Known, wanted: list[TrialState]
    ) -> list[FrozenTrial]:
        """Read what can have changed; keep what is finished, return the wanted rest."""
        ids = ",".join(map(str, known.unfinished))
        full = ",".join(f"'{state.name}'" for state in {*wanted, *FINISHED})
        which = f"study_id = {study_id:d} AND (trial_id > {known.last} OR trial_id IN ({ids}))"
        rows = self.file.read(READ_TRIALS.format(which=which, states=full, study_id=study_id))
        if not rows:
            raise KeyError(f"There is no study {study_id}.")
        unfinished = []
        for trial_id, trial in _build_trials(rows).items():
            known.last = max(known.last, trial_id)
            if trial.state.is_finished():
                known.finished[trial_id] = trial
                known.unfinished.discard(trial_id)
            else:
                known.unfinished.add(trial_id)
                if trial.state in wanted:
                    held = self._held.get(trial_id)
                    unfinished.append(held.trial if held else trial)
        return unfinished

    # ---- studies ---------------------------------------------------------------------------

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
                    "INSERT INTO study_directions (study_id, objective, direction) VALUES (?, ?, ?)",
                    [(study_id, i, direction.name) for i, direction in enumerate(directions)],
                )
        except sqlite3.IntegrityError:
            raise DuplicatedStudyError(f"There is already a study {name!r}.") from None
        return study_id

    def delete_study(self, study_id: int) -> None:
        """Delete a study and its trials. Raises KeyError."""
        trials = "SELECT trial_id FROM trials WHERE study_id = ?"
        with LOCK:
            with self.file.write() as db:
                for table in ("params", "values", "intermediate_values", "heartbeats",
                              "user_attributes", "system_attributes"):  # fmt: skip
                    db.execute(f"DELETE FROM trial_{table} WHERE trial_id IN ({trials})", (study_id,))
                for table in ("trials", "study_directions", "study_user_attributes",
                              "study_system_attributes"):  # fmt: skip
                    db.execute(f"DELETE FROM {table} WHERE study_id = ?", (study_id,))
                found = db.execute("DELETE FROM studies WHERE study_id = ?", (study_id,)).rowcount
            self._forget()  # SQLite may use the ids again
        if not found:
            raise KeyError(f"There is no study {study_id}.")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute. Raises KeyError."""
        self._set_study_attribute("study_user", study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's. Raises KeyError."""
        self._set_study_attribute("study_system", study_id, key, value)

    def _set_study_attribute(self, kind: str, study_id: int, key: str, value: Any) -> None:
        self.get_study_name_from_id(study_id)
        with self.file.write() as db:
            _set_attribute(db, kind, study_id, key, value)

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
        found: dict[int, tuple[str, list[StudyDirection], dict[str, Any], dict[str, Any]]] = {}
        for kind, study_id, _, text, value in rows:
            if kind == 0:
                found[study_id] = (text, [], {}, {})
            elif kind == 1:
                found[study_id][1].append(StudyDirection[text])
            else:
                found[study_id][kind][text] = json.loads(value)  # type: ignore[call-overload]
        return [
            FrozenStudy(name, None, user, system, study_id, directions=directions)
            for study_id, (name, directions, user, system) in found.items()
        ]


# ---- rows ----------------------------------------------------------------------------------


def _new_trial(now: datetime) -> FrozenTrial:
    return FrozenTrial(
        number=-1, trial_id=-1, state=RUNNING, value=None, datetime_start=now,
        datetime_complete=None, params={}, distributions={}, user_attrs={}, system_attrs={},
        intermediate_values={},
    )  # fmt: skip


def _insert_trial(db: sqlite3.Connection, study_id: int, trial: FrozenTrial) -> int:
    times = (_to_text(trial.datetime_start), _to_text(trial.datetime_complete))
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
        db.execute(SET_REPORT, (trial_id, step, *_to_stored(report)))
    for key, attribute in trial.user_attrs.items():
        _set_attribute(db, "trial_user", trial_id, key, attribute)
    for key, attribute in trial.system_attrs.items():
        _set_attribute(db, "trial_system", trial_id, key, attribute)
    _set_values(db, trial_id, trial.values)
    return trial_id


def _set_values(db: sqlite3.Connection, trial_id: int, values: Sequence[float] | None) -> None:
    for objective, value in enumerate(values or ()):
        db.execute(SET_VALUE, (trial_id, objective, *_to_stored(value)))


def _finish(db: sqlite3.Connection, trial_id: int, state: TrialState) -> None:
    db.execute(
        "UPDATE trials SET state = ?, datetime_complete = ? WHERE trial_id = ?",
        (state.name, _to_text(datetime.now()), trial_id),
    )
    db.execute("DELETE FROM leases WHERE trial_id = ?", (trial_id,))


def _set_attribute(
    db: sqlite3.Connection, kind: str, row_id: int, key: str, value: Any
) -> None:
    column = "trial_id" if kind.startswith("trial") else "study_id"
    db.execute(SET_ATTRIBUTE.format(kind=kind, id=column), (row_id, key, json.dumps(value)))


def _build_trials(rows: list[tuple[Any, ...]]) -> dict[int, FrozenTrial]:
    """Make trials of the rows of READ_TRIALS."""
    found: dict[int, dict[str, Any]] = {}
    for kind, trial_id, position, a, b, c in rows:
        if kind == 0:
            found[trial_id] = {
                "number": position, "trial_id": trial_id, "state": TrialState[a],
                "datetime_start": _to_time(b), "datetime_complete": _to_time(c), "params": {},
                "distributions": {}, "values": [], "intermediate_values": {}, "user_attrs": {},
                "system_attrs": {},
            }  # fmt: skip
        elif kind == 1:
            distribution = found[trial_id]["distributions"][a] = parse_distribution(c)
            found[trial_id]["params"][a] = distribution.to_external_repr(b)
        elif kind == 2:
            found[trial_id]["values"].append(_to_float(a, b))
        elif kind == 3:
            found[trial_id]["intermediate_values"][position] = _to_float(a, b)
        elif kind in (4, 5):
            found[trial_id]["user_attrs" if kind == 4 else "system_attrs"][a] = json.loads(b)
    return {
        trial_id: FrozenTrial(value=None, **{**fields, "values": fields["values"] or None})
        for trial_id, fields in found.items()
    }


def _to_stored(value: float) -> tuple[float | None, str]:
    """Return a float as Optuna stores it: SQLite itself has neither NaN nor infinity."""
    value = float(value)
    if math.isfinite(value):
        return value, "FINITE"
    return None, "NAN" if math.isnan(value) else "INF_POS" if value > 0 else "INF_NEG"


def _to_float(value: float | None, kind: str) -> float:
    special = {"NAN": math.nan, "INF_POS": math.inf, "INF_NEG": -math.inf}
    return special[kind] if value is None else value


def _to_text(local: datetime | None) -> str | None:
    """Return a local time as Optuna 5 stores it: UTC, without a zone."""
    if local is None:
        return None
    return local.astimezone(timezone.utc).replace(tzinfo=None).isoformat(" ", "microseconds")


def _to_time(text: str | None) -> datetime | None:
    if text is None:
        return None
    utc = datetime.fromisoformat(text).replace(tzinfo=timezone.utc)
    return utc.astimezone().replace(tzinfo=None)
