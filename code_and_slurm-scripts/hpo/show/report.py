"""One HTML page with every picture of a study, which opens offline, and the same as PNGs.

    python check_best_model.py --report          report-STUDY_NAME/ beside study.db
    python check_best_model.py --report DIR      DIR/report.html, DIR/history.png, …

plotly.js is in the page once (4.8 of its at most 10 MB), so neither a server nor a network is
needed: copy report.html to your own machine and open it.  Every file is written under another
name and renamed: a report that is open in a browser stays whole while the next one is written.
"""

from __future__ import annotations

import html
import platform
import time
import warnings
from datetime import timedelta
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo import packages
from hpo.files import whole
from hpo.settings import Settings, UserError
from hpo.show.pictures import Picture, pictures_of
from hpo.study.opening import backup_in_use
from hpo.study.trials import best_in_words, best_trials, complete, without_best
from hpo.words import shown

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {{ font-family: system-ui, "DejaVu Sans", sans-serif; margin: 0 auto; max-width: 1200px;
        padding: 1rem 2rem 4rem; color: #222; }}
h1 {{ font-size: 1.6rem; }}  h2 {{ font-size: 1.2rem; margin: 2.5rem 0 .2rem; }}
nav a {{ margin-right: 1rem; }}  p {{ margin: .2rem 0 .6rem; color: #555; }}
.tables {{ display: flex; flex-wrap: wrap; gap: 2.5rem; }}
td {{ padding: .15rem 1rem .15rem 0; vertical-align: top; }}  td:first-child {{ color: #555; }}
.missing {{ border-left: 4px solid #ff9f40; padding: .3rem .8rem; }}
</style>
<script>{plotly_js}</script></head>
<body><h1>{title}</h1>
<div class="tables">{tables}</div>
<nav>{links}</nav>
{sections}
</body></html>
"""


def write_report(study: optuna.Study, settings: Settings, folder: Path | None) -> Path:
    """Write report.html and its PNGs into `folder` (None: beside study.db); return the page.

    Raises:
        UserError: no trial is complete, a package is missing, or the folder cannot be written.
    """
    if not complete(study):
        raise UserError(f"study {study.study_name!r} has no complete trial yet: nothing to draw")
    _need_packages()
    folder = folder or settings.beside / f"report-{settings.study_name}"
    names = objective_names(study)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # what cannot be drawn, the page says
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls its pictures experimental
            pictures = pictures_of(study, names)
            for picture in pictures:
                _write_png(picture, folder)
            page = _page(study, settings, names, pictures)
        with whole(folder / "report.html", durable=False) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from error
    return folder / "report.html"


def objective_names(study: optuna.Study) -> list[str]:
    """Return the names of the study's objectives, as it remembers them."""
    plain = [f"objective {i}" for i in range(len(study.directions))]
    if len(plain) == 1:
        plain = ["value"]
    names = study.user_attrs.get("objectives", plain)
    return [str(name) for name in names] if len(names) == len(plain) else plain


def facts(study: optuna.Study, settings: Settings, names: list[str]) -> dict[str, dict[str, str]]:
    """Return the tables on top of the page: title → name → value, all of it text."""
    trials = study.get_trials(deepcopy=False)
    return {
        "Trials": _numbers(trials),
        "Best trial": _best(study, names),
        "Settings": {
            "storage": f"{settings.shown_db} {backup_in_use(study)}".strip(),
            "objective": str(study.user_attrs.get("py_script", settings.py_script)),
            "direction": ", ".join(
                f"{direction.name.lower()} {name}"
                for name, direction in zip(names, study.directions, strict=True)
            ),
            "sampler": str(study.user_attrs.get("sampler", settings.sampler)),
            "pruner": str(study.user_attrs.get("pruner", settings.pruner)),
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
            "versions": f"Python {platform.python_version()}, Optuna {optuna.__version__}",
        },
    }


def _numbers(trials: list[FrozenTrial]) -> dict[str, str]:
    """Return how many trials are in which state, and how long the study took."""
    table = {"all": str(len(trials))}
    for state in TrialState:
        number = sum(trial.state == state for trial in trials)
        if number or state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL):
            table[state.name.lower()] = str(number)
    ends = [t.datetime_complete for t in trials if t.datetime_complete]
    starts = [t.datetime_start for t in trials if t.datetime_start]
    if starts and ends:
        table["first start"] = f"{min(starts):%Y-%m-%d %H:%M:%S}"
        table["last end"] = f"{max(ends):%Y-%m-%d %H:%M:%S}"
    work = sum((t.duration or timedelta() for t in trials), timedelta())
    table["time in trials"] = f"{work.total_seconds() / 3600:.2f} h"
    workers = {t.user_attrs["worker"] for t in trials if "worker" in t.user_attrs}
    return {**table, "workers": str(len(workers))} if workers else table


def _best(study: optuna.Study, names: list[str]) -> dict[str, str]:
    best = best_trials(study)
    if not best:
        return {"none": without_best(study)}
    if len(names) > 1:
        rows = {"Pareto front": f"{len(best)} trials"}
        for trial in best[:8]:
            pairs = zip(names, trial.values, strict=True)
            rows[f"trial {trial.number}"] = ", ".join(f"{n} {shown(v)}" for n, v in pairs)
        return rows
    rows = {names[0]: best_in_words(study)}
    return rows | {name: shown(value) for name, value in best[0].params.items()}


def _need_packages() -> None:
    """Prepare what draws the pictures; raises UserError with the command that installs it."""
    packages.need("a report", "plotly", "matplotlib", "scipy")
    import matplotlib

    matplotlib.use("agg")  # no display is needed


def _page(
    study: optuna.Study, settings: Settings, names: list[str], pictures: list[Picture]
) -> str:
    from plotly.offline import get_plotlyjs

    tables = "".join(
        f"<div><h2>{html.escape(title)}</h2>{_table(rows)}</div>"
        for title, rows in facts(study, settings, names).items()
    )
    return PAGE.format(
        title=html.escape(f"Study {study.study_name}"),
        tables=tables,
        links="".join(f'<a href="#{p.name}">{html.escape(p.title)}</a>' for p in pictures),
        sections="\n".join(map(_section, pictures)),
        plotly_js=get_plotlyjs(),
    )


def _table(rows: dict[str, str]) -> str:
    cells = (
        f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in rows.items()
    )
    return f"<table>{''.join(cells)}</table>"


def _section(picture: Picture) -> str:
    head = f'<h2 id="{picture.name}">{html.escape(picture.title)}</h2>'
    try:
        figure = picture.draw(optuna.visualization)
        if not figure.data:  # Optuna's answer to one parameter, or to trials without reports
            raise ValueError("the study has too few trials, parameters or reports for it")
    except (ValueError, RuntimeError, IndexError, KeyError) as error:  # e.g. all of one value
        return f'{head}<p class="missing">not drawn: {html.escape(str(error))}</p>'
    figure.update_layout(title=None, margin={"t": 30, "b": 60}, autosize=True, width=None)
    figure.update_xaxes(exponentformat="power", automargin=True)
    if len(figure.data) > 5:  # many small axes: two or three numbers fit under each
        figure.update_xaxes(nticks=3, selector={"type": "log"})
    body = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{picture.name}",
        config={"responsive": True, "displaylogo": False},
    )
    return f"{head}<p>{html.escape(picture.says)}</p>{body}"


def _write_png(picture: Picture, folder: Path) -> None:
    import matplotlib.pyplot as plt

    try:
        axes = picture.draw(optuna.visualization.matplotlib)
    except (ValueError, RuntimeError, IndexError, KeyError):  # the page says why
        plt.close("all")
        return
    figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
    save = {"format": "png", "dpi": 100, "bbox_inches": "tight"}
    with whole(folder / f"{picture.name}.png", durable=False) as temporary:
        figure.savefig(temporary, **save)
    plt.close("all")
