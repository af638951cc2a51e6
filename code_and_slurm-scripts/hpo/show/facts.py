"""A study in numbers and words: what stands above and below the pictures of a report."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.packages import installed
from hpo.search.pruners import reports_as
from hpo.settings import Settings, in_force
from hpo.show.figures.sample import LARGEST, fits_an_axis
from hpo.show.figures.timeline import bars
from hpo.show.results import shown_score
from hpo.study.opening import backup_in_use
from hpo.study.trials import attributes, best_in_words, best_trials, complete, count, without_best
from hpo.words import cut, duration, one_line, shown

Rows = dict[str, str]  # name → value, as it is shown
MOST_ROWS = 40  # of the best trial's parameters


def objective_names(study: optuna.Study) -> list[str]:
    """Return the names of the study's objectives, as it remembers them."""
    plain = [f"objective {i}" for i in range(len(study.directions))]
    if len(plain) == 1:
        plain = ["value"]
    names = study.user_attrs.get("objectives", plain)
    return [str(name) for name in names] if len(names) == len(plain) else plain


def best(study: optuna.Study, names: Sequence[str], scored: Mapping[str, str]) -> Rows:
    """Return the best trial with `scored`, what its script says of it; or the Pareto front."""
    found = best_trials(study)
    if not found:
        return {"none": without_best(study)}
    if len(names) > 1:
        rows = {"Pareto front": f"{len(found)} trials"}
        for trial in found[:8]:
            pairs = zip(names, trial.values, strict=True)
            rows[f"trial {trial.number}"] = ", ".join(f"{n} {shown(v)}" for n, v in pairs)
        return rows
    first = found[0]
    rows = {names[0]: f"{best_in_words(study)}", **scored}
    noted = {name: shown_score(value) for name, value in attributes(first).items()}
    params = {name: cut(one_line(shown(value))) for name, value in first.params.items()}
    return dict(list({**rows, **params, **noted}.items())[:MOST_ROWS])


def progress(study: optuna.Study, settings: Settings) -> Rows:
    """Return how many trials are in which state."""
    counts = count(study, settings)
    rows = {"finished": f"{counts.finished} of {counts.total}"}
    for name in ("complete", "pruned", "failed", "running", "waiting"):
        if (number := getattr(counts, name)) or name in ("complete", "pruned", "failed"):
            rows[name] = str(number)
    if far := sum(not all(map(fits_an_axis, trial.values)) for trial in complete(study)):
        rows["not drawn"] = f"{far} with values that are infinite or beyond ±{LARGEST:.0e}"
    return rows


def times(study: optuna.Study) -> Rows:
    """Return when the study ran, what it has cost, and what pruning has saved."""
    trials = study.get_trials(deepcopy=False)
    found = bars(study, datetime.now())
    if not found:
        return {"none": "no trial has begun"}
    used = sum((bar.end - bar.start for bar in found), timedelta()).total_seconds()
    ran = time_with_trials([(bar.start, bar.end) for bar in found])
    peak = most_at_once([(bar.start, bar.end) for bar in found])
    rows = {
        "first start": f"{min(bar.start for bar in found):%Y-%m-%d %H:%M:%S}",
        "last end": f"{max(bar.end for bar in found):%Y-%m-%d %H:%M:%S}",
        "running": f"{duration(ran)}, with at most {peak} trials at once",
        "worker hours": f"{used / 3600:.{2 if used >= 360 else 4}f} h"
        " (a worker has a GPU; without GPUs, a core)",
    }
    if ran > 0:
        rows["utilisation"] = f"{min(100 * used / ran / peak, 100):.0f} % of {peak} workers"
    return {**rows, **_saved(trials)}


def _saved(trials: Sequence[FrozenTrial]) -> Rows:
    """Return what pruning has saved, as far as the number of reports of a trial is known."""
    pruned = [t for t in trials if t.state == TrialState.PRUNED and t.intermediate_values]
    full = reports_as([t for t in trials if t.state == TrialState.COMPLETE])
    seconds, done, of = 0.0, 0, 0
    for trial in pruned:
        reports, whole = len(trial.intermediate_values), full(trial)
        if whole is None or not trial.duration:
            continue
        seconds += trial.duration.total_seconds() * max(whole - reports, 0) / reports
        done, of = done + reports, of + max(whole, reports)
    if not of:
        return {}
    each = f"{len(pruned)} pruned trials did {done} of {of} epochs"
    return {"saved by pruning": f"about {seconds / 3600:.2f} h: {each}"}


def time_with_trials(spans: Sequence[tuple[datetime, datetime]]) -> float:
    """Return the seconds in which at least one of the trials ran: no nights between two jobs."""
    total, until = timedelta(), datetime.min
    for start, end in sorted(spans):
        total += max(end - max(start, until), timedelta())
        until = max(until, end)
    return total.total_seconds()


def most_at_once(spans: Sequence[tuple[datetime, datetime]]) -> int:
    """Return how many trials ran at the same time, at most."""
    running = most = 0
    # At one instant the end of a trial comes before the start of the next.
    for _, change in sorted([(s, 1) for s, _ in spans] + [(e, -1) for _, e in spans]):
        running += change
        most = max(most, running)
    return max(most, 1)


def settings_of(study: optuna.Study, settings: Settings) -> Rows:
    """Return every setting, as the study remembers it or as it is now, and the versions."""
    rows = in_force()
    known = study.user_attrs
    rows |= {str(name): str(value) for name, value in known.get("inputs", {}).items()}
    rows["STUDY_DB"] = f"{settings.shown_db} {backup_in_use(study)}".strip()
    rows["STUDY_NAME"] = study.study_name
    rows["TOTAL_TRIALS"] = str(count(study, settings).total)
    rows["PY_SCRIPT"] = str(known.get("py_script", rows["PY_SCRIPT"]))
    rows["DIRECTION"] = ",".join(direction.name.lower() for direction in study.directions)
    if names := known.get("objectives"):
        rows["OBJECTIVES"] = ",".join(map(str, names))
    if words := known.get("script_args"):
        rows["SCRIPT_ARGS"] = " ".join(map(str, words))
    for name in ("SAMPLER", "PRUNER"):  # the study has the word alone, without its options
        word = str(known.get(name.lower(), ""))
        if word and rows[name].partition(":")[0].lower() != word:
            rows[name] = word
    rows = {name: value or "-" for name, value in rows.items()}
    versions = {name: installed(name) for name in ("optuna", "torch", "numpy")}
    rows["versions"] = ", ".join(
        [f"Python {platform.python_version()}", *(f"{n} {v}" for n, v in versions.items() if v)]
    )
    rows["written"] = f"{time.strftime('%Y-%m-%d %H:%M:%S')} on {os.uname().nodename}"
    if settings.job_id:
        rows["written"] += f", in job {settings.job_id}"
    return rows
