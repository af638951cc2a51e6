"""An Optuna storage for many workers on one SQLite file: each trial is run once, to its end.

The tables are Optuna's own, so stock Optuna, its dashboard or a stock worker may open the same
file at any time. What differs from Optuna's own SQLite storage:

* One transaction per event, and the parameters of a trial go with its first report: 6 commits
  for a trial with 8 parameters and 4 reports, in place of 23.
* Incremental reads (trial_cache.py): finished trials are kept in memory, and what has changed is
  one SELECT, or none while nobody has written.
* Atomic claims: study.ask() takes a waiting trial, or makes a new one up to `total_trials`.
* Leases: a claim gives the right to report and to finish; every write renews it, and checks it in
  the same transaction. A lease that is no longer renewed is taken back (leases.py): the trial
  returns to the queue with its parameters and intermediate values, and its former holder can
  write no more.
"""

from __future__ import annotations

import copy
import json
import os
import sqlite3
from bisect import bisect_left
from collections.abc import Collection, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hpo import study_tables as tables
from hpo.leases import Leases
from hpo.study_file import LOCK, StudyFile
from hpo.trial_cache import ALL, BY_ID, TrialCache, read_trial

RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING


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


class SQLiteStorage(tables.Studies):
    """Optuna's storage on one SQLite file, shared by many workers.

    `owner` names this worker, for people (an unforgeable suffix is added). `job_id` is the Slurm
    job that it belongs to, "" for none. `total_trials` is the number of trials the study ends
    with, None for no limit. `grace` is in seconds: a lease that has not moved for so long, on the
    observer's own clock, is stale. After `max_attempts` crashes a trial is FAIL. `timeout` is in
    seconds: how long to wait for the file's lock. Finished trials get `label`, if there is one, as
    their user attribute `worker`.
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
        label: str = "",
    ) -> None:
        self.file = StudyFile(path, timeout)
        self.total_trials = total_trials
        self._label = label
        self._leases = Leases(owner, job_id, grace, max_attempts)
        self._forget()

    def _forget(self) -> None:
        self._held: dict[int, _Held] = {}
        self._caches: dict[int, TrialCache] = {}
        self._distributions: dict[tuple[int, str], BaseDistribution] = {}

    def __getstate__(self) -> dict[str, Any]:
        mine = ("_held", "_caches", "_distributions")  # a copy elsewhere reads for itself
        return {name: value for name, value in self.__dict__.items() if name not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def remove_session(self) -> None:
        """Close the connection to the file; the next use opens another."""
        self.file.close()

    def backup(self, target: str | os.PathLike[str], max_age: float = 60.0) -> bool:
        """Copy the study's file unless the copy is younger than that; see StudyFile.backup."""
        return self.file.backup(target, max_age)

    # ---- claim, renew, return --------------------------------------------------------------

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial; without a template it is this worker's, with a lease.

        The trials are counted in the same transaction: raises NoTrialLeft instead of going over
        `total_trials`, whatever else happens at the same time. Raises KeyError without a study.
        """
        if self.total_trials is not None and study_id in self._caches:
            self._check_budget(self._caches[study_id].count())  # no need to ask for the lock
        trial = copy.deepcopy(template_trial) or tables.new_trial(datetime.now())
        with LOCK:
            with self.file.write() as db:
                trial.number = self._next_number(db, study_id)
                trial._trial_id = tables.insert_trial(db, study_id, trial)
                if template_trial is None:
                    self._leases.take(db, trial._trial_id)
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
        self._check_budget(row[0])
        return int(row[0])

    def _check_budget(self, trials: int) -> None:
        if self.total_trials is not None and trials >= self.total_trials:
            raise NoTrialLeft(f"The study has its {self.total_trials} trials.")

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
                        (tables.to_text(datetime.now()), trial_id),
                    ).rowcount
                    if claimed:
                        self._leases.take(db, trial_id)
                if claimed:
                    self._held[trial_id] = _Held(rows[0][1], read_trial(self.file, trial_id))
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
        with self._last_change(trial_id) as db:
            return self._leases.give_back(db, trial_id, crashed)

    def return_stale_trials(
        self, study_id: int, *, alive_jobs: Collection[str] | None = None
    ) -> list[int]:
        """Return the trials of dead workers to the queue; call it a few times per grace period.

        A worker is dead when its lease has not moved for `grace` seconds, or at once when
        `alive_jobs` is given and its job is not in it. That counts as a crash of the trial, which
        is FAIL after `max_attempts` of them. Returns the numbers of the trials, also of those.
        """
        stale = self._leases.find_stale(self.file, study_id, alive_jobs)
        return [lease.number for lease in stale if self._leases.take_back(self.file, lease)]

    def return_predecessors_trials(self, study_id: int) -> list[int]:
        """Return the trials of an earlier process of this worker in its job, as not crashed.

        Only for who knows that the process has ended, and that it was asked to. Returns their
        numbers.
        """
        leases = self._leases.find_predecessors(self.file, study_id)
        return [lease.number for lease in leases if self._leases.take_back(self.file, lease, False)]

    def count_leases(self, study_id: int) -> int:
        """Return how many trials of the study are running under a lease, here or elsewhere."""
        return self._leases.count(self.file, study_id)

    # ---- writes of the trial's holder ------------------------------------------------------

    def _begin_change(self, db: sqlite3.Connection, trial_id: int) -> None:
        """Check the right to change a trial, renew its lease, and write what waits.

        A trial without a lease (stock Optuna's) may be changed by everybody until it is finished.
        Raises LeaseLost, UpdateFinishedTrialError, or KeyError when there is no such trial.
        """
        if self._leases.renew(db, trial_id):
            held = self._held.get(trial_id)
            for name, (value, distribution) in (held.unwritten if held else {}).items():
                db.execute(
                    tables.SET_PARAM, (trial_id, name, value, distribution_to_json(distribution))
                )
            return
        row = db.execute(
            "SELECT state, number, owner, leases.trial_id FROM trials LEFT JOIN leases "
            "USING (trial_id) WHERE trials.trial_id = ?",
            (trial_id,),
        ).fetchone()
        if row is None:
            raise KeyError(f"There is no trial {trial_id}.")
        state, number, owner, leased = row
        if leased or trial_id in self._held:
            by = f"held by {owner}" if owner else f"now {state}"
            raise LeaseLost(f"Trial {number} is no longer this worker's: it is {by}.")
        if TrialState[state].is_finished():
            raise UpdateFinishedTrialError(f"Trial {number} is finished: it cannot be changed.")

    @contextmanager
    def _last_change(self, trial_id: int) -> Iterator[sqlite3.Connection]:
        """Give one transaction after which the trial is no longer held, nor if it was lost."""
        with LOCK:
            try:
                with self.file.write() as db:
                    self._begin_change(db, trial_id)
                    yield db
            except LeaseLost:
                self._held.pop(trial_id, None)
                raise
            self._held.pop(trial_id, None)

    def _written(self, trial_id: int, **changes: Any) -> None:
        """Note in memory what the last transaction wrote (to a copy: readers keep the old one)."""
        if (held := self._held.get(trial_id)) is None:
            return
        held.unwritten = {}
        if cache := self._caches.get(held.study_id):
            cache.ignore_own_write()
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
                db.execute(tables.SET_PARAM, (trial_id, param_name, param_value_internal, text))

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
                db.execute(
                    tables.SET_REPORT, (trial_id, step, *tables.to_stored(intermediate_value))
                )
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
                tables.set_attribute(db, f"trial_{kind}", trial_id, key, value)
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
            held = self._held.get(trial_id)
            with self._last_change(trial_id) as db:
                tables.set_values(db, trial_id, values)
                if state == WAITING:
                    self._leases.give_back(db, trial_id, crashed=False)
                    return True
                if self._label:
                    tables.set_attribute(db, "trial_user", trial_id, "worker", self._label)
                now = tables.finish(db, trial_id, state)
            if held is not None and (cache := self._caches.get(held.study_id)):
                cache.finish(self._as_finished(held.trial, state, values, now))
        return True

    def _as_finished(
        self,
        running: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
        now: datetime,
    ) -> FrozenTrial:
        """Return the trial as it now is in the file: it need not be read."""
        trial = copy.copy(running)
        trial.state, trial.datetime_complete = state, now
        trial.values = None if values is None else [float(value) for value in values]
        if self._label:
            trial.user_attrs = {**trial.user_attrs, "worker": self._label}
        return trial

    def delete_study(self, study_id: int) -> None:
        """Delete a study and its trials. Raises KeyError."""
        super().delete_study(study_id)
        self._forget()  # SQLite may use the ids again

    # ---- reads -----------------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial: from memory if it is finished or held here. Raises KeyError."""
        with LOCK:
            if (held := self._held.get(trial_id)) is None:
                for cache in self._caches.values():
                    if trial_id in cache.finished:
                        return cache.finished[trial_id]
                return read_trial(self.file, trial_id)
            trial = copy.copy(held.trial)  # optuna.Trial writes into what it is given
            trial.params, trial.distributions = dict(trial.params), dict(trial.distributions)
            trial.user_attrs, trial.system_attrs = dict(trial.user_attrs), dict(trial.system_attrs)
            trial.intermediate_values = dict(trial.intermediate_values)
            return trial

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of a study in these states, in order. Raises KeyError."""
        with LOCK:
            # Out of the dictionary while it changes: if a signal's exception comes in between,
            # the next call reads anew.
            cache = self._caches.pop(study_id, None) or TrialCache(study_id)
            wanted = tuple(state for state in ALL if states is None or state in states)
            trials = cache.read(self.file, wanted)
            self._caches[study_id] = cache
            for trial_id, held in self._held.items():
                i = bisect_left(trials, trial_id, key=BY_ID)
                if i < len(trials) and (trials[i]._trial_id, trials[i].state) == (
                    trial_id,
                    RUNNING,
                ):
                    trials[i] = held.trial
        return copy.deepcopy(trials) if deepcopy else trials
