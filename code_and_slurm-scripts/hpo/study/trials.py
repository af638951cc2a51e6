"""What the trials of a study add up to: how many, until when, which are best, why some failed.

Final runs (FINAL_SEEDS) are the last trials of a study: the five best configurations again, each as
a trial with a number, and so a seed, of its own.  The user attribute `final_of` marks them and is
the number of the trial that was best.  The search is over before the first of them begins; which
trial a final run repeats follows from its number, so that workers need no word between them.
"""

from __future__ import annotations

import math
import re
import statistics
from bisect import insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.settings import FINALISTS, Settings
from hpo.study.cache import Follower
from hpo.words import one_line, shown, values

FINAL_OF = "final_of"  # user attribute of a final run: the number of the trial that it repeats
STOPS = "stops_study"  # user attribute of a trial that called study.stop()
# User attributes of a trial that are the bundle's.
OURS = ("worker", "fail_reason", STOPS, FINAL_OF)


@dataclass(frozen=True)
class Counts:
    """How many trials of a study are in which state, and with how many it ends."""

    complete: int
    pruned: int
    failed: int
    running: int
    waiting: int
    total: int  # never less than there are

    @property
    def finished(self) -> int:
        """Those that will not run again."""
        return self.complete + self.pruned + self.failed

    @property
    def left(self) -> int:
        """Those that are still to be finished."""
        return self.total - self.finished

    def __str__(self) -> str:
        return (
            f"{self.finished} of {self.total} trials: {self.complete} complete, "
            f"{self.pruned} pruned, {self.failed} failed, {self.running} running, "
            f"{self.waiting} waiting"
        )


def count(study: optuna.Study, settings: Settings) -> Counts:
    """Return how far a study is."""
    trials = study.get_trials(deepcopy=False)
    states = Counter(trial.state for trial in trials)
    return Counts(
        complete=states[TrialState.COMPLETE],
        pruned=states[TrialState.PRUNED],
        failed=states[TrialState.FAIL],
        running=states[TrialState.RUNNING],
        waiting=states[TrialState.WAITING],
        total=max(total_of(study, settings), len(trials)),
    )


def total_of(study: optuna.Study, settings: Settings) -> int:
    """Return with how many trials a study ends: TOTAL_TRIALS, or when its finite space is done.

    Without TOTAL_TRIALS in the environment it is the one of the study's last job.
    """
    attributes = study.user_attrs
    total = settings.total_trials
    if not settings.total_is_given:
        total = int(attributes.get("total_trials", total))
    combinations = int(attributes.get("combinations", total))
    if combinations < total and attributes.get("final_runs") and best_searched(study, 1):
        combinations += int(attributes["final_runs"])
    return min(total, combinations)


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that are complete, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trials(study: optuna.Study, most: int | None = None) -> list[FrozenTrial]:
    """Return the best complete trials, the best first; with several objectives the whole front.

    A trial that breaks a constraint is never among them.  Without final runs the first is Optuna's
    study.best_trial; with them, the best of the configuration that has the best mean.
    """
    if not (ranked := finalists(study)):
        return best_searched(study, most)
    runs = {run.number for finalist in ranked for run in finalist.runs}
    others = [trial for trial in best_searched(study) if trial.number not in runs]
    return [*(finalist.trial for finalist in ranked), *others][:most]


def best_searched(study: optuna.Study, most: int | None = None) -> list[FrozenTrial]:
    """Return the best complete trials by their one value, without the final runs."""
    if len(study.directions) > 1:
        signs = [-1 if d == StudyDirection.MAXIMIZE else 1 for d in study.directions]
        return sorted(
            study.best_trials,
            key=lambda t: [sign * value for sign, value in zip(signs, t.values, strict=True)],
        )
    return _look(study).ranked[:most]


class _Ranking(Follower):
    """The complete trials of a study of one objective, in order."""

    def __init__(self, direction: StudyDirection) -> None:
        self._sign = -1 if direction == StudyDirection.MAXIMIZE else 1
        super().__init__()

    def forget(self) -> None:
        self.ranked: list[FrozenTrial] = []  # of the search and feasible, the best first
        self.finals: list[FrozenTrial] = []

    def take(self, trial: FrozenTrial) -> None:
        if trial.state != TrialState.COMPLETE:
            return
        if is_final(trial):
            self.finals.append(trial)
        elif is_feasible(trial):
            insort(self.ranked, trial, key=self._key)

    def _key(self, trial: FrozenTrial) -> tuple[float, int]:
        return self._sign * trial.values[0], trial.number


_rankings: WeakKeyDictionary[optuna.Study, _Ranking] = WeakKeyDictionary()


def _look(study: optuna.Study) -> _Ranking:
    """Return what is known of a study of one objective."""
    if study not in _rankings:
        _rankings[study] = _Ranking(study.direction)
    _rankings[study].look(study.get_trials(deepcopy=False))
    return _rankings[study]


def _ranked(study: optuna.Study, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    return sorted(trials, key=lambda trial: (sign * trial.values[0], trial.number))


def is_feasible(trial: FrozenTrial) -> bool:
    """Return whether a trial keeps all constraints (trial.set_constraint): each is at most 0."""
    return all(value <= 0 for value in trial.constraints.values())


def without_best(study: optuna.Study) -> str:
    """Return why a study has no best trial yet, in words."""
    if number := len(complete(study)):
        return f"no trial keeps the constraints yet ({number} complete)"
    return "no trial is complete yet"


def attributes(trial: FrozenTrial) -> dict[str, Any]:
    """Return what an objective has noted itself (trial.set_user_attr)."""
    return {name: value for name, value in trial.user_attrs.items() if name not in OURS}


class Stops(Follower):
    """The trials that have called study.stop()."""

    def forget(self) -> None:
        self._ended: set[int] = set()

    def take(self, trial: FrozenTrial) -> None:
        if trial.user_attrs.get(STOPS):
            self._ended.add(trial.number)

    def among(self, trials: list[FrozenTrial]) -> set[int]:
        """Return their numbers, also of those that still run."""
        running = {t.number for t in self.look(trials) if t.user_attrs.get(STOPS)}
        return running | self._ended


def fail_reasons(trials: Sequence[FrozenTrial]) -> list[tuple[str, int]]:
    """Return why trials failed, the most frequent reason first; numbers in it make no other one."""
    found: dict[str, list[str]] = {}
    for trial in trials:
        if trial.state == TrialState.FAIL:
            reason = one_line(trial.user_attrs.get("fail_reason", "")) or "unknown"
            found.setdefault(same_reason(reason), []).append(reason)
    grouped = [(reasons[0], len(reasons)) for reasons in found.values()]
    return sorted(grouped, key=lambda group: -group[1])


def same_reason(reason: str) -> str:
    """Return a reason without its numbers, which differ from trial to trial."""
    return re.sub(r"0x[0-9a-fA-F]+|[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", "#", reason)


# ---------- Final runs ----------


@dataclass(frozen=True)
class Finalist:
    """A configuration that was trained with several seeds."""

    trial: FrozenTrial  # its best final run: chance has not chosen it among hundreds
    runs: list[FrozenTrial]  # complete: the trial of the search, then the final runs
    mean: float  # of their values
    deviation: float  # of the sample

    def __str__(self) -> str:
        return f"{shown(self.mean)} ± {shown(self.deviation)}"


def is_final(trial: FrozenTrial) -> bool:
    """Return whether a trial is a final run, which no sampler, pruner or picture looks at."""
    return FINAL_OF in trial.user_attrs


def searched(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials that are no final runs."""
    return [trial for trial in trials if not is_final(trial)]


def without_finals(study: optuna.Study) -> optuna.Study:
    """Return a study for pictures: the same one, or a copy in which final runs are empty trials."""
    trials = study.get_trials(deepcopy=False)
    if not any(map(is_final, trials)):
        return study
    copied = optuna.create_study(study_name=study.study_name, directions=study.directions)
    empty = optuna.create_trial(state=TrialState.FAIL)  # in its place: the others keep their number
    copied.add_trials([empty if is_final(trial) else trial for trial in trials])
    return copied


def limit(trials: Sequence[FrozenTrial], end: int, runs: int) -> int:
    """Return how many trials a study may have now.

    Args:
        trials: those that it has.
        end: with how many the search ends.
        runs: final runs, which begin when no trial of the search is left.
    """
    goes_on = len(trials) < end or any(
        trial.number < end and not trial.state.is_finished() for trial in trials
    )
    return end if goes_on else end + runs


def repeated_by(study: optuna.Study, number: int, end: int) -> int | None:
    """Return which trial a new one repeats that has this number; None if it is of the search."""
    if number < end or limit(study.get_trials(deepcopy=False), end, 1) == end:
        return None
    best = best_searched(study, FINALISTS)
    return best[(number - end) % len(best)].number if best else None


def finalists(study: optuna.Study) -> list[Finalist]:
    """Return the configurations with final runs, the best mean first.

    None before each of the five best has one that is finished: until then no mean is compared.
    """
    if len(study.directions) > 1 or not _look(study).finals:
        return []
    trials = study.get_trials(deepcopy=False)
    groups: dict[int, list[FrozenTrial]] = {}
    for trial in filter(is_final, trials):
        groups.setdefault(trial.user_attrs[FINAL_OF], []).append(trial)
    for trial in best_searched(study, FINALISTS):
        if not any(run.state.is_finished() for run in groups.get(trial.number, [])):
            return []
    found = [_finalist(study, trials[number], runs) for number, runs in groups.items()]
    maximize = study.direction == StudyDirection.MAXIMIZE
    kept = [finalist for finalist in found if finalist]
    return sorted(kept, key=lambda f: (-f.mean if maximize else f.mean, f.trial.number))


def _finalist(
    study: optuna.Study, trial: FrozenTrial, final: Sequence[FrozenTrial]
) -> Finalist | None:
    """Return what several runs say together; None if there are not two, or one is infeasible."""
    again = [run for run in final if run.state == TrialState.COMPLETE]
    runs = [trial, *again]
    if not again or not all(map(is_feasible, runs)):
        return None
    numbers = [run.values[0] for run in runs]
    if not all(map(math.isfinite, numbers)):
        return Finalist(_ranked(study, again)[0], runs, sum(numbers), math.nan)
    mean, deviation = statistics.mean(numbers), statistics.stdev(numbers)
    return Finalist(_ranked(study, again)[0], runs, mean, deviation)


def to_keep(study: optuna.Study, most: int) -> set[int]:
    """Return the numbers of the trials whose weights are kept: the best, and final runs.

    Any finalist may turn out to be the best, as long as some of the runs are missing.
    """
    runs: dict[int, list[FrozenTrial]] = {}
    for trial in _look(study).finals if len(study.directions) == 1 else []:
        runs.setdefault(trial.user_attrs[FINAL_OF], []).append(trial)
    best = [_ranked(study, group)[0] for group in runs.values()]
    return {trial.number for trial in [*best_trials(study, most), *best]}


def best_line(study: optuna.Study) -> str:
    """Return the best so far in words; of several objectives, the size of the Pareto front."""
    if not (best := best_trials(study)):
        return without_best(study)
    if len(study.directions) > 1:
        return f"{len(best)} trials in the Pareto front"
    return f"best {best_in_words(study)}"


def best_in_words(study: optuna.Study) -> str:
    """Return which model is best, and what the best single value would have said; "" if none is."""
    single = best_searched(study, 1)
    if not single:
        return ""
    alone = f"{values(single[0].values)} (trial {single[0].number})"
    if not (ranked := finalists(study)):
        return alone
    best = ranked[0]
    return f"{best} (mean of {len(best.runs)} seeds, trial {best.trial.number}); by one run {alone}"
