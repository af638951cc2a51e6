"""Every name of Optuna that is not public and that this bundle uses; nothing else may use one.

Optuna's public interface has no way to ask an open study for its storage, or a trial for its row,
and no class for a study that a storage returns.  tests/test_optuna_private.py holds each name to
what is expected of it, and hpo/packages.py refuses every Optuna but the tested one: with another
version a name may be gone, or mean something else, in the middle of a study.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import optuna
from optuna.storages import BaseStorage
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

__all__ = [
    "FrozenStudy",
    "make_server",
    "storage_of",
    "study_id",
    "trial_id",
    "with_trial_id",
    "without",
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


def make_server(storage: BaseStorage, host: str, port: int, threads: int) -> Any:
    """Return Optuna's gRPC server of a storage, not yet started.

    Raises:
        ImportError: grpcio or protobuf is missing.
    """
    from optuna.storages._grpc.server import make_server as make

    return make(storage, host, port, ThreadPoolExecutor(threads))


def without(study: optuna.Study, hidden: Callable[[FrozenTrial], bool]) -> optuna.Study:
    """Return the study as it is without some of its trials, for a sampler or a pruner.

    Hyperband gives samplers a view of its own, made for one call, which cannot be copied.
    """
    view = copy.copy(study) if type(study) is optuna.Study else study
    view._storage = cast("BaseStorage", _Hiding(study._storage, hidden))
    return view


class _Hiding:
    """A storage without some of the trials."""

    def __init__(self, storage: BaseStorage, hidden: Callable[[FrozenTrial], bool]) -> None:
        self._storage, self._hidden = storage, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._storage, name)

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        found = self._storage.get_all_trials(study_id, deepcopy=deepcopy, states=states)
        return [trial for trial in found if not self._hidden(trial)]
