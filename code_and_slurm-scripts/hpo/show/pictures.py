"""The pictures of a report: which there are, and how plotly and matplotlib draw each of them.

Optuna draws all but one, for the page (plotly) and as PNG (matplotlib); the timeline per worker
is drawn here, because Optuna's own has one line per trial.

plotly and matplotlib are imported when a picture is drawn, never before.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.study.trials import without_finals

MOST_CONTOURS = 4  # parameters: each pair of them is one contour plot
COLOURS = {
    TrialState.COMPLETE: "#1f77b4",
    TrialState.PRUNED: "#ff9f40",
    TrialState.FAIL: "#d62728",
    TrialState.RUNNING: "#2ca02c",
}
# A function of Optuna, called with the module optuna.visualization or its matplotlib twin.
Draw: TypeAlias = Callable[[Any], Any]


@dataclass(frozen=True)
class Picture:
    """One picture: `name` is its PNG and its anchor, `says` what one reads in it."""

    name: str
    title: str
    says: str
    draw: Draw


@dataclass(frozen=True)
class Bar:
    """One trial in the timeline: what its worker did between two local times."""

    worker: str
    trial: FrozenTrial
    start: datetime
    end: datetime


def pictures_of(whole: optuna.Study, names: list[str]) -> list[Picture]:
    """Return the pictures of a study with complete trials; `names` are those of its objectives.

    The timeline alone shows the final runs: they are no search.
    """
    study = without_finals(whole)
    if len(names) > 1:
        return [_pareto(study, names), *_of_several_objectives(study, names), _timeline(study)]
    shown = important_params(study)
    return [
        _picture(study, "history", "Optimisation history",
                 "One dot per complete trial; the line is the best value so far.",
                 "plot_optimization_history", target_name=names[0]),
        _picture(study, "importances", "Importance of the parameters",
                 "How much of the difference between the trials each parameter explains.",
                 "plot_param_importances", target_name=names[0]),
        _picture(study, "parallel", "Parallel coordinates",
                 "One line per complete trial, dark where good; drag along an axis to choose.",
                 "plot_parallel_coordinate", _widen, target_name=names[0]),
        _picture(study, "slice", "Slice", "The value over each parameter alone; darker is later.",
                 "plot_slice", target_name=names[0]),
        _picture(study, "contour", "Contour",
                 f"The value over two of the most important: {', '.join(shown)}.",
                 "plot_contour", _tidy_contours, params=shown, target_name=names[0]),
        _picture(study, "intermediate", "Intermediate values",
                 "One line per trial: what it reported after each epoch.  Blue ones are complete, "
                 "orange ones were pruned.",
                 "plot_intermediate_values", _colour_by_state),
        _timeline(whole),
        _picture(study, "edf", "Empirical distribution",
                 "The share of complete trials that reached a value, or a better one.",
                 "plot_edf", target_name=names[0]),
    ]  # fmt: skip


def important_params(study: optuna.Study) -> list[str]:
    """Return the parameters that explain most, at most MOST_CONTOURS; any, where none does."""
    try:
        ranked = list(optuna.importance.get_param_importances(study))
    except (ValueError, RuntimeError):  # fewer than two trials, or all of the same value
        ranked = list(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))[0].params)
    return ranked[:MOST_CONTOURS]


def bars(study: optuna.Study, now: datetime) -> list[Bar]:
    """Return what each worker did when, sorted by worker.

    The worker's name is the trial's user attribute `worker`.  Where there is none (a study of an
    older version, or of stock Optuna) trials are stacked into as few lines as do not overlap.
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
            free = [i for i, busy_until in enumerate(lanes) if busy_until <= start]
            lane = free[0] if free else len(lanes)
            lanes[lane : lane + 1] = [end]
            worker = f"line {lane + 1}"
        found.append(Bar(str(worker), trial, start, end))
    return sorted(found, key=lambda bar: (_natural(bar.worker), bar.start))


def _natural(text: str) -> list[tuple[int, str]]:
    """Sort "worker 10" behind "worker 9"."""
    return [(int(part or 0), word) for word, part in re.findall(r"(\D*)(\d*)", text)]


def _picture(
    study: optuna.Study, name: str, title: str, says: str, function: str,
    mend: Callable[[optuna.Study, Any], None] | None = None, **options: Any,
) -> Picture:  # fmt: skip
    """Return a picture that `function` of Optuna draws, and `mend` then changes in place."""

    def draw(module: Any) -> Any:
        drawn = getattr(module, function)(study, **options)
        if mend:
            mend(study, drawn)
        return drawn

    return Picture(name, title, says, draw)


def _tidy_contours(study: optuna.Study, drawn: Any) -> None:
    """Colours alone: over hundreds of values of one parameter the lines are a black area."""
    if hasattr(drawn, "update_traces"):
        drawn.update_traces(line_width=0, selector={"type": "contour"})
        drawn.update_traces(marker_size=3, selector={"type": "scatter"})
        drawn.update_layout(height=900)
        return
    for axes in drawn.flat if hasattr(drawn, "flat") else [drawn]:
        axes.figure.set_size_inches(13, 11)
        axes.label_outer()  # otherwise the names lie over the neighbours
        for collection in axes.collections:
            if type(collection).__name__ == "QuadContourSet" and not collection.filled:
                collection.set_visible(False)


def _widen(study: optuna.Study, drawn: Any) -> None:
    if hasattr(drawn, "figure"):  # matplotlib's; a page has the width of its window
        drawn.figure.set_size_inches(13, 6)


def _colour_by_state(study: optuna.Study, drawn: Any) -> None:
    """Two colours for all trials; Optuna has one for each, and a legend of 500 lines."""
    states = {f"Trial{t.number}": t.state for t in study.get_trials(deepcopy=False)}
    if hasattr(drawn, "update_traces"):
        for trace in drawn.data:
            trace.line = {"color": COLOURS[states[trace.name]], "width": 1}
            trace.marker = {"size": 3, "color": COLOURS[states[trace.name]]}
            trace.opacity = 0.6
        return
    for line in drawn.get_lines():
        line.set(color=COLOURS[states[line.get_label()]], linewidth=0.7)
    if drawn.get_legend():
        drawn.get_legend().remove()


def _pareto(study: optuna.Study, names: list[str]) -> Picture:
    says = "Every complete trial; the front are those that no other trial beats in all objectives."
    if len(names) <= 3:
        return _picture(
            study, "pareto", "Pareto front", says, "plot_pareto_front", target_names=names
        )
    # Optuna draws two or three objectives: take the first two.
    return _picture(
        study, "pareto", "Pareto front", says, "plot_pareto_front", target_names=names[:2],
        targets=lambda trial: trial.values[:2],
    )  # fmt: skip


def _of_several_objectives(study: optuna.Study, names: list[str]) -> list[Picture]:
    """Return Optuna's pictures for one value, each drawn for every objective."""
    kinds = (
        ("history", "Optimisation history", "plot_optimization_history"),
        ("importances", "Importance of the parameters", "plot_param_importances"),
        ("parallel", "Parallel coordinates", "plot_parallel_coordinate"),
        ("slice", "Slice", "plot_slice"),
        ("edf", "Empirical distribution", "plot_edf"),
    )
    return [
        _picture(
            study, f"{kind}-{name}", f"{title}: {name}", f"For the objective {name} alone.",
            function, target=partial(_value_of, i), target_name=name,
        )
        for kind, title, function in kinds
        for i, name in enumerate(names)
    ]  # fmt: skip


def _value_of(objective: int, trial: FrozenTrial) -> float:
    return float(trial.values[objective])


def _timeline(study: optuna.Study) -> Picture:
    def draw(module: Any) -> Any:
        matplotlib = module is not optuna.visualization
        return (_matplotlib_timeline if matplotlib else _plotly_timeline)(
            bars(study, datetime.now())
        )

    says = "Which worker ran which trial when: gaps are time in which a GPU had nothing to do."
    return Picture("timeline", "Timeline per worker", says, draw)


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
        barmode="overlay", bargap=0.15, height=160 + 28 * len(workers), showlegend=True,
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
    _, axes = plt.subplots(figsize=(10, 1.6 + 0.3 * len(workers)))
    for state, colour in COLOURS.items():
        mine = [bar for bar in found if bar.trial.state == state]
        starts = [_days(bar.start) for bar in mine]
        days = [(bar.end - bar.start) / timedelta(days=1) for bar in mine]
        if mine:
            rows = [workers.index(bar.worker) for bar in mine]
            axes.barh(rows, days, left=starts, color=colour, label=state.name.lower(),
                      edgecolor="white", linewidth=0.3)  # fmt: skip
    axes.set_yticks(range(len(workers)), workers)
    axes.invert_yaxis()
    axes.xaxis_date()
    axes.figure.autofmt_xdate()
    axes.set_title("Timeline per worker")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return axes
