"""Every name of Optuna that is not public and that this bundle uses; nothing else may use one.

Optuna's public interface has no way to ask an open study for its storage, or a trial for its row,
and no class for a study that a storage returns.  tests/test_optuna_private.py holds each name to
what is expected of it, and hpo/packages.py refuses every Optuna but the tested one: with another
version a name may be gone, or mean something else, in the middle of a study.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Sequence
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage, GrpcStorageProxy
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

__all__ = [
    "FrozenStudy",
    "ProxyOfChannel",
    "add_storage",
    "as_seen",
    "storage_of",
    "study_id",
    "trial_id",
    "with_trial_id",
]


def storage_of(study: optuna.Study) -> BaseStorage:
    """Return the storage behind a study."""
    return study._storage


def study_id(study: optuna.Study | FrozenStudy) -> int:
    """Return the id of a study in its storage."""
    return study._study_id


def trial_id(trial: optuna.Trial | FrozenTrial) -> int:
    """Return the id of a trial in its storage, which is not its number."""
    return trial._trial_id


def with_trial_id(trial: FrozenTrial, number: int) -> None:
    """Give a trial the id that its storage has given it."""
    trial._trial_id = number


def add_storage(server: Any, storage: BaseStorage) -> None:
    """Let a grpc.Server, not yet started, answer what Optuna's gRPC client asks of a storage.

    Raises:
        ImportError: grpcio or protobuf is missing.
    """
    from optuna.storages._grpc import servicer
    from optuna.storages._grpc.auto_generated import api_pb2_grpc

    service = servicer.OptunaStorageProxyService(storage)
    api_pb2_grpc.add_StorageServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]


class ProxyOfChannel(GrpcStorageProxy):
    """Optuna's gRPC client on a channel of its subclass's own, which also makes every call.

    Raises ImportError where grpcio or protobuf is missing.
    """

    def open_channel(self) -> Any:
        """Return a grpc.Channel to the server."""
        raise NotImplementedError

    def call(self, method: Any, request: Any) -> Any:
        """Return the server's answer: method(request), with whatever else it takes."""
        raise NotImplementedError

    def _setup(self) -> None:  # Optuna calls it for a new proxy, and for one that was unpickled
        from optuna.storages._grpc.auto_generated import api_pb2_grpc
        from optuna.storages._grpc.client import GrpcClientCache

        self._channel = self.open_channel()
        of_optuna = api_pb2_grpc.StorageServiceStub(self._channel)  # type: ignore[no-untyped-call]
        stub: Any = _Stub(of_optuna, self)
        self._stub = stub
        self._cache = GrpcClientCache(stub)

    def method(self, path: str) -> Any:
        """Return a method of the server that is not Optuna's: bytes → bytes."""
        return self._channel.unary_unary(path)


class _Stub:
    """Optuna's stub; its calls are made by the proxy."""

    def __init__(self, stub: Any, proxy: ProxyOfChannel) -> None:
        self._of_optuna, self._proxy = stub, proxy

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._of_optuna, name)
        return lambda request: self._proxy.call(method, request)


def as_seen(
    study: optuna.Study, change: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]
) -> optuna.Study:
    """Return the study with its trials as `change` returns them, for a sampler or a pruner.

    Hyperband gives samplers a view of its own, made for one call, which cannot be copied.
    """
    view = copy.copy(study) if type(study) is optuna.Study else study
    view._storage = cast("BaseStorage", _Seen(study._storage, change))
    return view


class _Seen:
    """A storage whose trials are what `change` makes of them."""

    def __init__(
        self, storage: BaseStorage, change: Callable[[Sequence[FrozenTrial]], list[FrozenTrial]]
    ) -> None:
        self._storage, self._change = storage, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        found = self._change(self._storage.get_all_trials(study_id, deepcopy=deepcopy))
        return found if states is None else [trial for trial in found if trial.state in states]
