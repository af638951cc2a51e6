"""Who ran which trial when, and how many workers had one: drawn here, Optuna has a line per trial.

plotly and matplotlib are imported when a picture is drawn, never before.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.show.figures.chart import Line, draw_lines

MOST_BARS = 1000
MOST_HEIGHT = 740  # pixels of all workers: with its title it is on one sheet of paper
MOST_NAMES = 60  # of workers, beside a picture of a sheet's height
SLOTS = 300  # of the picture of utilisation
COLOURS = {
    TrialState.COMPLETE: "#1f77b4",
    TrialState.PRUNED: "#ff9f40",
    TrialState.FAIL: "#d62728",
    TrialState.RUNNING: "#2ca02c",
}


@dataclass(frozen=True)
class Bar:
    """One trial in the timeline: what its worker did between two local times."""

    worker: str
    trial: FrozenTrial
    start: datetime
    end: datetime


def bars(study: optuna.Study, now: datetime) -> list[Bar]:
    """Return what each worker did when, sorted by worker.

    The worker's name is the trial's user attribute `worker`, without its job.  Where there is none
    (stock Optuna's) trials are stacked into as few lines as do not overlap.
    """
    lanes: list[datetime] = []  # the end of the last trial in each line
    found = []
    trials = [t for t in study.get_trials(deepcopy=False) if t.datetime_start]
    for trial in sorted(trials, key=lambda t: t.datetime_start or now):
        if trial.state == TrialState.WAITING:
            continue
        start = trial.datetime_start or now
        end = max(trial.datetime_complete or now, start)
        worker = trial.user_attrs.get("worker")
        if worker is None:
            lane = next((i for i, busy in enumerate(lanes) if busy <= start), len(lanes))
            lanes[lane : lane + 1] = [end]
            worker = f"line {lane + 1}"
        found.append(Bar(str(worker).partition(", job ")[0], trial, start, end))
    return sorted(found, key=lambda bar: (_natural(bar.worker), bar.start))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort "worker 10" behind "worker 9"."""
    return [(int(part or 0), word) for word, part in re.findall(r"(\D*)(\d*)", text)]


def busy(found: list[Bar]) -> tuple[list[datetime], list[float]]:
    """Return when each of SLOTS equal parts of the study began, and how many had a trial then."""
    begin, end = min(bar.start for bar in found), max(bar.end for bar in found)
    slot = max((end - begin) / SLOTS, timedelta(microseconds=1))
    numbers = [0.0] * (SLOTS + 1)
    for bar in found:
        first, last = (bar.start - begin) / slot, (bar.end - begin) / slot
        for index in range(int(first), min(int(last), SLOTS) + 1):
            numbers[index] += min(last, index + 1) - max(first, index)
    return [begin + index * slot for index in range(SLOTS + 1)], numbers


def utilisation(study: optuna.Study, module: Any) -> Any:
    """Return the picture of how many workers had a trial. Raises ValueError without a trial."""
    found = bars(study, datetime.now())
    if not found:
        raise ValueError("no trial has begun")
    when, numbers = busy(found)
    line = Line("busy", when, list(numbers), COLOURS[TrialState.COMPLETE], step=True, filled=True)
    return draw_lines(module, [line], "", "workers with a trial")


def timeline(study: optuna.Study, module: Any) -> Any:
    """Return the picture of what each worker did. Raises ValueError without a trial."""
    found = bars(study, datetime.now())
    if not found:
        raise ValueError("no trial has begun")
    if len(found) > MOST_BARS:  # the latest
        since = sorted(bar.start for bar in found)[-MOST_BARS]
        found = [bar for bar in found if bar.start >= since]
    matplotlib = module is not optuna.visualization
    return (_matplotlib_timeline if matplotlib else _plotly_timeline)(found)


def _plotly_timeline(found: list[Bar]) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    for state, colour in COLOURS.items():
        mine = [bar for bar in found if bar.trial.state == state]
        if mine:
            figure.add_bar(
                orientation="h", name=state.name.lower(), marker_color=colour,
                y=[bar.worker for bar in mine], base=[bar.start.isoformat() for bar in mine],
                x=[(bar.end - bar.start) / timedelta(milliseconds=1) for bar in mine],
                customdata=[[b.trial.number, (b.end - b.start).total_seconds()] for b in mine],
                hovertemplate="trial %{customdata[0]}: %{customdata[1]:.1f} s<extra>%{y}</extra>",
            )  # fmt: skip
    workers = list(dict.fromkeys(bar.worker for bar in found))
    figure.update_layout(
        barmode="overlay", bargap=0.15, showlegend=True,
        height=160 + min(28 * len(workers), MOST_HEIGHT),
        xaxis={"type": "date"},
        yaxis={"categoryorder": "array", "categoryarray": workers[::-1], "automargin": True},
    )  # fmt: skip
    return figure


def _days(local: datetime) -> float:
    """Return a time as matplotlib counts it."""
    return (local - datetime(1970, 1, 1)) / timedelta(days=1)


def _matplotlib_timeline(found: list[Bar]) -> Any:
    import matplotlib.pyplot as plt

    workers = list(dict.fromkeys(bar.worker for bar in found))
    _, axes = plt.subplots()
    for state, colour in COLOURS.items():
        mine = [bar for bar in found if bar.trial.state == state]
        starts = [_days(bar.start) for bar in mine]
        days = [(bar.end - bar.start) / timedelta(days=1) for bar in mine]
        if mine:
            rows = [workers.index(bar.worker) for bar in mine]
            axes.barh(rows, days, left=starts, color=colour, label=state.name.lower(),
                      edgecolor="white", linewidth=0.3)  # fmt: skip
    every = range(0, len(workers), len(workers) // MOST_NAMES + 1)
    axes.set_yticks(every, [workers[row].replace("$", r"\$") for row in every])
    axes.invert_yaxis()
    axes.xaxis_date()
    axes.figure.autofmt_xdate()
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes
