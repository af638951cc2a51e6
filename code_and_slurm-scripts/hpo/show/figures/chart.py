"""Lines over an axis, drawn alike by plotly (for the page) and by matplotlib (for a paper).

plotly and matplotlib are imported when something is drawn, never before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna

from hpo.show.figures.sample import escaped


@dataclass(frozen=True)
class Line:
    """One entry of the legend; a None among `y` is a gap."""

    name: str
    x: Sequence[float | datetime]
    y: Sequence[float | None]
    colour: str
    step: bool = False  # the value holds until the next one
    width: float = 1.5
    filled: bool = False
    dots: bool = False  # instead of a line


def draw_lines(module: Any, lines: Sequence[Line], x_title: str, y_title: str) -> Any:
    """Return a figure of plotly, or axes of matplotlib: whichever `module` of Optuna's is for.

    Raises:
        ValueError: there is nothing to draw.
    """
    lines = [line for line in lines if len(line.x)]
    if not lines:
        raise ValueError("there is nothing to draw")
    draw = _with_plotly if module is optuna.visualization else _with_matplotlib
    return draw(lines, x_title, y_title)


def _with_plotly(lines: Sequence[Line], x_title: str, y_title: str) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for line in lines:
        figure.add_scatter(
            x=list(line.x), y=list(line.y), name=line.name,
            mode="markers" if line.dots else "lines" if line.step and len(line.x) > 1
            else "lines+markers",
            marker={"color": line.colour, "size": 5 if line.dots or line.step else 3},
            line={"color": line.colour, "width": line.width, "shape": "hv" if line.step else None},
            fill="tozeroy" if line.filled else None,
        )  # fmt: skip
    return figure.update_layout(
        xaxis_title=x_title, yaxis_title=y_title, showlegend=len(lines) > 1 or not lines[0].filled
    )


def _with_matplotlib(lines: Sequence[Line], x_title: str, y_title: str) -> Any:
    import matplotlib.pyplot as plt

    _, axes = plt.subplots()
    for line in lines:
        x: Any = list(line.x)
        y: Any = [float("nan") if value is None else value for value in line.y]
        marks = not line.step or len(x) == 1
        axes.plot(
            x, y, label=escaped(line.name), color=line.colour, linewidth=line.width * 0.6,
            drawstyle="steps-post" if line.step else None, marker="." if marks else None,
            linestyle="none" if line.dots else None,
            markersize=3 if line.dots or line.step else 1.5,
        )  # fmt: skip
        if line.filled:
            axes.fill_between(
                x, y, step="post" if line.step else None, color=line.colour, alpha=0.4
            )
    axes.set(xlabel=escaped(x_title), ylabel=escaped(y_title))
    if len(lines) > 1:
        axes.legend()
    if isinstance(lines[0].x[0], datetime):
        axes.figure.autofmt_xdate()
    return axes
