"""One process owns study.db and serves it, where the file system's locks do not hold between nodes.

    python -m hpo.study.serving.server WORKERS NODE…   hpo/job/keep_serving.sh, on the first node

check_cluster.py finds such file systems (Lustre mounted with localflock, for one).  There SQLite
would be destroyed by two nodes that write at the same time.

Who may call.  The server listens on the address by which this node reaches the others of the job
(NODE…; the loopback address where there are none), and answers no call that does not bring the
job's secret: 256 random bits, made here, in study.db.server beside study.db (served.py).
The secret and the trials cross the job's network in clear.

If it dies it is started again.  It finds its own study.db.server, and goes on at the same ports,
with the same secret, as the same owner of the leases: its workers, which wait, do not notice.  So
nothing that a worker relies on may be in memory alone: parameters and reports are written at once,
not with what comes later as elsewhere.

One port per worker, because a storage has one owner and leases tell the workers apart by it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import UpdateFinishedTrialError

from hpo import packages
from hpo.settings import Settings, UserError, run_script
from hpo.study.engines import EngineError
from hpo.study.leases import NoTrialLeft
from hpo.study.optuna_private import add_storage, study_id
from hpo.study.serving.served import HEADER, OWN, Server, announce, find_server, server_path
from hpo.study.storage import StudyStorage
from hpo.study.upkeep import Upkeep

THREADS = 4  # per worker: its main thread, its upkeep, and reserve
LAST_RETURNS = 10.0  # seconds after SIGTERM: workers that got it, too, give their trials back


class _Storage(StudyStorage):
    """The storage of one worker, in the server."""

    WAIT = 0.0

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """Set a parameter, in the file: the worker outlives this process."""
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        with suppress(UpdateFinishedTrialError):  # what comes next will say so
            self.renew_lease(trial_id)


def serve(settings: Settings, workers: int, nodes: Sequence[str]) -> int:
    """Serve the study of `settings` to so many workers until SIGTERM; return the exit status.

    Raises:
        UserError: grpcio or protobuf is missing, another job serves the study, or this node has no
            address that the other `nodes` know.
    """
    packages.need("A served study", "grpcio", "protobuf")
    path = settings.sqlite_path
    assert path
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda signum, frame: ended.set())
    before = find_server(path)
    mine = before if before and before.is_of(settings) else None
    here = mine or Server(
        settings.job_id, socket.gethostname(), own_address(nodes), [0] * workers, new_secret()
    )
    storages = [_storage(settings, path, here.secret, rank) for rank in range(workers)]
    study = optuna.load_study(study_name=settings.study_name, storage=storages[0])
    servers, ports = _listen(here, storages, study_id(study))
    if not mine and not announce(path, here._replace(ports=ports)):
        raise UserError(f"{find_server(path)} serves {path} already: wait until it has ended")
    for server in servers:
        server.start()
    # For all workers what each does for itself elsewhere: returns and backups.
    with Upkeep(study, settings):
        ended.wait()
        end = time.monotonic() + LAST_RETURNS
        while storages[0].count_leases(study_id(study)) and time.monotonic() < end:
            time.sleep(0.1)
        server_path(path).unlink()
    for server in servers:
        server.stop(grace=5).wait()
    return 0


def new_secret() -> str:
    """Return the secret of a new server."""
    return secrets.token_hex(32)


def own_address(nodes: Sequence[str]) -> str:
    """Return the address by which this host reaches the others; without any, the loopback one.

    Raises:
        UserError: a node's name is not known here.
    """
    here = socket.gethostname().split(".")[0]
    for node in nodes:
        if node.split(".")[0] == here:
            continue
        try:
            family, _, _, _, address = socket.getaddrinfo(node, 9, type=socket.SOCK_DGRAM)[0]
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect(address)  # sends nothing: the kernel chooses the way to it
                found = str(probe.getsockname()[0])
        except OSError as error:
            raise UserError(f"no way from here to the job's node {node}: {error}") from error
        return f"[{found}]" if ":" in found else found
    return "127.0.0.1"


def _storage(settings: Settings, path: Path, secret: str, rank: int) -> _Storage:
    """Return the storage of one worker; its token is the same after the server's death."""
    token = _token(secret, rank)
    storage = _Storage.of(
        replace(settings, token=token), path, f"worker {rank}, job {settings.job_id}"
    )
    assert isinstance(storage, _Storage)
    return storage


def _token(secret: str, rank: int) -> str:
    return hashlib.sha256(f"{secret}/{rank}".encode()).hexdigest()[:12]


def _listen(here: Server, storages: Sequence[_Storage], study: int) -> tuple[list[Any], list[int]]:
    """Return a gRPC server for each storage, not yet started, and their ports."""
    import grpc

    servers, ports = [], []
    for rank, (storage, port) in enumerate(zip(storages, here.ports, strict=True)):
        call = _own_calls(storage, study, _token(here.secret, rank))
        service, method = OWN.strip("/").split("/")
        own = grpc.method_handlers_generic_handler(
            service, {method: grpc.unary_unary_rpc_method_handler(call)}
        )
        server = grpc.server(
            ThreadPoolExecutor(THREADS),
            handlers=(own,),
            interceptors=(_guard(here.secret),),
            options=(("grpc.so_reuseport", 0),),  # no second server may share the port
        )
        add_storage(server, storage)
        try:
            ports.append(server.add_insecure_port(f"{here.address}:{port}"))
        except RuntimeError as error:  # taken meanwhile: it may be free in a second
            sys.exit(f"error: the address {here.address}:{port} cannot be had: {error}")
        servers.append(server)
    return servers, ports


def _guard(secret: str) -> Any:
    """Return what refuses each call without the secret, and names the file's errors as such."""
    import grpc

    def refuse(request: bytes, context: Any) -> None:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "it serves one job, which has a secret")

    def with_clear_errors(handler: Any) -> Any:
        def answer(request: Any, context: Any) -> Any:
            try:
                return handler.unary_unary(request, context)
            except EngineError as error:  # a full disk: the worker tries again, then waits
                context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

        return grpc.unary_unary_rpc_method_handler(
            answer, handler.request_deserializer, handler.response_serializer
        )

    class Guard(grpc.ServerInterceptor):  # type: ignore[misc]
        def intercept_service(self, continuation: Callable[[Any], Any], details: Any) -> Any:
            given = str(dict(details.invocation_metadata).get(HEADER, ""))
            if not hmac.compare_digest(given.encode(), secret.encode()):
                return grpc.unary_unary_rpc_method_handler(refuse)
            handler = continuation(details)
            return handler and with_clear_errors(handler)

    return Guard()


def _own_calls(storage: _Storage, study: int, token: str) -> Callable[[bytes, Any], bytes]:
    """Return the answer to the calls that Optuna's protocol has not; see ServedStorage."""
    import grpc

    def create_new_trial(study_id: int, total: int | None) -> int:
        storage.total_trials = total
        return storage.create_new_trial(study_id)

    def return_trial(trial_id: int, excused: bool, crashed: bool) -> int:
        return storage.return_trial(trial_id, excused=excused, crashed=crashed)

    def return_all(crashed: bool) -> list[int]:
        # By the file, which also knows those from before this process; then forget them.
        numbers = storage.return_trials_of(study, token, crashed=crashed)
        storage.return_held()
        return numbers

    calls: dict[str, Callable[..., Any]] = {
        "create_new_trial": create_new_trial,
        "renew_lease": storage.renew_lease,
        "return_trial": return_trial,
        "return_all": return_all,
        "owners": storage.owners,
    }

    def call(request: bytes, context: Any) -> bytes:
        name, arguments = json.loads(request)
        try:
            return json.dumps(calls[name](*arguments)).encode()
        except NoTrialLeft as error:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error.args[0]))
        except UpdateFinishedTrialError as error:  # LeaseLost, too
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except KeyError as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error.args[0]))
        raise AssertionError  # abort has raised

    return call


def main() -> int:
    """Serve the study of the environment; return the exit status."""
    settings = Settings.from_env()
    if settings.sqlite_path is None:
        raise UserError(f"STUDY_DB={settings.shown_db!r} has a server of its own")
    return serve(settings, int(sys.argv[1]), sys.argv[2:])


if __name__ == "__main__":
    run_script(main)
