"""What the trials of a study add up to: how many, until when, which are best, why some failed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.settings import Settings
from hpo.words import one_line

OURS = ("worker", "fail_reason", "stops_study")  # user attributes of a trial that are the bundle's


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
    return min(total, int(attributes.get("combinations", total)))


def complete(study: optuna.Study) -> list[FrozenTrial]:
    """Return the trials that are complete, in order."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def best_trials(study: optuna.Study, most: int | None = None) -> list[FrozenTrial]:
    """Return the best complete trials, the best first; with several objectives the whole front.

    The first is Optuna's study.best_trial: a trial that breaks a constraint is never among them.
    """
    if len(study.directions) > 1:
        signs = [-1 if d == StudyDirection.MAXIMIZE else 1 for d in study.directions]
        return sorted(
            study.best_trials,
            key=lambda t: [sign * value for sign, value in zip(signs, t.values, strict=True)],
        )
    sign = -1 if study.direction == StudyDirection.MAXIMIZE else 1
    feasible = [trial for trial in complete(study) if is_feasible(trial)]
    return sorted(feasible, key=lambda trial: (sign * trial.values[0], trial.number))[:most]


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
