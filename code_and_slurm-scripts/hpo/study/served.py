"""A worker's side of a study that one process of the job serves (hpo/study/server.py).

The server says where it listens in study.db.server, beside study.db, as long as it runs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import NamedTuple

from optuna.storages import GrpcStorageProxy
from optuna.trial import FrozenTrial, TrialState

from hpo.settings import Settings
from hpo.study.held import NoTrialLeft
from hpo.study.leases import has_ended


class Server(NamedTuple):
    """Who serves a study: the content of study.db.server."""

    job_id: str
    host: str
    ports: list[int]  # by the rank of the worker


def server_path(database: Path) -> Path:
    """Return the name of the file that says that a study is being served."""
    return database.with_name(f"{database.name}.server")


def find_server(database: Path) -> Server | None:
    """Return who serves the study in `database`; None where everybody opens the file itself."""
    try:
        return Server(**json.loads(server_path(database).read_text()))
    except FileNotFoundError:
        return None


def forget_dead_server(settings: Settings) -> None:
    """Remove study.db.server if the job that wrote it is known to have left Slurm's queue."""
    if not (path := settings.sqlite_path) or not (server := find_server(path)):
        return
    if has_ended(server.job_id, settings.job_id, settings.alive_jobs):
        server_path(path).unlink(missing_ok=True)


class ServedStorage(GrpcStorageProxy):
    """A worker's view of a study that another process owns."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial.  Raises NoTrialLeft instead of going over TOTAL_TRIALS."""
        try:
            return super().create_new_trial(study_id, template_trial)
        except KeyError:  # what gRPC makes of NoTrialLeft, and of a study that is gone
            self.get_study_name_from_id(study_id)  # raises KeyError in the second case
            raise NoTrialLeft("The study has all of its trials.") from None

    def renew_lease(self, trial_id: int) -> None:
        """Say that the trial is alive: every write of its holder renews the lease."""
        self.set_trial_system_attr(trial_id, "alive", os.getpid())

    def count_leases(self, study_id: int) -> int:
        """Return how many trials of the study are running."""
        running = (TrialState.RUNNING,)
        return len(self.get_all_trials(study_id, deepcopy=False, states=running))
