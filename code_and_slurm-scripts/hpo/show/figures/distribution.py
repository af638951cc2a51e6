"""How many trials reached a value: of all trials, where Optuna's picture has a hundred points."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.study import StudyDirection

from hpo.show.figures.chart import Line, draw_lines

MOST = 1000  # points of a line
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")


def distribution(
    named: Mapping[str, Sequence[float]],
    direction: StudyDirection,
    title: str,
    mend: Callable[[Any], None],
    module: Any,
) -> Any:
    """Return the picture of one line for each name and its values; `mend` gives the axis its ends.

    Raises:
        ValueError: there is no value.
    """
    lines = [
        Line(name, *shares(values, direction), colour, step=True)
        for (name, values), colour in zip(named.items(), COLOURS, strict=False)
    ]
    drawn = draw_lines(module, lines, title, "share of the trials")
    mend(drawn)
    return drawn


def shares(values: Sequence[float], direction: StudyDirection) -> tuple[list[float], list[float]]:
    """Return values, and behind each the share of all that are as good or better; in steps."""
    ordered, number = sorted(values), len(values)
    rising = [index / max(number, 1) for index in range(number + 1)]
    share = rising[::-1] if direction == StudyDirection.MAXIMIZE else rising
    x = [*ordered[:1], *ordered]
    every = number // MOST + 1
    return x[:-1:every] + x[-1:], share[:-1:every] + share[-1:]
