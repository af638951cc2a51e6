"""An error inside the sampler or the pruner is no fault of the trial that happens to ask.

Both are wrapped: what they raise reaches the worker as `SearchFailed`, and the trial goes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import OptunaError, StorageInternalError, UpdateFinishedTrialError
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hpo.search.space import legal, no_range


class SearchFailed(OptunaError):
    """The sampler or the pruner has failed; `__cause__` is its error."""


@contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except (StorageInternalError, UpdateFinishedTrialError, SearchFailed):
        raise  # of the storage that it reads
    except Exception as error:
        raise SearchFailed(f"{what} failed: {type(error).__name__}: {error}") from error


class GuardedSampler(BaseSampler):
    """Another sampler, whose errors are SearchFailed."""

    def __init__(self, sampler: BaseSampler) -> None:
        self._sampler = sampler
        self._name = f"the sampler {type(sampler).__name__}"

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See BaseSampler."""
        with _named(self._name):
            return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See BaseSampler."""
        with _named(self._name):
            return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """See BaseSampler. Raises ValueError for a range that the objective should not ask for."""
        if no_range(distribution):
            raise ValueError(f"{name} is {legal(distribution)}, which is no range")
        with _named(self._name):
            return self._sampler.sample_independent(study, trial, name, distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See BaseSampler."""
        with _named(self._name):
            self._sampler.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """See BaseSampler."""
        with _named(self._name):
            self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """See BaseSampler."""
        self._sampler.reseed_rng()


class GuardedPruner(BasePruner):
    """Another pruner, whose errors are SearchFailed."""

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Ask the other pruner."""
        with _named(f"the pruner {type(self._pruner).__name__}"):
            return self._pruner.prune(study, trial)
