"""PRUNER → Optuna's pruner, which never stops a trial when all of its work is done.

All of them compare values of the same step, so trials that have seen each image equally often.
PRUNER=halving:reduction_factor=4 hands options on to Optuna's constructor.  hyperband takes the
length of a trial from the steps that complete trials have reported ("auto").

halving is asynchronous successive halving that stops and never pauses (ASHA: arXiv:1810.05934): of
the trials that have reported once, 3 times, 9 times, … the best third goes on.  It begins with the
first trials, not after five complete ones as median does: with many workers that is much of a
study.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import optuna
from optuna import pruners
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.pruners import BasePruner
from optuna.trial import FrozenTrial, TrialState

from hpo.search.options import construct
from hpo.search.samplers import check_packages, make_sampler
from hpo.search.space import Space, quiet_study
from hpo.settings import Settings, UserError
from hpo.study.cache import Follower
from hpo.words import one_line

TRIED = 15  # trials, and steps of each; ten of TPE's are random
TRY: Space = {"x": FloatDistribution(0, 1), "n": IntDistribution(1, 9)}
MOST_STEPS = 32  # whose reports are remembered


class LastReportCounts(BasePruner):
    """Prunes a trial as another pruner says, but never after its last report.

    Where the number of epochs is searched, trials with few of them would otherwise be pruned when
    all of their work is done, and their result be lost; pruning saves nothing then.
    """

    def __init__(self, pruner: BasePruner) -> None:
        self._pruner = pruner
        self._lengths = Lengths()

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Ask the other pruner, and then whether anything is left to be saved."""
        if not self._pruner.prune(study, trial):
            return False
        trials = study.get_trials(deepcopy=False)
        self._lengths.look(trials)
        last = self._lengths.number(trial)
        if last is None and not self._lengths.seen:
            return _goes_on(trial, trials)
        return last is None or len(trial.intermediate_values) < last


def _goes_on(trial: FrozenTrial, others: list[FrozenTrial]) -> bool:
    """Return whether a trial will surely report again, though none is complete yet.

    Another has reported more often, and no parameter is the number of reports so far, as one that
    means the epochs would be after the last of them.
    """
    reports = len(trial.intermediate_values)
    may_mean_epochs = any(_is_whole(v) and v == reports for v in trial.params.values())
    ahead = any(len(other.intermediate_values) > reports for other in others)
    return ahead and not may_mean_epochs


def _is_whole(value: Any) -> bool:
    """Whether a value may be a number of epochs; suggest_float gives 4.0, too."""
    return type(value) in (int, float) and value % 1 == 0


class Halving(BasePruner):
    """Asynchronous successive halving that stops: decides as Optuna's SuccessiveHalvingPruner.

    Optuna's takes a trial's last step for its resource, though that is 0 after the first epoch,
    and notes in a trial what it has passed: one that was interrupted, imported, or begun with
    another pruner would be compared with what others had reported at another epoch, or not at all.
    This one looks at the reports alone, and writes nothing.

    Args:
        min_resource: reports until the first decision.
        reduction_factor: times as many until the next; one of so many goes on.

    Raises:
        ValueError: one of them is no whole number, or too small.
    """

    def __init__(self, min_resource: int = 1, reduction_factor: int = 3) -> None:
        for name, value, least in (
            ("min_resource", min_resource, 1),
            ("reduction_factor", reduction_factor, 2),
        ):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is no whole number from {least}")
        self._first, self._factor = min_resource, reduction_factor
        self._reported: dict[tuple[int, float], _Reported] = {}

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Compare with what all others have reported at the same step, if one is due."""
        step = trial.last_step
        if step is None or not self._is_due(len(trial.intermediate_values)):
            return False
        sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        mine = sign * trial.intermediate_values[step]
        ended = self._of_step(step, sign)
        others = [
            t for t in ended.look(study.get_trials(deepcopy=False)) if t.number != trial.number
        ]
        running = [t.intermediate_values[step] for t in others if step in t.intermediate_values]
        better = bisect_left(ended.values, mine) + sum(sign * value < mine for value in running)
        places = max(1, (ended.count + len(running) + 1) // self._factor)
        return math.isnan(mine) or better >= places

    def _of_step(self, step: int, sign: float) -> _Reported:
        if len(self._reported) > MOST_STEPS:  # each trial has others
            self._reported.clear()
        return self._reported.setdefault((step, sign), _Reported(step, sign))

    def _is_due(self, reports: int) -> bool:
        due = self._first
        while due < reports:
            due *= self._factor
        return due == reports


class _Reported(Follower):
    """What the trials that have ended had reported at one step: `values` in order, `count` all."""

    def __init__(self, step: int, sign: float) -> None:
        self._step, self._sign = step, sign
        super().__init__()

    def forget(self) -> None:
        self.values: list[float] = []
        self.count = 0  # those that are no number among them

    def take(self, trial: FrozenTrial) -> None:
        value = trial.intermediate_values.get(self._step)
        if value is not None:
            self.count += 1
            if not math.isnan(value):
                insort(self.values, self._sign * value)


def number_of_reports(trial: FrozenTrial, complete: list[FrozenTrial]) -> int | None:
    """Return how often a trial will report, as far as the complete ones tell; None if they do not.

    Either all have reported equally often, or as often as one of their parameters says, whatever
    its name; before there is a complete trial, that is `epochs` if there is one.
    """
    return reports_as(complete)(trial)


def reports_as(complete: list[FrozenTrial]) -> Callable[[FrozenTrial], int | None]:
    """Return `number_of_reports` for the same complete trials, which are looked at once."""
    lengths = Lengths()
    lengths.look(complete)
    return lengths.number


class Lengths(Follower):
    """How often the complete trials have reported; see `number_of_reports`."""

    def forget(self) -> None:
        self.seen: set[int] = set()  # numbers of reports
        self._names = {"epochs"}  # of parameters that were always that number

    def take(self, trial: FrozenTrial) -> None:
        if trial.state != TrialState.COMPLETE:
            return
        count = len(trial.intermediate_values)
        names = self._names if self.seen else set(trial.params)
        self._names = {name for name in names if trial.params.get(name) == count}
        self.seen.add(count)

    def number(self, trial: FrozenTrial) -> int | None:
        """Return how often a trial will report, or None."""
        for name in sorted(self._names):
            if _is_whole(trial.params.get(name)):
                return int(trial.params[name])
        return next(iter(self.seen)) if len(self.seen) == 1 else None


def check_search(settings: Settings) -> None:
    """Raise UserError if SAMPLER or PRUNER needs a package, or an option, that is not there."""
    check_packages(settings)
    make_sampler(settings, None)
    make_pruner(settings)
    if settings.sampler_options or settings.pruner_options:
        _try_out(settings)


def _try_out(settings: Settings) -> None:
    """Run a few trials of nothing, in memory: many a value is refused by Optuna only then."""
    study = quiet_study()
    study.pruner = make_pruner(settings)
    if given := dict(settings.sampler_options):
        if "n_startup_trials" in given:
            given["n_startup_trials"] = min(2, given["n_startup_trials"])
        study.sampler = make_sampler(replace(settings, fixed={}, sampler_options=given), 0)
    for _ in range(TRIED):
        with _refused("SAMPLER", settings.sampler):
            trial = study.ask(TRY)
        for step in range(TRIED):
            trial.report(trial.params["x"] / (step + 1), step)
            with _refused("PRUNER", settings.pruner):
                if trial.should_prune():
                    break
        study.tell(trial, trial.params["x"])


@contextmanager
def _refused(variable: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{variable}={name} cannot work with these options: {reason}") from error


def make_pruner(settings: Settings) -> BasePruner:
    """Return the pruner of PRUNER with its options.

    Raises:
        UserError: an option is not legal.
    """
    warnings.filterwarnings("ignore", message="WilcoxonPruner finds steps")  # fewer epochs
    kinds: dict[str, tuple[type[BasePruner], dict[str, Any]]] = {
        "median": (pruners.MedianPruner, {}),
        "percentile": (pruners.PercentilePruner, {"percentile": 25.0}),
        "halving": (Halving, {"min_resource": 1, "reduction_factor": 3}),
        "hyperband": (pruners.HyperbandPruner, {"max_resource": "auto"}),
        "wilcoxon": (pruners.WilcoxonPruner, {}),
        "none": (pruners.NopPruner, {}),
    }
    kind, defaults = kinds[settings.pruner]
    name = f"PRUNER={settings.pruner}"
    return LastReportCounts(construct(name, kind, settings.pruner_options, **defaults))
