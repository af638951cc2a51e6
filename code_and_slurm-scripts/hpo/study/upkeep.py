"""What a worker does in the background while its objective trains.

A thread wakes several times per grace period and

    renews the lease of the trial that is running, so that nobody takes it for dead,
    returns the trials of dead workers to the queue,
    copies the study to its backup (study.db.backup) if that is older than BACKUP_SECONDS.

Only the bundle's own storage has leases and backups; with any other storage there is nothing to
do, and no thread.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from hpo.settings import Settings
from hpo.study.copying import backup
from hpo.study.engines import EngineError
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.served import ServedStorage
from hpo.study.storage import SQLiteStorage

BACKUP_SECONDS = 40.0  # with the wake-ups between, a backup is never older than 60 s
LONGEST_SLEEP = 10.0  # seconds

log = logging.getLogger("hpo.worker")


class Upkeep:
    """The thread, for the time of a `with` block; `trial_id` is the trial to keep alive."""

    def __init__(self, study: optuna.Study, settings: Settings) -> None:
        self.trial_id: int | None = None
        self._storage = storage_of(study)
        self._study_id = study_id(study)
        self._backup = settings.backup_path
        self._seconds = min(settings.lease_grace / 6, LONGEST_SLEEP)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def __enter__(self) -> Upkeep:
        if isinstance(self._storage, (SQLiteStorage, ServedStorage)):
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
            self._once(max_age=0.0)  # the last results are in the backup, too

    def _run(self) -> None:
        while not self._end.wait(self._seconds):
            self._once(BACKUP_SECONDS)

    def _once(self, max_age: float) -> None:
        storage = self._storage
        assert isinstance(storage, (SQLiteStorage, ServedStorage))
        try:
            if (trial_id := self.trial_id) is not None:
                storage.renew_lease(trial_id)
        except UpdateFinishedTrialError:
            pass  # finished meanwhile, or lost: the next report in the main thread will say so
        except Exception as error:  # the file is busy, the server gone: the next time may work
            log.warning("the lease could not be renewed: %s", error)
        if isinstance(storage, ServedStorage):
            return  # the server does the rest for all
        try:
            for number in storage.return_stale_trials(self._study_id):
                log.info("trial %d of a worker that died goes back to the queue", number)
            if self._backup:
                backup(storage, self._study_id, self._backup, max_age)
        except (EngineError, OSError) as error:  # a full disk ends no training
            log.warning("%s", error)
