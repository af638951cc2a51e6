"""SAMPLER=tpe: Optuna's TPE, in which complete trials alone decide how many are good.

TPE models the best γ trials and all others, and tries what is likely among the first and not among
the others.  Optuna takes γ as 10 % of the finished trials, pruned ones among them.  But the good
ones are taken from the complete trials first: with a pruner that stops most trials, the best 10 %
become the best quarter or half of the complete ones, and the search stays near the mediocre
(tests/benchmarks/optuna-gamma.txt; measured in tests/benchmarks/search-figures.txt).
"""

from __future__ import annotations

import inspect
import math
import warnings
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial, TrialState

from hpo.search.space import Space

MOST = 25  # good trials, as in Optuna
_OPTIONS = inspect.signature(TPESampler).parameters.values()
_COUNT_PRUNED = inspect.Parameter("count_pruned", inspect.Parameter.KEYWORD_ONLY, default=False)


class CompleteTPE(TPESampler):
    """TPE whose γ is 10 % of the complete trials, at most 25.

    While no trial is complete, one is good: the pruned one that came furthest.  Where trials have
    constraints it is as in Optuna, since an infeasible trial is complete, too.

    `gamma` is public in Optuna 5, deprecated, and goes in 6.0 (tests/test_space.py says so).  It is
    given the number of finished trials alone; that of the complete ones comes by
    `infer_relative_search_space`, which Optuna calls before each trial's first suggestion.

    Args:
        count_pruned: True counts pruned trials, too, as Optuna does.
        options: of TPESampler.

    Raises:
        ValueError: count_pruned is neither True nor False.
    """

    # What SAMPLER=tpe:… may name.
    __signature__ = inspect.Signature([*(p for p in _OPTIONS if p.name != "gamma"), _COUNT_PRUNED])

    def __init__(self, *, count_pruned: bool = False, **options: Any) -> None:
        if not isinstance(count_pruned, bool):
            raise ValueError(f"count_pruned={count_pruned!r} is neither True nor False")
        self._complete: int | None = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # see above
            super().__init__(gamma=None if count_pruned else self.good, **options)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> Space:
        """Count the complete trials, then do as Optuna."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        self._complete = None if any(t.constraints for t in complete) else len(complete)
        return super().infer_relative_search_space(study, trial)

    def good(self, finished: int) -> int:
        """Return γ, how many trials are good, of so many that are complete or pruned."""
        counted = finished if self._complete is None else self._complete
        return max(1, min(math.ceil(0.1 * counted), MOST))
