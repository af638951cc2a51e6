"""One HTML page on a study, which opens offline, with its pictures and its trials as files.

    python check_best_model.py --report          report-STUDY_NAME/ beside study.db
    python check_best_model.py --report DIR      DIR/report.html, DIR/history.png, …

    report.html           summary, pictures, failures, trials, settings: all in one file
    history.png, .pdf, …  each picture as wide as a paper's text
    trials.csv            all trials;  trials-curves.csv: what they reported

plotly.js is in the page once (4.8 of its at most 10 MB), so neither a server nor a network is
needed: copy report.html to your own machine and open it.  Every file is written under another
name and renamed: a report that is open in a browser stays whole while the next one is written.

No picture can end the report: what cannot be drawn, or is not worth its time, the page says.
"""

from __future__ import annotations

import os
import time
import urllib.parse
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna

from hpo import packages
from hpo.files import whole
from hpo.settings import Settings, UserError
from hpo.show import facts, page
from hpo.show.figures.chart import tidy_matplotlib, tidy_plotly
from hpo.show.figures.pictures import Picture, pictures_of
from hpo.show.trial_table import LOGS, for_page, write_csv
from hpo.study.trials import best_trials, complete, fail_reasons, without_best
from hpo.words import cut, one_line

SECONDS = 12.0  # of CPU for the pictures: a job keeps 90 s for all that it does at its end


def write_report(
    study: optuna.Study,
    settings: Settings,
    folder: Path | None,
    scored: Mapping[str, str] | None = None,
) -> Path:
    """Write the page and its files into `folder` (None: beside study.db); return the page.

    `scored` is what the script says of the best trial (results.tested).

    Raises:
        UserError: a package is missing, or the folder cannot be written.
    """
    need_packages()
    folder = folder or settings.beside / f"report-{settings.study_name}"
    names = facts.objective_names(study)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawn = Drawing(folder).sections(
            *(
                pictures_of(study, names, paper) if complete(study) else []
                for paper in (False, True)
            )
        )
        write_csv(study, settings, names, folder / "trials.csv")
        text = page.page(
            f"Study {study.study_name}",
            [
                page.tables(
                    {
                        "Best trial": facts.best(study, names, scored or {}),
                        "Trials": facts.progress(study, settings),
                        "Time": facts.times(study),
                    }
                ),
                *_pictures(study, drawn),
                _failures(study),
                _trials(study, settings, names, folder),
                page.section(
                    "settings", "Settings", page.pairs(facts.settings_of(study, settings))
                ),
            ],
        )
        write_page(folder / "report.html", text)
    except OSError as error:
        raise UserError(f"the report cannot be written to {folder}: {error.strerror}") from error
    return folder / "report.html"


def write_page(path: Path, text: str) -> None:
    """Write a page whole; a character that is none (half of a pair) is a question mark."""
    with whole(path, durable=False) as temporary:
        temporary.write_bytes(text.encode("utf-8", "replace"))


def need_packages() -> None:
    """Prepare what draws the pictures; raises UserError with the command that installs it."""
    packages.need("a report", "plotly", "matplotlib", "scipy")
    import matplotlib

    matplotlib.use("agg")  # no display is needed


def _pictures(study: optuna.Study, drawn: Mapping[str, tuple[str, str]]) -> list[str]:
    """Return the list of what follows, and the pictures: anchor → title and section."""
    titles = {anchor: title for anchor, (title, _) in drawn.items()}
    others = {"failures": "Failures", "trials": "Trials", "settings": "Settings"}
    if not drawn:
        return [page.links(others), page.missing(without_best(study))]
    return [page.links({**titles, **others}), *(section for _, section in drawn.values())]


def _failures(study: optuna.Study) -> str:
    reasons = fail_reasons(study.get_trials(deepcopy=False))
    rows = {f"{number} ×": cut(reason, 300) for reason, number in reasons}
    if len(rows) < len(reasons):  # several reasons came equally often
        rows = {f"{n} × ({i})": cut(reason, 300) for i, (reason, n) in enumerate(reasons, 1)}
    body = page.pairs(rows) if rows else "<p>No trial has failed.</p>"
    return page.section("failures", "Failures", body)


def _trials(study: optuna.Study, settings: Settings, names: Sequence[str], folder: Path) -> str:
    trials = study.get_trials(deepcopy=False)
    first = [trial.number for trial in best_trials(study)]
    data, number = for_page(trials, settings, names, first)
    says = "The best first."
    if number < len(trials):
        says = f"The best {number} of {len(trials)}; all are in trials.csv."
    logs = urllib.parse.quote(os.path.relpath(LOGS, folder))
    return page.trials(data, says, logs)


class Drawing:
    """Draws pictures one after the other, for the page and as files, while there is time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.end = time.process_time() + SECONDS

    def sections(
        self, pictures: Sequence[Picture], paper: Sequence[Picture]
    ) -> dict[str, tuple[str, str]]:
        """Return title and HTML of each picture by its name; `paper` are the same for files."""
        level = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what cannot be drawn, the page says
        found = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna calls its pictures experimental
            for picture, twin in zip(pictures, paper, strict=True):
                for kind in ("png", "pdf"):  # of an earlier report: the page would not be about it
                    (self.folder / f"{picture.name}.{kind}").unlink(missing_ok=True)
                body = self._body(picture)
                body += "" if body.startswith(page.MISSING) else self._files(twin)
                body = page.section(picture.name, picture.title, body, picture.says)
                found[picture.name] = picture.title, body
        optuna.logging.set_verbosity(level)
        return found

    def _body(self, picture: Picture) -> str:
        """Return the picture for the page, or why there is none."""
        if time.process_time() > self.end:
            return page.missing(f"the pictures before it took {SECONDS:.0f} s")
        try:
            return _interactive(picture)
        except Exception as error:  # whatever Optuna or plotly make of a study's names and values
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            return page.missing(f"{kind}{one_line(error, 300)}")

    def _files(self, picture: Picture) -> str:
        """Write the picture as PNG and PDF; return links to them, or "" if that was impossible."""
        import matplotlib.pyplot as plt

        if time.process_time() > self.end:
            return ""
        try:
            with (
                plt.style.context("ggplot"),  # Optuna's own pictures have it, too
                plt.rc_context({"figure.figsize": picture.size, "font.size": 9}),
            ):
                return self._saved(picture, picture.draw(optuna.visualization.matplotlib))
        except OSError:
            raise
        except Exception as error:
            return page.missing(f"as a file, {one_line(error, 200)}")
        finally:
            plt.close("all")

    def _saved(self, picture: Picture, axes: Any) -> str:
        figure = (axes.flat[0] if hasattr(axes, "flat") else axes).figure
        figure.set_size_inches(picture.size)
        tidy_matplotlib(figure, picture.panels)
        names = []
        for kind in ("png", "pdf"):
            path = self.folder / f"{picture.name}.{kind}"
            with whole(path, durable=False) as temporary:
                figure.savefig(temporary, format=kind, dpi=200, bbox_inches="tight")
            names.append(f'<a href="{path.name}">{kind.upper()}</a>')
        return f'<p class="files">{" ".join(names)}</p>'


def _interactive(picture: Picture) -> str:
    figure = picture.draw(optuna.visualization)
    if not figure.data:  # Optuna's answer to one parameter, or to trials without reports
        raise ValueError("the study has too few trials, parameters or reports for it")
    tidy_plotly(figure, picture.panels)
    body = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        div_id=f"plot-{picture.name}",
        config={"responsive": True, "displaylogo": False},
    )
    width = 130 * picture.panels
    return f'<div class="wide"><div class="panels" style="min-width: {width}px">{body}</div></div>'
