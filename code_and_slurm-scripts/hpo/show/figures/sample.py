"""What of a study can be drawn: few enough trials, numbers that fit an axis, names that are text.

A study in memory with some of the trials of a real one, under their own numbers.  Left out are
values that no axis holds (infinite, or beyond ±1e100), and most trials of a very large study: those
that stay are the best, each that was the best so far, and the others evenly from first to last.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.study.trials import complete
from hpo.words import cut, shown

MOST = 1000  # complete trials in a picture: more are slow to draw, and look the same
LARGEST = 1e100  # the difference of two values must be a number, too


def drawable(study: optuna.Study, most: int = MOST) -> optuna.Study:
    """Return a study in memory with at most so many of the complete trials of another one."""
    fit = [trial for trial in complete(study) if all(map(fits_an_axis, trial.values))]
    chosen = thinned(fit, most, study.directions)
    return _with_trials(study, [_tidied(trial, cut_label) for trial in chosen])


def between(drawn: optuna.Study, objective: int, ends: tuple[float, float] | None) -> optuna.Study:
    """Return the same study without values beyond `ends`: one would take all colours."""
    if ends is None:
        return drawn
    low, high = ends
    return _with_trials(drawn, [t for t in complete(drawn) if low <= t.values[objective] <= high])


def for_matplotlib(drawn: optuna.Study) -> optuna.Study:
    """Return the same study with names and choices in which a $ begins no formula."""
    texts = [str(part) for t in complete(drawn) for pair in t.params.items() for part in pair]
    if not any("$" in text for text in texts):
        return drawn
    return _with_trials(drawn, [_tidied(trial, escaped) for trial in complete(drawn)])


def fits_an_axis(value: float) -> bool:
    """Return whether a value is a number that can be drawn beside others."""
    return -LARGEST < value < LARGEST


def thinned(
    trials: Sequence[FrozenTrial], most: int, directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """Return at most about `most` of complete trials, in their order: see the top of this file."""
    if len(trials) <= most:
        return list(trials)
    keep: set[int] = set()
    for objective, direction in enumerate(directions):
        sign = -1 if direction == StudyDirection.MAXIMIZE else 1
        found = [sign * trial.values[objective] for trial in trials]
        order = sorted(range(len(trials)), key=found.__getitem__)
        keep.update(order[: most // (4 * len(directions))])
        keep.update(_records(found))
    every = max(len(trials) // max(most - len(keep), 1), 1)
    keep.update(range(0, len(trials), every + 1))
    return [trials[index] for index in sorted(keep)]


def _records(values: Iterable[float]) -> list[int]:
    """Return where a value is smaller than all before it."""
    found, best = [], float("inf")
    for index, value in enumerate(values):
        if value < best:
            found.append(index)
            best = value
    return found


def cut_label(text: str) -> str:
    """Return a text that is short enough beside an axis."""
    return cut(text, 40)


def escaped(text: str) -> str:
    """Return a text that matplotlib shows as it is: broken formulas would end a picture."""
    return text.replace("$", r"\$")


def _tidied(trial: FrozenTrial, text: Callable[[str], str]) -> FrozenTrial:
    """Return a trial with all of its names and choices changed by `text`."""
    tidied = copy.copy(trial)
    pairs = [
        (_unique(text, name, trial.distributions), *_plain(value, trial.distributions[name], text))
        for name, value in trial.params.items()
    ]
    tidied.distributions = {name: distribution for name, _, distribution in pairs}
    tidied.params = {name: value for name, value, _ in pairs}
    return tidied


def _unique(text: Callable[[str], str], name: str, names: Iterable[str]) -> str:
    """Return the changed name, unless another one becomes the same."""
    same = [other for other in names if text(other) == text(name)]
    return text(name) if len(same) == 1 else f"{text(name)} ({same.index(name) + 1})"


def _plain(
    value: Any, distribution: BaseDistribution, text: Callable[[str], str]
) -> tuple[Any, BaseDistribution]:
    """Return a value and its distribution, in which choices are numbers or texts: no lists."""
    if not isinstance(distribution, CategoricalDistribution):
        return value, distribution
    labels: list[Any] = [
        choice if isinstance(choice, (bool, int, float, type(None))) else text(shown(choice))
        for choice in distribution.choices
    ]
    for index, label in enumerate(labels):
        if isinstance(label, str) and label in labels[:index]:
            labels[index] = f"{label} ({index})"
    chosen = int(distribution.to_internal_repr(value))
    return labels[chosen], CategoricalDistribution(labels)


def _with_trials(study: optuna.Study, trials: list[FrozenTrial]) -> optuna.Study:
    """Return a study in memory that gives these trials, under their own numbers."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # "a new study": nobody's news
    found = optuna.create_study(directions=study.directions, study_name=study.study_name)
    optuna.logging.set_verbosity(level)

    def get_trials(
        deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        return [trial for trial in trials if states is None or trial.state in states]

    found.get_trials = get_trials  # type: ignore[method-assign]
    return found
