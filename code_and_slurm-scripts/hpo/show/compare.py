"""Two or more studies side by side, on one page that opens offline.

python check_best_model.py --compare tpe_study random_study       compare-…/report.html
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.settings import Settings, UserError
from hpo.show import facts, page
from hpo.show.figures.chart import Line, draw_lines
from hpo.show.figures.distribution import COLOURS, distribution
from hpo.show.figures.pictures import Picture, best_so_far, limits, value_axis
from hpo.show.figures.sample import fits_an_axis
from hpo.show.report import Drawing, need_packages, write_page
from hpo.study.opening import open_study
from hpo.study.trials import complete, is_feasible
from hpo.words import shown


def compare(names: Sequence[str], settings: Settings) -> Path:
    """Write the page on the studies of these names in STUDY_DB; return its path.

    Raises:
        UserError: fewer than two, one that is not there, or they have no common objective.
    """
    names = list(dict.fromkeys(names))
    if not 2 <= len(names) <= len(COLOURS):
        raise UserError(f"--compare takes 2 to {len(COLOURS)} studies of {settings.shown_db}")
    each = [replace(settings, study_name=name, total_is_given=False) for name in names]
    studies = [open_study(one) for one in each]
    if len({tuple(study.directions) for study in studies}) > 1 or len(studies[0].directions) > 1:
        directions = (
            f"{s.study_name} ({', '.join(d.name.lower() for d in s.directions)})" for s in studies
        )
        raise UserError(f"these cannot be compared by one value: {', '.join(directions)}")
    need_packages()
    folder = settings.beside / f"compare-{'-'.join(names)}"[:200]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = Drawing(folder).sections(*[_pictures(studies)] * 2)
        sections = [_table(studies, each), *(section for _, section in drawn.values())]
        write_page(folder / "report.html", page.page(f"Studies {', '.join(names)}", sections))
    except OSError as error:
        raise UserError(f"the page cannot be written to {folder}: {error.strerror}") from error
    return folder / "report.html"


def _table(studies: Sequence[optuna.Study], settings: Sequence[Settings]) -> str:
    """Return a column per study, and a row per fact; settings that differ are marked."""
    columns = [_facts(study, one) for study, one in zip(studies, settings, strict=True)]
    asked = [facts.settings_of(study, one) for study, one in zip(studies, settings, strict=True)]
    rows = []
    for of_each, marked in ((columns, False), (asked, True)):
        for name in dict.fromkeys(name for column in of_each for name in column):
            cells = [column.get(name, "") for column in of_each]
            different = marked and len(set(cells)) > 1
            text = "".join(f"<td>{html.escape(cell)}</td>" for cell in (name, *cells))
            mark = ' class="different"' if different else ""
            rows.append(f"<tr{mark}>{text}</tr>")
    head = "".join(f"<th>{html.escape(study.study_name)}</th>" for study in studies)
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _facts(study: optuna.Study, settings: Settings) -> facts.Rows:
    names = facts.objective_names(study)
    return {
        **facts.progress(study, settings),
        **facts.times(study),
        **facts.best(study, names, {}),
    }


def _pictures(studies: Sequence[optuna.Study]) -> list[Picture]:
    by_trials = partial(_best_lines, studies, lambda trial, hours: trial.number, "trial")
    by_hours = partial(_best_lines, studies, lambda trial, hours: hours, "worker hours")
    return [
        Picture("best", "Best value over the trials", "The best value so far.", by_trials),
        Picture("hours", "Best value over the work",
                "The best value so far over the time that all trials took together, in hours.",
                by_hours),
        Picture("edf", "Empirical distribution",
                "The share of complete trials that reached a value, or a better one.",
                partial(_distribution, studies)),
    ]  # fmt: skip


def _fit(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in complete(study) if fits_an_axis(t.values[0]) and is_feasible(t)]


def _best_lines(
    studies: Sequence[optuna.Study],
    place: Callable[[FrozenTrial, float], float],
    title: str,
    module: Any,
) -> Any:
    lines = []
    for study, colour in zip(studies, COLOURS, strict=False):
        hours, until = 0.0, {}
        for trial in study.get_trials(deepcopy=False):
            hours += trial.duration.total_seconds() / 3600 if trial.duration else 0.0
            until[trial.number] = hours
        trials = _fit(study)
        x = [place(trial, until[trial.number]) for trial in trials]
        y = best_so_far([trial.values[0] for trial in trials], study.direction)
        lines.append(Line(_label(study), x, y, colour, step=True))
    return draw_lines(module, lines, title, "best value")


def _label(study: optuna.Study) -> str:
    found = _fit(study)
    if not found:
        return study.study_name
    best = best_so_far([trial.values[0] for trial in found], study.direction)[-1]
    return f"{study.study_name} ({shown(best)})"


def _distribution(studies: Sequence[optuna.Study], module: Any) -> Any:
    named = {study.study_name: [t.values[0] for t in _fit(study)] for study in studies}
    every = [value for values in named.values() for value in values]
    mend = value_axis("x", limits(every, studies[0].direction))
    return distribution(named, studies[0].direction, "value", mend, module)
