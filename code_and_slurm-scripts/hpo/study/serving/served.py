"""A worker's side of a study that one process of the job serves (hpo/study/serving/server.py).

The server says where it listens in study.db.server, beside study.db, as long as it runs.  The
file also holds the job's secret, without which the server answers no call, so that its owner alone
can read it.
"""

from __future__ import annotations

import json
import os
import pwd
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hpo.settings import Settings
from hpo.study.engines import EngineError
from hpo.study.leases import NoTrialLeft, has_ended
from hpo.study.optuna_private import ProxyOfChannel
from hpo.study.storage import StudyStorage
from hpo.words import one_line

USER = "optuna"  # of a PostgreSQL inside the job
HEADER = "hpo-secret"  # of each call
OWN = "/hpo.Study/Call"  # what Optuna's protocol has no call for: [name, arguments] as JSON
PATIENCE = 60.0  # seconds that a call waits for a server that is away, as for SQLite's lock
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # A server that was started again is found within seconds; the default is two minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
)


class ServerGone(EngineError):
    """The process that serves the study does not answer, or not to this job."""


class Server(NamedTuple):
    """Who serves a study: the content of study.db.server."""

    job_id: str
    host: str
    address: str = ""
    ports: Sequence[int] = ()  # by the rank of the worker
    secret: str = ""

    def is_of(self, settings: Settings) -> bool:
        """Whether it serves the job of this process."""
        return bool(self.secret) and self.job_id == settings.job_id

    @property
    def postgresql_url(self) -> str:
        """The URL of a PostgreSQL that runs inside the job, with its password."""
        return f"postgresql://{USER}:{self.secret}@{self.address}:{self.ports[0]}/postgres"

    def __str__(self) -> str:
        if not self.job_id:
            return self.host
        return f"job {self.job_id.replace('@', ' of ')} on {self.host}"


def server_path(database: Path) -> Path:
    """Return the name of the file that says that a study is being served."""
    return database.with_name(f"{database.name}.server")


def database_of(settings: Settings) -> Path:
    """Return study.db, or what stands for a server's database beside the scripts."""
    return settings.beside / settings.database


def find_server(database: Path) -> Server | None:
    """Return who serves the study in `database`; None where everybody opens the file itself.

    Of another user's server nothing is known but whose it is.
    """
    path = server_path(database)
    try:
        return Server(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except PermissionError:
        user = path.stat().st_uid
        with suppress(KeyError):
            return Server("", f"a job of {pwd.getpwuid(user).pw_name}")
        return Server("", f"a job of user {user}")


def announce(database: Path, server: Server) -> bool:
    """Write study.db.server, for its owner's eyes alone; False if a study is served already.

    The file is there whole or not at all, and two servers cannot both make it.
    """
    path = server_path(database)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as file:
            json.dump(server._asdict(), file)
            file.flush()
            os.fsync(descriptor)
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def forget_dead_server(settings: Settings) -> None:
    """Remove study.db.server if the job that wrote it is known to have left Slurm's queue."""
    if not (path := settings.sqlite_path) or not (server := find_server(path)):
        return
    if has_ended(server.job_id, settings.job_id, settings.alive_jobs):
        server_path(path).unlink(missing_ok=True)


class ServedStorage(ProxyOfChannel):
    """A worker's view of a study that another process owns.

    It offers what StudyStorage does for a worker.  A call waits for a server that is away, and
    raises ServerGone after PATIENCE seconds.  `total_trials` is the number of trials that the study
    ends with: it goes with each new trial, since the server cannot know when a finite space ends.
    """

    def __init__(self, server: Server, rank: int, total_trials: int | None = None) -> None:
        self._server, self.total_trials = server, total_trials
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # Optuna's client is
            super().__init__(host=server.address, port=server.ports[rank])

    def open_channel(self) -> Any:
        """Return a grpc.Channel to the server."""
        import grpc

        return grpc.insecure_channel(f"{self._host}:{self._port}", options=OPTIONS)

    def call(self, method: Any, request: Any) -> Any:
        """Return the server's answer to a call with the job's secret; wait for it if it is away.

        Raises ServerGone, or grpc.RpcError, of which Optuna's client makes its own errors.
        """
        import grpc

        begin, pause = time.monotonic(), 0.1
        while True:
            try:
                return method(request, metadata=((HEADER, self._server.secret),))
            except grpc.RpcError as error:
                code, details = error.code(), one_line(error.details(), 300)
                if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED):
                    raise
                over = time.monotonic() - begin > PATIENCE
                if over or code == grpc.StatusCode.UNAUTHENTICATED:
                    # Not "from error": that one is of gRPC's threads, and long.
                    raise ServerGone(f"the study's server ({self._server}): {details}") from None
            time.sleep(pause)
            pause = min(2 * pause, 2.0)

    def _own(self, name: str, *arguments: Any) -> Any:
        """Return what a call of ours returns. Raises NoTrialLeft, UpdateFinishedTrialError."""
        import grpc

        request = json.dumps([name, arguments]).encode()
        try:
            return json.loads(self.call(self.method(OWN), request))
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise NoTrialLeft(error.details()) from None
            if error.code() == grpc.StatusCode.FAILED_PRECONDITION:
                raise UpdateFinishedTrialError(error.details()) from None
            if error.code() == grpc.StatusCode.NOT_FOUND:
                raise KeyError(error.details()) from None
            raise

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Add a trial.  Raises NoTrialLeft instead of going over `total_trials`."""
        if template_trial is not None:
            return super().create_new_trial(study_id, template_trial)
        return int(self._own("create_new_trial", study_id, self.total_trials))

    def renew_lease(self, trial_id: int, idle: float = 0.0) -> None:
        """Say that the trial is alive. Raises UpdateFinishedTrialError if it was lost."""
        self._own("renew_lease", trial_id, idle)

    def return_trial(
        self, trial_id: int, *, excused: bool = False, crashed: bool = False
    ) -> TrialState:
        """Give this worker's trial back; see StudyStorage.return_trial."""
        return TrialState(self._own("return_trial", trial_id, excused, crashed))

    def return_held(self) -> None:
        """Give all of this worker's trials back, excused."""
        self._own("return_all", False)

    def return_trials_of(self, study_id: int, token: str, *, crashed: bool) -> list[int]:
        """Return the trials of the worker of this rank, which has ended; its numbers.

        `token` is not needed: to the server a worker is its rank, which has one process at a time.
        """
        return [int(number) for number in self._own("return_all", crashed)]

    def count_leases(self, study_id: int) -> int:
        """Return how many trials of the study are running under a lease."""
        return len(self.owners(study_id))

    def owners(self, study_id: int) -> dict[int, str]:
        """Return the names of the workers that run a trial, by the trial's number."""
        return {int(number): owner for number, owner in self._own("owners", study_id).items()}


# The storages where a running trial has an owner, and comes back if that one dies.
Leased: TypeAlias = StudyStorage | ServedStorage
