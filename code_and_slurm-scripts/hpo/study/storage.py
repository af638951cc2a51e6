"""An Optuna storage for many workers on one database: each trial is run once, to its end.

The tables are Optuna's own, so stock Optuna, its dashboard or a stock worker may use them at the
same time. What differs from Optuna's own storage of databases, whatever the engine (engines/):

* One transaction per event, or for several within a second (held.py): 2 commits for a trial with
  8 parameters and 4 reports of short epochs, 6 with longer ones, in place of 23.
* Incremental reads (cache.py): finished trials are kept in memory, and what has changed is
  one SELECT, or with SQLite none while nobody has written.
* Atomic claims: study.ask() takes a waiting trial, or makes a new one up to `total_trials`.
* Leases: a claim gives the right to report and to finish; every write renews it, and checks it in
  the same transaction (held.py). A lease that is no longer renewed is taken back (leases.py): the
  trial returns to the queue with its parameters and intermediate values, and its former holder
  can write no more.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Container, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.settings import Settings
from hpo.study import tables
from hpo.study.cache import ALL, TrialCache, read_trial
from hpo.study.engines import LOCK, Engine, Transaction
from hpo.study.engines.sqlite_file import StudyFile
from hpo.study.held import HeldTrials
from hpo.study.leases import LeaseLost, Leases, NoTrialLeft, retry_failed
from hpo.study.optuna_private import FrozenStudy
from hpo.study.optuna_private import trial_id as id_of
from hpo.study.studies import Studies, next_number

__all__ = ["LeaseLost", "NoTrialLeft", "StudyStorage"]


class StudyStorage(BaseStorage):
    """Optuna's storage on one database, shared by many workers: an engine, or an SQLite file.

    `worker` names this worker, for people; finished trials get it as their user attribute
    `worker`, if there is one. `token` tells this process from all others; by default a new one.
    `job_id` is the Slurm job that it belongs to, "" for none. `total_trials` is the number of
    trials the study ends with, None for no limit. `grace` is in seconds: a lease that has not
    moved for so long, on the observer's own clock, is stale. After `max_attempts` crashes, or
    returns without a new report, a trial is FAIL. `timeout` is in seconds: how long to wait for
    the file's lock. A `readonly` one is for who may look, but not write. `wait` is in seconds:
    how long a report may wait in memory for other writes of its trial (held.py).
    Raises hpo.study.engines.EngineError.
    """

    WAIT = 1.0  # seconds, of a worker

    def __init__(
        self,
        place: str | os.PathLike[str] | Engine,
        *,
        worker: str = "",
        token: str = "",
        job_id: str = "",
        total_trials: int | None = None,
        grace: float = 60.0,
        max_attempts: int = 3,
        timeout: float = 60.0,
        readonly: bool = False,
        wait: float = 0.0,
    ) -> None:
        if isinstance(place, (str, os.PathLike)):
            place = StudyFile(place, timeout, readonly)
        self.file: Engine = place
        self.total_trials = total_trials
        self._worker, self._wait = worker, wait
        self._leases = Leases(worker, token, job_id, grace, max_attempts)
        self._studies = Studies(self.file)
        self._forget()

    @classmethod
    def of(
        cls, settings: Settings, place: Path | Engine, worker: str, readonly: bool = False
    ) -> StudyStorage:
        """Return the storage of one worker of a job."""
        return cls(
            place,
            worker=worker,
            token=settings.token,
            job_id=settings.job_id,
            total_trials=settings.total_trials,
            grace=settings.lease_grace,
            max_attempts=settings.max_attempts,
            readonly=readonly,
            wait=cls.WAIT,
        )

    def _forget(self) -> None:
        self._caches: dict[int, TrialCache] = {}
        self._held = HeldTrials(self.file, self._leases, self._worker, self._caches, self._wait)

    def __getstate__(self) -> dict[str, Any]:
        # A copy elsewhere reads for itself.
        return {k: v for k, v in self.__dict__.items() if k not in ("_held", "_caches")}

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
        if study_id in self._caches:
            self._check_budget(self._caches[study_id].count())  # no need to ask for the lock
        mine, trial = template_trial is None, copy.deepcopy(template_trial)
        trial = trial or tables.new_trial(datetime.now())
        with LOCK:
            with self.file.write() as db:
                trial.number = self._next_number(db, study_id)
                self._held.add(db, study_id, trial, mine)
            if mine:
                self._held.hold(study_id, trial)
            elif study_id in self._caches:
                self._caches[study_id].expire()
        return id_of(trial)

    def _next_number(self, db: Transaction, study_id: int) -> int:
        self.file.lock(db, "studies", study_id)
        number = next_number(db, study_id)
        self._check_budget(number)
        return number

    def _check_budget(self, trials: int) -> None:
        if self.total_trials is not None and trials >= self.total_trials:
            raise NoTrialLeft(f"The study has its {self.total_trials} trials.")

    def renew_lease(self, trial_id: int, idle: float = 0.0) -> None:
        """Say that the trial is alive, and write what waits of it.

        Not if it was written less than `idle` seconds ago. Raises LeaseLost.
        """
        self._held.renew(trial_id, idle)

    def return_trial(
        self, trial_id: int, *, excused: bool = False, crashed: bool = False
    ) -> TrialState:
        """Give this worker's trial back: WAITING, with its parameters and reports.

        FAIL instead, after `max_attempts` attempts without a new report that are not `excused`:
        the site's fault.  Returns its new state. Raises LeaseLost.
        """
        return self._held.give_back(trial_id, excused=excused, crashed=crashed)

    def return_held(self) -> None:
        """Give all of this worker's trials back: its sampler has failed before they began."""
        for number in self._held.ids():
            with suppress(LeaseLost):
                self.return_trial(number, excused=True)

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

    def return_trials_of(self, study_id: int, token: str, *, crashed: bool) -> list[int]:
        """Return the trials of the process with that token, which has ended: its parent knows.

        Returns their numbers.
        """
        own = self._leases.find_owned(self.file, study_id, token)
        return [lease.number for lease in own if self._leases.take_back(self.file, lease, crashed)]

    def retry_failed(self, study_id: int) -> list[int]:
        """Put the trials that are FAIL back into the queue; return their numbers.

        They keep their number, parameters and reports, and lose their reason.
        """
        numbers = retry_failed(self.file, study_id)
        self._caches.pop(study_id, None)  # it takes finished trials for unchanging
        return numbers

    def count_leases(self, study_id: int) -> int:
        """Return how many trials of the study are running under a lease, here or elsewhere."""
        return len(self.owners(study_id))

    def owners(self, study_id: int) -> dict[int, str]:
        """Return the names of the workers that run a trial, by the trial's number."""
        leases = self._leases.held(self.file, study_id)
        return {lease.number: lease.owner.split("/")[0] for lease in leases}

    # ---- writes of the trial's holder ------------------------------------------------------

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
        self._held.set_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        """Report a value. Raises LeaseLost, UpdateFinishedTrialError, KeyError."""
        self._held.set_report(trial_id, step, intermediate_value)

    def write_at_once(self, trial_id: int) -> None:
        """Let no report wait from now on: another program's files must not be ahead of them."""
        self._held.write_at_once(trial_id)

    def waiting_reports(self, trial_id: int) -> dict[int, float]:
        """Return the reports of a trial that are in memory alone, by their step."""
        return self._held.waiting_reports(trial_id)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute. Raises LeaseLost, UpdateFinishedTrialError, KeyError."""
        self._held.set_attribute("user", trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's. Raises LeaseLost, UpdateFinishedTrialError, KeyError."""
        self._held.set_attribute("system", trial_id, key, value)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """Claim (RUNNING; False if it was not waiting), return (WAITING) or finish a trial.

        Raises LeaseLost, UpdateFinishedTrialError, KeyError.
        """
        if state == TrialState.RUNNING:
            return self._held.claim(trial_id)
        if state == TrialState.WAITING:
            self.return_trial(trial_id)
        else:
            self._held.finish(trial_id, state, values)
        return True

    # ---- reads -----------------------------------------------------------------------------

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial: from memory if it is finished or held here. Raises KeyError."""
        with LOCK:
            if (held := self._held.get(trial_id)) is not None:
                return held
            for cache in self._caches.values():
                if trial_id in cache.finished:
                    return cache.finished[trial_id]
            return read_trial(self.file, trial_id)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """Return the trials of a study in these states, in order. Raises KeyError."""
        with LOCK:
            # Out of the dictionary while it changes: after a signal's exception it is read anew.
            cache = self._caches.pop(study_id, None) or TrialCache(study_id)
            wanted = tuple(state for state in ALL if states is None or state in states)
            trials = cache.read(self.file, wanted, self._held.patience(study_id))
            self._caches[study_id] = cache
            self._held.lay_over(trials)
        return copy.deepcopy(trials) if deepcopy else trials

    # ---- studies ---------------------------------------------------------------------------

    def create_new_study(
        self, directions: Sequence[StudyDirection], study_name: str | None = None
    ) -> int:
        """Add a study and return its id. Raises DuplicatedStudyError."""
        return self._studies.create(directions, study_name)

    def delete_study(self, study_id: int) -> None:
        """Delete a study and its trials. Raises KeyError."""
        self._studies.delete(study_id)
        self._forget()  # SQLite may use the ids again

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute. Raises KeyError."""
        self._studies.set_attribute("study_user", study_id, key, value)

    def set_study_user_attr_once(self, study_id: int, key: str, value: Any) -> None:
        """Set a user attribute unless it is there, in one transaction."""
        self._studies.set_once(study_id, key, value)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Set an attribute of Optuna's. Raises KeyError."""
        self._studies.set_attribute("study_system", study_id, key, value)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of a study. Raises KeyError."""
        return self._studies.id_of(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return the name of a study. Raises KeyError."""
        return self._studies.get(study_id).study_name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return the directions of its objectives. Raises KeyError."""
        return self._studies.get(study_id).directions

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return its user attributes. Raises KeyError."""
        return self._studies.get(study_id).user_attrs

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return Optuna's own attributes of it. Raises KeyError."""
        return self._studies.get(study_id).system_attrs

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies of the file, in order."""
        return self._studies.all()
