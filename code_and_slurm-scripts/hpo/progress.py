"""How far a study is, in words: the numbers, the reasons of failures, who runs what, time left.

check_best_model.py            prints these once
check_best_model.py --watch    follow(): a view that refreshes itself in a terminal,
                               a line whenever something changes anywhere else
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.leases import RUNNING
from hpo.settings import Settings
from hpo.sqlite_storage import SQLiteStorage

POLL_SECONDS = 2.0
BAR = 40  # characters
CLEAR = "\x1b[H\x1b[2J"  # the terminal's codes for: cursor to the top left, erase all


def total_of(study: optuna.Study, settings: Settings) -> int:
    """Return with how many trials the study ends: a grid ends when it is exhausted.

    Without TOTAL_TRIALS in the environment it is the one of the study's last job.
    """
    total = settings.total_trials
    if not os.environ.get("TOTAL_TRIALS"):
        total = int(study.user_attrs.get("total_trials", total))
    return min(total, int(study.user_attrs.get("combinations", total)))


def counts(trials: list[FrozenTrial], total: int) -> str:
    """Return one line: how many trials are in which state."""
    number = Counter(trial.state for trial in trials)
    done = sum(number[state] for state in TrialState if state.is_finished())
    return (
        f"{done} of {max(total, len(trials))} trials: {number[TrialState.COMPLETE]} complete, "
        f"{number[TrialState.PRUNED]} pruned, {number[TrialState.FAIL]} failed, "
        f"{number[TrialState.RUNNING]} running, {number[TrialState.WAITING]} waiting"
    )


def fail_reasons(trials: list[FrozenTrial]) -> list[tuple[str, int]]:
    """Return why trials failed, the most frequent reason first."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    return Counter(t.user_attrs.get("fail_reason", "unknown") for t in failed).most_common()


def best_line(study: optuna.Study) -> str:
    """Return the best value so far; with several objectives, the size of the Pareto front."""
    if len(study.directions) > 1:
        return f"{len(study.best_trials)} trials in the Pareto front"
    try:
        return f"best {study.best_value:.4f} (trial {study.best_trial.number})"
    except ValueError:  # Optuna's word for: no trial is complete
        return "no trial has finished yet"


def running(study: optuna.Study) -> list[str]:
    """Return one line per running trial: its number, its worker, how long, its last report."""
    storage, owners = study._storage, {}
    if isinstance(storage, SQLiteStorage):
        rows = storage.file.read(RUNNING, (study._study_id,))
        owners = {number: str(owner).split("/")[0] for _, number, owner, _, _ in rows}
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
        line += f"   step {step}: {trial.intermediate_values[step]:.4f}"
    return line


def outlook(study: optuna.Study, left: int, rate: float) -> str:
    """Return the best value so far and the time left at `rate` trials per second."""
    best = best_line(study)
    return f"{best}, about {left / rate / 60:.0f} min left" if rate and left else best


def follow(study: optuna.Study, settings: Settings) -> None:
    """Show the study until it is done: refreshed in a terminal, elsewhere a line per change."""
    begin, first, last = time.monotonic(), -1, ""
    while True:
        trials = study.get_trials(deepcopy=False)
        done = sum(trial.state.is_finished() for trial in trials)
        first = done if first < 0 else first
        # A worker may be the first to know how many combinations there are.
        total = total_of(optuna.load_study(study_name=study.study_name, storage=study._storage),
                         settings)  # fmt: skip
        rate = (done - first) / max(time.monotonic() - begin, 1e-9)
        if sys.stdout.isatty():
            print(CLEAR + view(study, trials, total, rate), flush=True)
        elif (line := counts(trials, total)) != last:
            now = time.strftime("%H:%M:%S")
            print(f"{now} {line}; {outlook(study, total - done, rate)}", flush=True)
            last = line
        if done >= total:
            return
        time.sleep(POLL_SECONDS)


def view(study: optuna.Study, trials: list[FrozenTrial], total: int, rate: float) -> str:
    """Return the whole view of a terminal; `rate` is in trials per second."""
    done = sum(trial.state.is_finished() for trial in trials)
    full = BAR * done // max(total, 1)
    lines = [
        f"study {study.study_name}    {time.strftime('%H:%M:%S')}    (Ctrl-C ends this view alone)",
        f"[{'#' * full}{'.' * (BAR - full)}] {100 * done // max(total, 1)} %",
        counts(trials, total),
        f"{60 * rate:.1f} trials per minute; {outlook(study, total - done, rate)}",
    ]
    if names := running(study):
        lines += ["", "running", *(f"  {name}" for name in names)]
    if reasons := fail_reasons(trials):
        lines += ["", "failed", *(f"  {number} × {reason}" for reason, number in reasons)]
    return "\n".join(lines)
