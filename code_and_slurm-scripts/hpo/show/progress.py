"""How far a study is, in words: the numbers, who runs what, the time left.

check_best_model.py            prints these once
check_best_model.py --watch    follow(): a view that refreshes itself in a terminal,
                               a line whenever something changes anywhere else
"""

from __future__ import annotations

import sys
import time
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.settings import Settings
from hpo.study.opening import backup_in_use, open_study
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.served import Leased
from hpo.study.trials import Counts, best_line, count, fail_reasons
from hpo.words import cut, shown

POLL_SECONDS = 2.0
BAR = 40  # characters
CLEAR = "\x1b[H\x1b[2J"  # the terminal's codes for: cursor to the top left, erase all


def running(study: optuna.Study) -> list[str]:
    """Return one line per running trial: its number, its worker, how long, its last report."""
    storage = storage_of(study)
    owners = storage.owners(study_id(study)) if isinstance(storage, Leased) else {}
    return [
        _running_line(trial, owners.get(trial.number))
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    ]


def _running_line(trial: FrozenTrial, owner: str | None) -> str:
    worker = owner or trial.user_attrs.get("worker", "a worker without a lease")
    begin = trial.datetime_start or datetime.now()
    seconds = max(0, int((datetime.now() - begin).total_seconds()))
    line = f"trial {trial.number:<5} {worker:24} {seconds // 60:3}:{seconds % 60:02}"
    if (step := trial.last_step) is not None:
        line += f"   step {step}: {shown(trial.intermediate_values[step])}"
    return line


def outlook(study: optuna.Study, left: int, rate: float) -> str:
    """Return the best value so far and the time left at `rate` trials per second."""
    best = best_line(study)
    return f"{best}, about {left / rate / 60:.0f} min left" if rate and left else best


def follow(study: optuna.Study, settings: Settings) -> None:
    """Show the study until it is done: refreshed in a terminal, elsewhere a line per change."""
    begin, first, last = time.monotonic(), -1, ""
    while True:
        if backup_in_use(study):  # each one is another file
            study = open_study(settings)
        # Anew each time: a worker may be the first to know how many combinations there are.
        study = optuna.load_study(study_name=study.study_name, storage=storage_of(study))
        counts = count(study, settings)
        first = counts.finished if first < 0 else first
        rate = (counts.finished - first) / max(time.monotonic() - begin, 1e-9)
        if sys.stdout.isatty():
            print(CLEAR + view(study, counts, rate), flush=True)
        elif (line := str(counts)) != last:
            now = time.strftime("%H:%M:%S")
            print(f"{now} {line}; {outlook(study, counts.left, rate)}", flush=True)
            last = line
        if counts.left == 0:
            return
        time.sleep(POLL_SECONDS)


def view(study: optuna.Study, counts: Counts, rate: float) -> str:
    """Return the whole view of a terminal; `rate` is in trials per second."""
    total = max(counts.total, 1)
    full = BAR * counts.finished // total
    lines = [
        f"study {study.study_name}    {time.strftime('%H:%M:%S')}    (Ctrl-C ends this view alone)",
        *filter(None, [backup_in_use(study)]),
        f"[{'#' * full}{'.' * (BAR - full)}] {100 * counts.finished // total} %",
        str(counts),
        f"{60 * rate:.1f} trials per minute; {outlook(study, counts.left, rate)}",
    ]
    if names := running(study):
        lines += ["", "running", *(f"  {name}" for name in names)]
    if reasons := fail_reasons(study.get_trials(deepcopy=False)):
        lines += ["", "failed", *(f"  {number} × {cut(reason)}" for reason, number in reasons)]
    return "\n".join(lines)
