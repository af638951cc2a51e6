"""The trials that this process runs: how they are claimed, changed, returned and finished.

A claim gives a lease (leases.py).  Each write here renews it and checks it in the same transaction:
a worker that was taken for dead, and whose trial another one has, can write no more.

Short epochs share a transaction: a report, or an attribute of the sampler's or the pruner's, that
comes less than `wait` seconds after the trial's last write stays in memory until then, and a thread
writes it; any other write of the trial, its end and its return among them, takes it along.  So it
is in the file `wait` seconds later at most, and at once where epochs are longer.
"""

from __future__ import annotations

import copy
import json
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
)
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hpo.study import tables
from hpo.study.cache import BY_ID, TrialCache, parse_distribution, read_trial
from hpo.study.engines import LOCK, Engine, Transaction
from hpo.study.leases import LeaseLost, Leases
from hpo.study.optuna_private import trial_id as id_of
from hpo.study.optuna_private import with_trial_id
from hpo.words import to_json

COPIED = ("params", "distributions", "user_attrs", "system_attrs", "intermediate_values")


@dataclass
class _Held:
    """A trial as it is now, and the statements that are not yet in the file."""

    study_id: int
    trial: FrozenTrial
    reports: int  # that it had when it was claimed
    wait: float  # seconds that they may wait
    unwritten: dict[tuple[str, Any], tuple[str, Sequence[Any]]] = field(default_factory=dict)
    written: float = field(default_factory=time.monotonic)  # when, the last time
    later: bool = False  # whether a thread is about to write them
    pid: int = field(default_factory=os.getpid)  # a forked child has no such thread


class HeldTrials:
    """This worker's trials, in memory and in the file."""

    def __init__(
        self,
        file: Engine,
        leases: Leases,
        worker: str,
        caches: dict[int, TrialCache],
        wait: float = 0.0,
    ) -> None:
        self._file, self._leases, self._worker, self._caches = file, leases, worker, caches
        self._wait = wait  # seconds
        self._held: dict[int, _Held] = {}
        self._distributions: dict[tuple[int, str], BaseDistribution] = {}

    def add(self, db: Transaction, study_id: int, trial: FrozenTrial, mine: bool) -> None:
        """Insert a trial, and take its lease if it is this worker's."""
        with_trial_id(trial, tables.insert_trial(db, study_id, trial))
        if mine:
            self._leases.take(db, id_of(trial))

    def hold(self, study_id: int, trial: FrozenTrial) -> None:
        """Keep a trial in memory whose transaction has ended well."""
        reports = len(trial.intermediate_values)
        self._held[id_of(trial)] = _Held(study_id, trial, reports, self._wait)
        if study_id in self._caches:
            self._caches[study_id].expire()

    def claim(self, trial_id: int) -> bool:
        """Take a waiting trial, with its lease; False if somebody else was faster.

        Raises KeyError; UpdateFinishedTrialError if it is finished.
        """
        state = "SELECT state, study_id FROM trials WHERE trial_id = ?"
        if not (rows := self._file.read(state, (trial_id,))):
            raise KeyError(f"There is no trial {trial_id}.")
        if rows[0][0] == "WAITING":  # otherwise do not even ask for the lock
            with LOCK:
                with self._file.write() as db:
                    claimed = db.execute(
                        "UPDATE trials SET state = 'RUNNING', datetime_start = ? "
                        "WHERE trial_id = ? AND state = 'WAITING'",
                        (tables.to_text(datetime.now()), trial_id),
                    ).rowcount
                    if claimed:
                        self._leases.take(db, trial_id)
                if claimed:
                    self.hold(rows[0][1], read_trial(self._file, trial_id))
                    return True
        if TrialState[rows[0][0]].is_finished():
            raise UpdateFinishedTrialError(f"Trial {trial_id} is finished: it cannot be changed.")
        return False

    # ---- writes ----------------------------------------------------------------------------

    def _begin_change(self, db: Transaction, trial_id: int) -> None:
        """Check the right to change a trial, renew its lease, and write what waits.

        A trial without a lease (stock Optuna's) may be changed by everybody until it is finished.
        Raises LeaseLost, UpdateFinishedTrialError, or KeyError when there is no such trial.
        """
        if self._leases.renew(db, trial_id):
            held = self._held.get(trial_id)
            for sql, args in (held.unwritten if held else {}).values():
                db.execute(sql, args)
            return
        self._file.lock(db, "trials", trial_id)
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
    def _change(self, trial_id: int, **changes: Any) -> Iterator[Transaction]:
        """Give one transaction; then note in memory what it wrote."""
        with LOCK:
            with self._file.write() as db:
                self._begin_change(db, trial_id)
                yield db
            if (held := self._held.get(trial_id)) is None:
                return
            held.unwritten, held.written = {}, time.monotonic()
            if cache := self._caches.get(held.study_id):
                cache.ignore_own_write()
            self._note(held, **changes)

    def _note(self, held: _Held, **changes: Any) -> None:
        held.trial = copy.copy(held.trial)  # readers keep the old one
        for name, entries in changes.items():
            setattr(held.trial, name, {**getattr(held.trial, name), **entries})

    @contextmanager
    def _last_change(self, trial_id: int) -> Iterator[Transaction]:
        """Give one transaction after which the trial is no longer held, nor if it was lost."""
        with LOCK:
            try:
                with self._file.write() as db:
                    self._begin_change(db, trial_id)
                    yield db
            except LeaseLost:
                self._held.pop(trial_id, None)
                raise
            held = self._held.pop(trial_id, None)
            if held and (cache := self._caches.get(held.study_id)):
                cache.expire()

    def renew(self, trial_id: int, idle: float = 0.0) -> None:
        """Renew the lease, and write what waits; see StudyStorage.renew_lease."""
        held = self._held.get(trial_id)
        if held is None or time.monotonic() - held.written >= idle:
            with self._change(trial_id):
                pass

    def set_report(self, trial_id: int, step: int, value: float) -> None:
        """Write an intermediate value, now or with what comes later."""
        args = (trial_id, tables.fitting(step, self._file), *tables.to_stored(value))
        change = {"intermediate_values": {step: float(value)}}
        self._set(trial_id, ("report", step), tables.SET_REPORT, args, change)

    def set_attribute(self, kind: str, trial_id: int, key: str, value: Any) -> None:
        """Write a user attribute; a system attribute, now or with what comes later."""
        sql = tables.SET_ATTRIBUTE.format(kind=f"trial_{kind}", id="trial_id")
        text = to_json(value)
        change = {f"{kind}_attrs": {key: json.loads(text)}}  # as every reader will see it
        self._set(trial_id, (kind, key), sql, (trial_id, key, text), change)

    def _set(
        self,
        trial_id: int,
        what: tuple[str, Any],
        sql: str,
        args: Sequence[Any],
        change: dict[str, Any],
    ) -> None:
        with LOCK:
            held = self._held.get(trial_id)
            if held and what[0] != "user" and self._may_wait(held):
                held.unwritten[what] = (sql, args)
                self._note(held, **change)
                return
            with self._change(trial_id, **change) as db:
                db.execute(sql, args)

    def _may_wait(self, held: _Held) -> bool:
        """Whether the trial was written a moment ago; then a thread will write what follows."""
        left = held.written + held.wait - time.monotonic()
        if left <= 0 or held.pid != os.getpid():
            return False
        if not held.later:
            held.later = True
            thread = threading.Timer(left, self._write_later, (held,))
            thread.daemon = True
            thread.start()
        return True

    def _write_later(self, held: _Held) -> None:
        with LOCK:
            held.later = False
            if held.unwritten and self._held.get(id_of(held.trial)) is held:
                # If it fails, the worker's next write does, too: that one can say so.
                with suppress(UpdateFinishedTrialError, StorageInternalError):
                    self.renew(id_of(held.trial))

    def write_at_once(self, trial_id: int) -> None:
        """Let nothing of a trial wait from now on. Raises LeaseLost."""
        with LOCK:
            if (held := self._held.get(trial_id)) is not None:
                held.wait = 0.0
                if held.unwritten:
                    self.renew(trial_id)

    def waiting_reports(self, trial_id: int) -> dict[int, float]:
        """Return the reports of a trial that are in memory alone, by their step."""
        held = self._held.get(trial_id)
        steps = [step for kind, step in held.unwritten if kind == "report"] if held else []
        return {step: held.trial.intermediate_values[step] for step in steps} if held else {}

    def patience(self, study_id: int) -> float:
        """Return how old, in seconds, what the pruner is told of a study's trials may be."""
        return max((held.wait for held in self._held.values() if held.later), default=0.0)

    def set_param(
        self, trial_id: int, name: str, value: float, distribution: BaseDistribution
    ) -> None:
        """Set a parameter; of a trial held here, it is written with the next report."""
        distribution = parse_distribution(distribution_to_json(distribution))
        with LOCK:
            held = self._held.get(trial_id)
            if held is not None:
                self._check_distribution(held.study_id, name, distribution)
                if name not in held.trial.params:
                    args = (trial_id, name, value, distribution_to_json(distribution))
                    held.unwritten["param", name] = (tables.SET_PARAM, args)
                    trial = held.trial = copy.copy(held.trial)
                    trial.params = {**trial.params, name: distribution.to_external_repr(value)}
                    trial.distributions = {**trial.distributions, name: distribution}
                return
            with self._file.write() as db:
                self._begin_change(db, trial_id)
                study = "SELECT study_id FROM trials WHERE trial_id = ?"
                (study_id,) = db.execute(study, (trial_id,)).fetchone()
                self._check_distribution(study_id, name, distribution)
                text = distribution_to_json(distribution)
                db.execute(tables.SET_PARAM, (trial_id, name, value, text))

    def _check_distribution(self, study_id: int, name: str, distribution: BaseDistribution) -> None:
        if (study_id, name) not in self._distributions:
            rows = self._file.read(
                "SELECT distribution_json FROM trials JOIN trial_params USING (trial_id) "
                "WHERE study_id = ? AND param_name = ? LIMIT 1",
                (study_id, name),
            )
            first = parse_distribution(rows[0][0]) if rows else distribution
            self._distributions[study_id, name] = first
        check_distribution_compatibility(self._distributions[study_id, name], distribution)

    def ids(self) -> list[int]:
        """Return the ids of the trials that are held here."""
        return list(self._held)

    def give_back(self, trial_id: int, *, excused: bool, crashed: bool = False) -> TrialState:
        """Return a trial to the queue, or fail it if it comes back too often. Raises LeaseLost."""
        held = self._held.get(trial_id)
        advanced = held is None or len(held.trial.intermediate_values) > held.reports
        with self._last_change(trial_id) as db:
            return self._leases.give_back(
                db, trial_id, crashed=crashed, advanced=advanced or excused
            )

    def finish(self, trial_id: int, state: TrialState, values: Sequence[float] | None) -> None:
        """Write the last values and the state. Raises LeaseLost."""
        with LOCK:
            held = self._held.get(trial_id)
            with self._last_change(trial_id) as db:
                tables.set_values(db, trial_id, values)
                if self._worker:
                    tables.set_attribute(db, "trial_user", trial_id, "worker", self._worker)
                now = tables.finish(db, trial_id, state)
            if held is not None and (cache := self._caches.get(held.study_id)):
                cache.finish(self._as_finished(held.trial, state, values, now))

    def _as_finished(
        self, running: FrozenTrial, state: TrialState, values: Sequence[float] | None, now: datetime
    ) -> FrozenTrial:
        """Return the trial as it now is in the file: it need not be read."""
        trial = copy.copy(running)
        trial.state, trial.datetime_complete = state, now
        trial.values = None if values is None else [float(value) for value in values]
        if self._worker:
            trial.user_attrs = {**trial.user_attrs, "worker": self._worker}
        return trial

    # ---- reads -----------------------------------------------------------------------------

    def get(self, trial_id: int) -> FrozenTrial | None:
        """Return a copy of a trial that is held here: optuna.Trial writes into what it is given."""
        if (held := self._held.get(trial_id)) is None:
            return None
        trial = copy.copy(held.trial)
        for name in COPIED:
            setattr(trial, name, dict(getattr(trial, name)))
        return trial

    def lay_over(self, trials: list[FrozenTrial]) -> None:
        """Replace what was read of the trials that are held here by what they are now."""
        for trial_id, held in self._held.items():
            i = bisect_left(trials, trial_id, key=BY_ID)
            here = trials[i] if i < len(trials) else None
            if here and (id_of(here), here.state) == (trial_id, TrialState.RUNNING):
                trials[i] = held.trial
