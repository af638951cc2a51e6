"""Trials whose parameters are known beforehand, and what the search does not see.

The first trials of a study take the configurations that it begins with (known.py); a final run
(FINAL_SEEDS) takes those of the trial that it repeats.  Which trial takes which follows from its
number and its mark, so that it is given once, whatever dies, and with no word between the workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from hpo.search.guard import GuardedPruner, GuardedSampler
from hpo.search.pruners import make_pruner
from hpo.search.remembered import Plan
from hpo.search.samplers import make_sampler, sampler_seed
from hpo.settings import Settings
from hpo.study.optuna_private import as_seen, storage_of, study_id
from hpo.study.trials import FINAL_OF, is_final, searched
from hpo.words import logger, with_tuples

log = logger("hpo.worker")


class GivenFirst(BaseSampler):
    """Another sampler, which is asked for what is not given, and sees no final run."""

    def __init__(
        self, sampler: BaseSampler, known: Sequence[Mapping[str, Any]], finals: bool
    ) -> None:
        """Prepare: `finals` says whether the study may have final runs."""
        self._sampler, self._known, self._finals = sampler, known, finals

    def _given(self, study: optuna.Study, trial: FrozenTrial) -> Mapping[str, Any]:
        if is_final(trial):  # from the storage: a study of Hyperband's shows a part of its trials
            trials = storage_of(study).get_all_trials(study_id(study), deepcopy=False)
            number: int = trial.user_attrs[FINAL_OF]
            # As search_space has them: through gRPC, tuples among the choices come as lists.
            return {name: with_tuples(value) for name, value in trials[number].params.items()}
        return self._known[trial.number] if trial.number < len(self._known) else {}

    def _seen(self, study: optuna.Study) -> optuna.Study:
        return as_seen(study, searched) if self._finals else study

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See BaseSampler; nothing for a trial that is given."""
        if self._given(study, trial):
            return {}
        return self._sampler.infer_relative_search_space(self._seen(study), trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See BaseSampler; nothing for a trial that is given."""
        if self._given(study, trial):
            return {}
        return self._sampler.sample_relative(self._seen(study), trial, search_space)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Return what is given, or ask the other sampler."""
        given = self._given(study, trial)
        if name in given:  # 64 for the 64.0 of a table or of JSON, where a whole number is wanted
            return distribution.to_external_repr(distribution.to_internal_repr(given[name]))
        return self._sampler.sample_independent(self._seen(study), trial, name, distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See BaseSampler."""
        if not self._given(study, trial):
            self._sampler.before_trial(self._seen(study), trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """See BaseSampler; a final run tells the sampler nothing."""
        if not is_final(trial):
            self._sampler.after_trial(self._seen(study), trial, state, values)

    def reseed_rng(self) -> None:
        """See BaseSampler."""
        self._sampler.reseed_rng()


class FinalsAreWhole(BasePruner):
    """Another pruner, which neither stops nor sees a final run."""

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Ask the other pruner about a trial of the search."""
        return not is_final(trial) and self._pruner.prune(as_seen(study, searched), trial)


def equip(study: optuna.Study, settings: Settings, plan: Plan) -> Settings:
    """Give the study its sampler and pruner; return the settings with the pruner in use."""
    trials = study.get_trials(deepcopy=False)
    final = bool(settings.final_runs) or any(map(is_final, trials))
    seed = sampler_seed(settings.seed, settings.rank, len(trials))
    sampler = make_sampler(
        settings, seed, space=plan.space, combinations=plan.combinations, known=plan.known
    )
    study.sampler = GivenFirst(GuardedSampler(sampler), plan.known, final)
    if len(study.directions) > 1 and settings.pruner != "none":
        log.info("several objectives: nothing is pruned (PRUNER=%s is not used)", settings.pruner)
        settings = replace(settings, pruner="none", pruner_options={})
    study.pruner = GuardedPruner(make_pruner(settings))
    if final:
        study.pruner = FinalsAreWhole(study.pruner)
    return settings
