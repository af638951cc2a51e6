"""The pictures of a report: which there are, and what one reads in them.

Optuna draws most, with plotly for the page and with matplotlib for a paper; what it draws one line
per trial for, or not at all, is in timeline.py and chart.py.  Any of them may raise anything: the
page then says so in its place.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import accumulate
from typing import Any, TypeAlias

import optuna
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from hpo.show.figures.chart import Line, draw_lines
from hpo.show.figures.distribution import distribution
from hpo.show.figures.sample import between, drawable, escaped, fits_an_axis, for_matplotlib
from hpo.show.figures.timeline import COLOURS, MOST_BARS, bars, timeline, utilisation
from hpo.study.trials import complete, is_feasible, without_finals

MOST_CONTOURS = 4  # parameters: each pair of them is one contour plot
CONTOUR_TRIALS = 100  # its grid has so many squared points for each pair
MOST_PARAMS = 12  # side by side in one picture
MOST_CURVES = 300
LEAST = 10  # complete trials: from fewer, importance and contour are noise
PAPER = 6.3, 3.9  # inches: as wide as the text of an A4 page
# A function of Optuna, called with the module optuna.visualization or its matplotlib twin.
Draw: TypeAlias = Callable[[Any], Any]
Limits: TypeAlias = "tuple[float, float] | None"


@dataclass(frozen=True)
class Picture:
    """One picture: `name` is its file and its anchor, `says` what one reads in it."""

    name: str
    title: str
    says: str
    draw: Draw
    panels: int = 1  # beside each other: a page of 400 px scrolls sideways
    size: tuple[float, float] = PAPER  # inches


def pictures_of(whole: optuna.Study, names: Sequence[str], paper: bool = False) -> list[Picture]:
    """Return the pictures of a study with complete trials; `names` are those of its objectives.

    `paper` ones are for matplotlib, to which a $ in a name would begin a formula.  The timeline
    alone shows the final runs: they are no search.
    """
    study = without_finals(whole)
    every = [trial for trial in complete(study) if all(map(fits_an_axis, trial.values))]
    drawn = drawable(study)
    few = drawable(study, CONTOUR_TRIALS)
    if paper:
        names = list(map(escaped, names))
        drawn, few = for_matplotlib(drawn), for_matplotlib(few)
    end = [_curves(study, names[0]), timeline_picture(whole), _utilisation(whole)]
    if len(names) > 1:
        found = [_pareto(drawn, names, _drawn_of(drawn, every))]
        for index, name in enumerate(names):
            each = _of_one(every, drawn, few, index, name, f"-{index + 1}-{_file_name(name)}")
            found += [picture for picture in each if not picture.name.startswith("contour")]
        return [*found, *end[1:]]
    first, *others = _of_one(every, drawn, few, 0, names[0], "")
    return [first, end[0], *others, *end[1:]]


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text)[:40]


def _drawn_of(study: optuna.Study, every: Sequence[FrozenTrial]) -> str:
    number = len(complete(study))
    if number == len(every):
        return ""
    return f"  Drawn are {number} of {len(every)} trials: the best, and others evenly."


def _of_one(
    every: Sequence[FrozenTrial],
    study: optuna.Study,
    few: optuna.Study,
    index: int,
    name: str,
    suffix: str,
) -> list[Picture]:
    """Return the pictures of one objective.

    `every` complete trial with a value that an axis holds; `study` has those that can be drawn, and
    `few` has few of them, for the contours.
    """
    title = f": {name}" if suffix else ""
    number, some_of = len(complete(study)), _drawn_of(study, every)
    of = f"{number} of {len(every)}" if some_of else str(number)
    ranked = important_params(study, index)
    many, some = ranked[:MOST_PARAMS], ranked[:MOST_CONTOURS]
    rest = (
        f" (the {len(many)} parameters that matter most of {len(ranked)})"
        if len(many) < len(ranked)
        else ""
    )
    values, direction = [trial.values[index] for trial in every], study.directions[index]
    axis = limits(values, direction)
    far = _cut_off(values, axis)
    close, few = between(study, index, axis), between(few, index, axis)
    target: dict[str, Any] = {"target_name": name}
    if suffix:  # with one objective Optuna knows which direction is good
        target["target"] = partial(_value_of, index)
    optunas = partial(_picture, study, suffix, title)
    return [
        Picture(f"history{suffix}", f"Optimisation history{title}",
                f"One dot per complete trial; the line is the best value so far.{some_of}{far}",
                partial(_history, study, index, name, value_axis("y", axis))),
        optunas("slice", "Slice",
                f"The value over each parameter alone; darker is later{rest}.{some_of}{far}",
                "plot_slice", value_axis("y", axis), panels=len(many), params=many,
                size=(max(2.1 * len(many), 4), 3.4), **target),
        _picture(close, suffix, title, "parallel", "Parallel coordinates",
                 f"One line per complete trial, dark where good{rest}."
                 f"{some_of}{far.replace('worse than the axis shows', 'worse than that')}",
                "plot_parallel_coordinate", _without_grid, panels=len(many) // 2 + 1, params=many,
                size=(10, 4.5), **target),
        optunas("importances", "Importance of the parameters",
                f"How much of the difference between {of} complete trials each parameter "
                f"explains{rest}.",
                "plot_param_importances", least=LEAST, params=many,
                **target | ({"target": _low_is_good(study, index)} if suffix else {})),
        _picture(few, suffix, title, "contour", "Contour",
                 f"The value over two of {', '.join(some)}; from {len(complete(few))} of "
                 f"{len(every)} trials.",
                 "plot_contour", _tidy_contours, least=LEAST, panels=len(some), params=some,
                 size=(10, 9), **target),
        Picture(f"edf{suffix}", f"Empirical distribution{title}",
                f"The share of {len(every)} complete trials that reached a value, or a better one."
                + far, partial(distribution, {"complete": values}, direction, name,
                              value_axis("x", axis))),
    ]  # fmt: skip


def important_params(study: optuna.Study, objective: int = 0) -> list[str]:
    """Return all parameters, those first that explain most, as far as that is known."""
    names = dict.fromkeys(name for trial in complete(study) for name in trial.params)
    try:
        target = _low_is_good(study, objective)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few trials: the page says how many they are
            ranked = list(optuna.importance.get_param_importances(study, target=target))
    except Exception:  # fewer than two trials, or all of the same value: then in any order
        ranked = []
    return list(dict.fromkeys([*ranked, *names]))


def limits(values: Sequence[float], direction: StudyDirection) -> Limits:
    """Return an axis that shows the good values well: a few very bad ones lie beyond it."""
    if len(values) < LEAST:
        return None
    sign = -1 if direction == StudyDirection.MAXIMIZE else 1
    ordered = sorted(sign * value for value in values)
    best, usual, worst = ordered[0], ordered[int(0.9 * len(ordered))], ordered[-1]
    if not worst - best > 4 * (usual - best) > 0:
        return None
    margin = 0.05 * (usual - best)
    ends = sign * (best - margin), sign * (best + 2 * (usual - best))
    return min(ends), max(ends)


def _cut_off(values: Sequence[float], axis: Limits) -> str:
    outside = sum(not axis[0] <= value <= axis[1] for value in values) if axis else 0
    return f"  {outside} trials are worse than the axis shows." if outside else ""


def value_axis(which: str, ends: Limits) -> Callable[[Any], None]:
    """Return what gives the axis of the values, x or y, the same ends in all pictures."""

    def change(drawn: Any) -> None:
        if ends is None:
            return
        if hasattr(drawn, "update_traces"):
            getattr(drawn, f"update_{which}axes")(range=ends)
            return
        for axes in drawn.flat if hasattr(drawn, "flat") else [drawn]:
            axes.set(**{f"{which}lim": ends})

    return change


def _picture(
    study: optuna.Study, suffix: str, objective: str, name: str, title: str, says: str,
    function: str, mend: Callable[[Any], None] | None = None, *, least: int = 1,
    panels: int = 1, size: tuple[float, float] = PAPER, **options: Any,
) -> Picture:  # fmt: skip
    """Return a picture that `function` of Optuna draws, and `mend` then changes in place."""

    def draw(module: Any) -> Any:
        number = len(complete(study))
        if number < least:
            raise ValueError(f"{number} complete trials would say nothing: it takes {least}")
        drawn = getattr(module, function)(study, **options)
        if mend:
            mend(drawn)
        return drawn

    return Picture(f"{name}{suffix}", f"{title}{objective}", says, draw, panels, size)


def _without_grid(drawn: Any) -> None:
    if hasattr(drawn, "figure"):  # matplotlib's: an axis stands on each parameter
        for axes in drawn.figure.axes:
            axes.grid(False)


def _tidy_contours(drawn: Any) -> None:
    """Colours alone: over hundreds of values of one parameter the lines are a black area."""
    if hasattr(drawn, "update_traces"):
        drawn.update_traces(line_width=0, selector={"type": "contour"})
        drawn.update_traces(marker_size=3, selector={"type": "scatter"})
        drawn.update_layout(height=900)
        return
    for axes in drawn.flat if hasattr(drawn, "flat") else [drawn]:
        axes.label_outer()  # otherwise the names lie over the neighbours
        for collection in axes.collections:
            if type(collection).__name__ == "QuadContourSet" and not collection.filled:
                collection.set_visible(False)


def _pareto(study: optuna.Study, names: Sequence[str], some_of: str) -> Picture:
    says = "The front are the complete trials that no other one beats in all objectives."
    options: dict[str, Any] = {"target_names": names}
    if len(names) > 3:  # Optuna draws two or three objectives: take the first two
        options = {"target_names": names[:2], "targets": lambda trial: trial.values[:2]}
    return _picture(study, "", "", "pareto", "Pareto front", says + some_of, "plot_pareto_front",
                    panels=5, **options)  # fmt: skip


def _value_of(objective: int, trial: FrozenTrial) -> float:
    return float(trial.values[objective])


def _low_is_good(study: optuna.Study, objective: int) -> Callable[[FrozenTrial], float]:
    """Return what Optuna's importance takes for a value: how a low one is reached."""
    sign = -1 if study.directions[objective] == StudyDirection.MAXIMIZE else 1
    return lambda trial: sign * _value_of(objective, trial)


def _history(
    study: optuna.Study, index: int, name: str, mend: Callable[[Any], None], module: Any
) -> Any:
    trials = complete(study)
    kept = [trial for trial in trials if is_feasible(trial)]
    others = [trial for trial in trials if not is_feasible(trial)]
    lines = [
        _dots("complete", kept, index, COLOURS[TrialState.COMPLETE]),
        _dots("breaks a constraint", others, index, "#999999"),
        Line("best so far", [trial.number for trial in kept],
             best_so_far([trial.values[index] for trial in kept], study.directions[index]),
             COLOURS[TrialState.FAIL], step=True),
    ]  # fmt: skip
    drawn = draw_lines(module, lines, "trial", name)
    mend(drawn)
    return drawn


def _dots(title: str, trials: Sequence[FrozenTrial], index: int, colour: str) -> Line:
    x, y = [trial.number for trial in trials], [trial.values[index] for trial in trials]
    return Line(title, x, y, colour, dots=True)


def best_so_far(values: Sequence[float], direction: StudyDirection) -> list[float]:
    """Return the best of each value and all before it."""
    better = max if direction == StudyDirection.MAXIMIZE else min
    return list(accumulate(values, better))


def _curves(study: optuna.Study, name: str) -> Picture:
    trials = [trial for trial in study.get_trials(deepcopy=False) if trial.intermediate_values]
    shown = trials[:: len(trials) // MOST_CURVES + 1]
    some = f"  Drawn are {len(shown)} of {len(trials)} trials." if len(shown) < len(trials) else ""

    def draw(module: Any) -> Any:
        states = [state for state in COLOURS if any(trial.state == state for trial in shown)]
        drawn = draw_lines(module, [_curve(state, shown) for state in states], "step", name)
        reported = [v for t in shown for v in t.intermediate_values.values() if fits_an_axis(v)]
        value_axis("y", limits(reported, study.directions[0]))(drawn)
        return drawn

    says = f"What each trial reported, after each epoch: one line per trial.{some}"
    return Picture("intermediate", "Intermediate values", says, draw)


def _curve(state: TrialState, trials: Sequence[FrozenTrial]) -> Line:
    """Return the curves of all trials of a state as one line, with a gap behind each."""
    x: list[float] = []
    y: list[float | None] = []
    for trial in trials:
        if trial.state == state:
            steps = sorted(trial.intermediate_values.items())
            x += [step for step, _ in steps] + [steps[-1][0]]
            y += [value if fits_an_axis(value) else None for _, value in steps] + [None]
    return Line(state.name.lower(), x, y, COLOURS[state], width=0.8)


def timeline_picture(study: optuna.Study) -> Picture:
    """Return the picture of who ran what when."""
    says = "Which worker ran which trial when: gaps are time in which it had nothing to do."
    found = bars(study, datetime.now())
    if len(found) > MOST_BARS:
        says += f"  Drawn are the latest {MOST_BARS} of {len(found)} trials."
    height = max(PAPER[1], min(0.15 * len({bar.worker for bar in found}), 9))
    size = PAPER[0], height
    return Picture("timeline", "Timeline per worker", says, partial(timeline, study), size=size)


def _utilisation(study: optuna.Study) -> Picture:
    says = "How many workers had a trial, over the time of the study."
    return Picture("utilisation", "Utilisation", says, partial(utilisation, study))
