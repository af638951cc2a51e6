"""Leases: who may report and finish a trial, and when a dead worker's trial is taken back.

A lease is a row beside Optuna's tables (the engine makes the table). A claim writes it, every
write of the holder moves its counter, and a thread of the worker does so between reports. Whoever
sees a counter stand still for `grace` seconds of his own monotonic clock takes the trial back:
clocks of different hosts are never compared. `owner` is the worker's name, for people, and behind
a slash the token of its process. It is NULL while the trial waits in the queue; the row, and with
it the number of attempts that came to nothing, goes when the trial is finished.
"""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import TrialState

from hpo.study import tables as tables
from hpo.study.engines import LOCK, Engine, Transaction

TAKE = """INSERT INTO leases (trial_id, owner, job_id, host, counter, attempts)
VALUES (?, ?, ?, ?, 0, 0) ON CONFLICT (trial_id) DO UPDATE SET owner = excluded.owner,
    job_id = excluded.job_id, host = excluded.host, counter = leases.counter + 1"""
RENEW = """UPDATE leases SET counter = counter + 1 WHERE trial_id = ? AND owner = ?
AND EXISTS (SELECT 1 FROM trials t WHERE t.trial_id = leases.trial_id AND state = 'RUNNING')"""
STOP = f"{RENEW} AND counter = ?"
FREE = "UPDATE leases SET owner = NULL, attempts = attempts + ? WHERE trial_id = ?"
# CROSS JOIN: first the leases, which are few, and SQLite goes through no list of all trials.
RUNNING = """SELECT leases.trial_id, number, owner, counter, job_id FROM leases CROSS JOIN trials
WHERE trials.trial_id = leases.trial_id AND study_id = ? AND state = 'RUNNING'
AND owner IS NOT NULL"""


ROWS = """SELECT number, owner, job_id, host, counter, attempts FROM leases
JOIN trials USING (trial_id) WHERE study_id = ?"""
INSERT = """INSERT INTO leases (trial_id, owner, job_id, host, counter, attempts)
VALUES (?, ?, ?, ?, ?, ?)"""
NOBODYS = ("nobody/copied", "", "", 0, 0)


class NoTrialLeft(OptunaError, KeyError):
    """The study has all of its trials; some of them may still be running elsewhere.

    A KeyError, because Optuna's gRPC server hands on no other one of a new trial.
    """


class LeaseLost(UpdateFinishedTrialError):
    """The trial is no longer this worker's: it was returned to the queue, or finished elsewhere.

    Nothing was written, and nothing more can be: drop the trial.
    """


def rows(file: Engine, study_id: int) -> dict[int, tuple[Any, ...]]:
    """Return all leases of a study by the trial's number, for a copy."""
    if not file.has_leases:
        return {}
    return {number: tuple(row) for number, *row in file.read(ROWS, (study_id,))}


def insert(db: Transaction, trial_id: int, state: TrialState, row: tuple[Any, ...] | None) -> None:
    """Insert the lease of a copied trial: one that runs without one would do so for ever."""
    if row or state == TrialState.RUNNING:
        db.execute(INSERT, (trial_id, *(row or NOBODYS)))


def has_ended(job: str, mine: str, alive_jobs: Collection[str] | None) -> bool:
    """Whether a job, "12@ann" or "12.1@ann" after a requeue, is known to be over.

    `alive_jobs` are the numbers that Slurm has shown to job `mine`: those of its own user, so that
    nothing is known of anybody else's job, nor by who is in none.
    """
    number, _, user = job.partition("@")
    my_number, _, me = mine.partition("@")
    if alive_jobs is None or job in ("", mine) or user != me:
        return False
    number, my_number = number.split(".")[0], my_number.split(".")[0]
    return number not in alive_jobs or number == my_number


class Lease(NamedTuple):
    """Another worker's lease as it was read; if it is still so, nobody has renewed it."""

    trial_id: int
    number: int
    owner: str
    counter: int


@dataclass
class _Watched:
    lease: Lease
    looked: float  # this host's monotonic clock, in seconds
    still: float = 0.0  # for how long the counter has not moved


class Leases:
    """One worker's leases, and its watch over those of the others; see StudyStorage."""

    def __init__(
        self, worker: str, token: str, job_id: str, grace: float, max_attempts: int
    ) -> None:
        # The token tells this process from an earlier one on the same GPU.
        self.owner = f"{worker}/{token or uuid.uuid4().hex[:12]}"
        self.job_id, self.grace, self.max_attempts = job_id, grace, max_attempts
        self._watched: dict[int, _Watched] = {}

    def take(self, db: Transaction, trial_id: int) -> None:
        """Make the trial this worker's; the caller has just made or claimed it."""
        db.execute(TAKE, (trial_id, self.owner, self.job_id, socket.gethostname()))

    def renew(self, db: Transaction, trial_id: int) -> bool:
        """Move the counter; False if the trial is not, or is no longer, this worker's."""
        return bool(db.execute(RENEW, (trial_id, self.owner)).rowcount)

    def give_back(
        self, db: Transaction, trial_id: int, *, crashed: bool, advanced: bool = False
    ) -> TrialState:
        """Return a trial to the queue; or fail it, if too many attempts came to nothing.

        Such an attempt has crashed, or has not advanced by one report.
        """
        db.execute(FREE, (int(crashed or not advanced), trial_id))
        sql = "SELECT attempts, host, job_id FROM leases WHERE trial_id = ?"
        row = db.execute(sql, (trial_id,)).fetchone()
        attempts, host, job_id = row or (0, "", "")  # no row: stock Optuna's trial
        if attempts < self.max_attempts or (advanced and not crashed):
            db.execute("UPDATE trials SET state = 'WAITING' WHERE trial_id = ?", (trial_id,))
            return TrialState.WAITING
        what = "crashed" if crashed else "came back without one new epoch"
        reason = f"{what} {attempts} times, the last time on {host}"
        reason += f" in job {job_id.partition('@')[0]}" if job_id else ""
        if not crashed:
            reason += ": does an epoch take longer than the job? Report more often, or --time"
        tables.set_attribute(db, "trial_user", trial_id, "fail_reason", reason)
        tables.finish(db, trial_id, TrialState.FAIL)
        return TrialState.FAIL

    def held(self, file: Engine, study_id: int) -> list[Lease]:
        """Return the leases of a study that somebody holds."""
        if not file.has_leases:  # stock Optuna's study, looked at by who may not write
            return []
        return [Lease(*row) for *row, _ in file.read(RUNNING, (study_id,))]

    def find_owned(self, file: Engine, study_id: int, token: str) -> list[Lease]:
        """Return the leases of the process with that token."""
        return [x for x in self.held(file, study_id) if x.owner.rpartition("/")[2] == token]

    def find_stale(
        self, file: Engine, study_id: int, alive_jobs: Collection[str] | None
    ) -> list[Lease]:
        """Look at all leases of a study once, and return those that nobody renews any more."""
        with LOCK:
            before, self._watched = self._watched, {}
            stale = []
            for *row, job_id in file.read(RUNNING, (study_id,)):
                lease = Lease(*row)
                watched = self._watch(lease, before.get(lease.trial_id))
                if has_ended(job_id, self.job_id, alive_jobs) or watched.still >= self.grace:
                    stale.append(lease)
        return stale

    def _watch(self, lease: Lease, before: _Watched | None) -> _Watched:
        watched = self._watched[lease.trial_id] = _Watched(lease, time.monotonic())
        if before is not None and before.lease == lease:
            # A gap in which this observer itself was stopped (a suspended host, a file system
            # that hangs) counts half a grace at most: then the others may have been, too.
            watched.still = before.still + min(watched.looked - before.looked, self.grace / 2)
        return watched

    def take_back(self, file: Engine, lease: Lease, crashed: bool = True) -> bool:
        """Return a dead worker's trial; False if it has moved since it was read.

        A worker that was ended (`crashed` is false) may have come far: that is no lost attempt.
        """
        with file.write() as db:
            if not db.execute(STOP, (lease.trial_id, lease.owner, lease.counter)).rowcount:
                return False
            self.give_back(db, lease.trial_id, crashed=crashed, advanced=not crashed)
            return True


def retry_failed(file: Engine, study_id: int) -> list[int]:
    """Make all FAIL trials of a study WAITING; return their numbers."""
    failed = "SELECT trial_id FROM trials WHERE study_id = ? AND state = 'FAIL'"
    with file.write() as db:
        file.lock(db, "studies", study_id)
        rows = db.execute(f"SELECT number FROM trials WHERE trial_id IN ({failed})", (study_id,))
        numbers = [int(number) for (number,) in rows]
        db.execute(
            "DELETE FROM trial_user_attributes WHERE key IN ('fail_reason', 'worker') "
            f"AND trial_id IN ({failed})",
            (study_id,),
        )
        db.execute(
            "UPDATE trials SET state = 'WAITING', datetime_complete = NULL "
            f"WHERE trial_id IN ({failed})",
            (study_id,),
        )
    return sorted(numbers)
