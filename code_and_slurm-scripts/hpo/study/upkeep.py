"""What a worker does in the background while its objective trains.

A thread wakes several times per grace period and

    renews the lease of the trial that is running, so that nobody takes it for dead, unless it was
        written a moment ago: of many workers with long epochs these are most of the writes,
    returns the trials of dead workers to the queue,
    copies the study to its backup (study.db.backup) if that is older than BACKUP_SECONDS.

Only the bundle's own storage has leases and backups.  In any other one the thread writes a sign of
life into the trial that is running, by which `return_stuck` knows those that no worker runs.

Reports of short epochs may be in memory alone for a second (held.py).  What a trial saves meanwhile
carries them, so that a worker that is killed leaves no gap in the trial's curve.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from hpo.settings import Settings
from hpo.study.copying import backup
from hpo.study.engines import EngineError
from hpo.study.optuna_private import storage_of, study_id, trial_id
from hpo.study.serving.served import Leased
from hpo.study.storage import StudyStorage
from hpo.words import logger

BACKUP_SECONDS = 40.0  # with the wake-ups between, a backup is never older than 60 s
LONGEST_SLEEP = 10.0  # seconds
ALIVE = "hpo:alive"  # system attribute of a running trial, where there are no leases: it changes

log = logger("hpo.worker")


class Upkeep:
    """The thread, for the time of a `with` block; `trial_id` is the trial to keep alive."""

    def __init__(self, study: optuna.Study, settings: Settings) -> None:
        self.trial_id: int | None = None
        self._storage = storage_of(study)
        self._study_id = study_id(study)
        self._backup = settings.backup_path
        self._seconds = min(settings.lease_grace / 6, LONGEST_SLEEP)
        self._idle = settings.lease_grace / 4  # a report renews the lease as well
        self._signs = 0
        self._said = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def __enter__(self) -> Upkeep:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()
        self._once(max_age=0.0)  # the last results are in the backup, too

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            self._once(BACKUP_SECONDS)

    def _once(self, max_age: float) -> None:
        try:
            if (running := self.trial_id) is not None:
                self._show_life(running)
        except UpdateFinishedTrialError:
            pass  # finished meanwhile, or lost: the next report in the main thread will say so
        except Exception as error:  # the file is busy, the server gone: the next time may work
            log.warning("the lease could not be renewed: %s", error)
        if not isinstance(self._storage, StudyStorage):
            return  # the server does the rest for all; or there is no more to do
        try:
            for number in self._storage.return_stale_trials(self._study_id):
                log.info("trial %d of a worker that died goes back to the queue", number)
            if self._backup:
                backup(self._storage, self._study_id, self._backup, max_age)
        except (EngineError, OSError) as error:  # a full disk ends no training
            if (text := str(error)) != self._said:  # once: it may be so for hours
                log.warning("%s", text)
            self._said = text

    def _show_life(self, running: int) -> None:
        if isinstance(self._storage, Leased):
            self._storage.renew_lease(running, self._idle)
        else:
            self._signs += 1
            self._storage.set_trial_system_attr(running, ALIVE, self._signs)


def return_stuck(study: optuna.Study, seconds: float) -> list[int]:
    """Give back the running trials that no worker owns; return their numbers.

    One under a lease has an owner.  Of another one nobody does if nothing in it changes in so many
    seconds, in which a worker of this bundle shows life several times; stock Optuna's does not.
    """
    before = _signs_of_life(study)
    if not before:
        return []
    time.sleep(seconds)
    now, found = _signs_of_life(study), []
    for number, (trial, signs) in before.items():
        if now.get(number) != (trial, signs):
            continue
        with suppress(UpdateFinishedTrialError):  # it has just been finished
            storage_of(study).set_trial_state_values(trial, TrialState.WAITING)
            found.append(number)
    return found


def _signs_of_life(study: optuna.Study) -> dict[int, tuple[int, Any]]:
    """Return the trials that run without a lease: number → id, and what its worker changes."""
    storage = storage_of(study)
    owned = storage.owners(study_id(study)) if isinstance(storage, Leased) else {}
    return {
        trial.number: (
            trial_id(trial),
            (trial.system_attrs, trial.user_attrs, trial.params, trial.intermediate_values),
        )
        for trial in study.get_trials(states=(TrialState.RUNNING,))
        if trial.number not in owned
    }


# ---- reports that wait -----------------------------------------------------------------------


def waiting_reports(trial: Any) -> dict[int, float]:
    """Return the reports of a running trial that are in memory alone, by their step."""
    storage = getattr(trial, "storage", None)  # in a process beside the worker there is none
    return storage.waiting_reports(trial_id(trial)) if isinstance(storage, StudyStorage) else {}


def put_back_reports(trial: Any, reports: Mapping[int, float]) -> None:
    """Report what a worker that died had reported, where it is not in the database."""
    storage = getattr(trial, "storage", None)
    if not reports or not isinstance(storage, StudyStorage):
        return
    known = storage.get_trial(trial_id(trial)).intermediate_values
    for step in reports.keys() - known.keys():
        storage.set_trial_intermediate_value(trial_id(trial), step, reports[step])


def write_at_once(trial: Any) -> None:
    """Let no report of a trial wait from now on: something else saves it, without them."""
    storage = getattr(trial, "storage", None)
    if isinstance(storage, StudyStorage):
        storage.write_at_once(trial_id(trial))
