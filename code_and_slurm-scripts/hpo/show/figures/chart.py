"""Lines over an axis, drawn alike by plotly (for the page) and by matplotlib (for a paper).

Also what makes Optuna's pictures and ours look alike, and their axes readable when they are small.
plotly and matplotlib are imported when something is drawn, never before.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
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
    if _whole(x for line in lines for x in line.x):
        figure.update_xaxes(dtick=1)
    if lines[0].filled:
        figure.update_yaxes(rangemode="tozero", dtick=1 if _whole(map(_up, lines[0].y)) else None)
    return figure.update_layout(
        xaxis_title=x_title, yaxis_title=y_title, showlegend=len(lines) > 1 or not lines[0].filled
    )


def _with_matplotlib(lines: Sequence[Line], x_title: str, y_title: str) -> Any:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

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
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel=escaped(x_title), ylabel=escaped(y_title))
    if all(isinstance(x, int) for line in lines for x in line.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(lines) > 1:
        axes.legend()
    if isinstance(lines[0].x[0], datetime):
        axes.figure.autofmt_xdate()
    return axes


def _up(value: float | None) -> int:
    return math.ceil(value or 0)


def _whole(numbers: Iterable[Any]) -> bool:
    """Return whether an axis of these is to have a mark at each whole number, and no other."""
    found = list(numbers)
    return all(isinstance(x, int) for x in found) and 0 < max(found) - min(found) <= 10


# ---------- Any picture ----------


def tidy_plotly(figure: Any, panels: int) -> None:
    """Change a figure of plotly: small margins, long names in lines, few marks on small axes."""
    figure.update_layout(title=None, margin={"t": 60, "b": 60, "l": 60, "r": 30}, autosize=True)
    figure.update_layout(width=None, legend={"orientation": "h", "x": 0, "y": 1})
    figure.update_layout(legend_yanchor="bottom")
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    for axis in (*figure.select_xaxes(), *figure.select_yaxes()):
        if panels > 1 and axis.title.text:  # side by side
            axis.title.text = wrapped(axis.title.text, "<br>")
        if panels > 1 and axis.type != "category" and axis.tickmode != "array":  # no words
            axis.update(nticks=4, tickangle=0)
    for letter in "xy":
        for trace in figure.data:
            if reference := getattr(trace, f"{letter}axis", None):
                axis = figure.layout[f"{letter}axis{reference[1:]}"]
                if axis.type == "log":
                    _mark_log(axis, getattr(trace, letter))


def _mark_log(axis: Any, numbers: Sequence[float] | None) -> None:
    """Give a logarithmic axis a few marks: plotly's lie one over the other."""
    ends = [10**end for end in axis.range] if axis.range else numbers
    if ends is not None and (marks := log_marks(min(ends), max(ends))):
        axis.update(tickvals=marks, ticktext=list(map(_power, marks)))


def log_marks(low: float, high: float) -> list[float]:
    """Return two or three round numbers between two others, or fewer if there are none."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for digits in ((1,), (1, 3), (1, 2, 5)):
        every = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in digits]
        found = [mark for mark in every if low <= mark <= high]
        if len(found) > 1:
            return found[:: math.ceil(len(found) / 3)] if digits == (1,) else [found[0], found[-1]]
    return found


def _power(number: float) -> str:
    digit, power = f"{number:.0e}".split("e")
    return f"{digit}e{int(power)}" if abs(int(power)) > 1 else f"{number:g}"


def tidy_matplotlib(figure: Any, panels: int) -> None:
    """Change a figure of matplotlib: letters of one size, no title: a paper's text has one."""
    from matplotlib.ticker import NullFormatter

    figure.suptitle("")
    for axes in figure.axes:
        for place in ("left", "center", "right"):
            axes.set_title("", loc=place)
        for axis in (axes.xaxis, axes.yaxis):
            axis.label.set_size(9)
            if panels > 1:
                axis.label.set_text(wrapped(axis.label.get_text(), "\n"))
            if axis.get_scale() == "log" and (
                marks := log_marks(*sorted(axis.get_view_interval()))
            ):
                axis.set_ticks(marks, list(map(_power, marks)))
                axis.set_minor_formatter(NullFormatter())
        axes.tick_params(labelsize=8)
        for text in axes.get_legend().get_texts() if axes.get_legend() else []:
            text.set_size(8)


def wrapped(name: str, mark: str, most: int = 18) -> str:
    """Return a name in several lines with `mark` between them; they end behind a _ or a space."""
    lines = [""]
    for part in re.split(r"(?<=[_\s./-])", name):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return mark.join(lines)
