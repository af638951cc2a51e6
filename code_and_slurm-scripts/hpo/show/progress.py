"""How far a study is, live: the numbers, the time left, who runs what, what has ended.

check_best_model.py --watch    follow(): a view that refreshes itself in a terminal, a line for
                               each finished trial anywhere else

Plain text and three codes that every terminal knows: no package has to be in the image for it.
All times are those of the study, so that they are right at once, and after a restart, too.
"""

from __future__ import annotations

import shutil
import signal
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from datetime import datetime

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.search.pruners import reports_as
from hpo.settings import Settings
from hpo.show.facts import time_with_trials
from hpo.show.figures.timeline import bars
from hpo.show.trial_table import LOGS
from hpo.study.opening import backup_in_use, open_study
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.serving.served import Leased
from hpo.study.trials import Counts, best_line, best_trials, count, fail_reasons
from hpo.words import cut, duration, parameters, shown, values

POLL_SECONDS = 2.0
HOME, END_OF_LINE, END = "\x1b[H", "\x1b[K", "\x1b[J"  # cursor to the top left; erase to the end of
RECENT = 50  # trials whose mean time tells how long the others will take
LAST, REASONS = 5, 3  # lines


def follow(study: optuna.Study, settings: Settings) -> None:
    """Show the study until it is done: refreshed in a terminal, elsewhere a line per trial."""
    told: set[int] | None = None
    while True:
        if backup_in_use(study):  # each one is another file
            study = open_study(settings)
        # Anew each time: a worker may be the first to know how many combinations there are.
        study = optuna.load_study(study_name=study.study_name, storage=storage_of(study))
        counts = count(study, settings)
        if sys.stdout.isatty():
            columns, rows = shutil.get_terminal_size()
            lines = view(study, counts, datetime.now(), columns, rows)
            print(HOME + "".join(f"{line}{END_OF_LINE}\n" for line in lines) + END, end="")
        else:
            told = _tell(study, counts, told)
        sys.stdout.flush()
        if counts.left == 0:
            return
        time.sleep(POLL_SECONDS)


def _tell(study: optuna.Study, counts: Counts, told: set[int] | None) -> set[int]:
    """Print a line for each trial that has finished since; at first one on the study."""
    trials = study.get_trials(deepcopy=False)
    ended = sorted((t for t in trials if t.state.is_finished()), key=_end)
    if told is None:
        print(f"{time.strftime('%H:%M:%S')} {counts}; {_best(study)}")
    else:
        left = _left_in_words(study, counts, datetime.now())
        for trial in ended:
            if trial.number not in told:
                how = f"{finished_line(trial)} ({counts.finished} of {counts.total} finished"
                print(f"{_end(trial):%H:%M:%S} {how}; {_best(study)}; {left})")
    return {trial.number for trial in ended}


def _end(trial: FrozenTrial) -> datetime:
    return trial.datetime_complete or datetime.min


def view(
    study: optuna.Study, counts: Counts, now: datetime, columns: int = 80, rows: int = 24
) -> list[str]:
    """Return the lines of a terminal of that size; its head is in it whatever follows."""
    lines = _head(study, counts, now, columns)
    trials = study.get_trials(deepcopy=False)
    reasons = [f"{number} × {reason}" for reason, number in fail_reasons(trials)]
    below = _part("failed", reasons, min(len(reasons), REASONS) + 2)
    owners = _owners(study)
    below += _part("logs", _logs(owners), 4)
    room = rows - 1 - len(lines) - len(below)
    last = sorted((t for t in trials if t.state.is_finished()), key=_end)[: -LAST - 1 : -1]
    running = _running(trials, owners, now)
    kept = 4 if len(running) + 6 <= room else 5  # for those that ended: two where all others fit
    lines += _part("running", running, max(3, room - (len(last) and kept)))
    room = rows - 1 - len(lines) - len(below)
    lines += _part("last finished", list(map(finished_line, last)), min(room, LAST + 2), more=False)
    return [cut(_printable(line), columns) for line in [*lines, *below]][: rows - 1]


def _head(study: optuna.Study, counts: Counts, now: datetime, columns: int) -> list[str]:
    total = max(counts.total, 1)
    spans = [(bar.start, bar.end) for bar in bars(study, now)]
    width = max(min(40, columns - 50), 10)
    full = width * counts.finished // total
    lines = [
        f"study {study.study_name}   {now:%H:%M:%S}   {backup_in_use(study)}",
        f"[{'#' * full}{'.' * (width - full)}] {100 * counts.finished // total} %   "
        f"{duration(time_with_trials(spans))} elapsed, {_left_in_words(study, counts, now)}",
        str(counts),
        _best(study),
        what_ctrl_c_does(),
    ]
    lines = [_printable(line) for line in lines]
    return [
        part
        for line in lines
        for part in textwrap.wrap(line, columns, max_lines=2, placeholder=" …")
    ]


def what_ctrl_c_does() -> str:
    """Return what happens with Ctrl-C: run-optuna-local.sh lets it pass by its own view."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return "(Ctrl-C stops the workers; the same command then goes on with the study)"
    return "(Ctrl-C ends this view alone; the workers go on)"


def _best(study: optuna.Study) -> str:
    """Return the best value so far, with its parameters; of several objectives, how many."""
    best = best_trials(study)
    params = f": {parameters(best[0].params)}" if best and len(study.directions) == 1 else ""
    return f"{best_line(study)}{params}"


def finished_line(trial: FrozenTrial) -> str:
    """Return how a trial has ended."""
    took = f" after {duration(trial.duration.total_seconds())}" if trial.duration else ""
    value = f" {values(trial.values)}" if trial.values else ""
    return f"trial {trial.number:<5} {trial.state.name.lower()}{value}{took}"


def _left_in_words(study: optuna.Study, counts: Counts, now: datetime) -> str:
    if counts.left == 0:
        return "done"
    seconds = seconds_left(study.get_trials(deepcopy=False), counts.left, now)
    return "time left not known yet" if seconds is None else f"about {duration(seconds)} left"


def seconds_left(trials: Sequence[FrozenTrial], left: int, now: datetime) -> float | None:
    """Return how long the trials still to be finished take the workers that run now.

    Each takes the mean time of the RECENT trials that ended last; before there is one, that of the
    running trials, by their finished epochs.  None while nothing is known, or nothing runs.
    """
    ended = sorted((t for t in trials if t.state.is_finished() and t.duration), key=_end)
    running = [(t, _age(t, now)) for t in trials if t.state == TrialState.RUNNING]
    times = [trial.duration.total_seconds() for trial in ended[-RECENT:] if trial.duration]
    if not times:
        full = _full(trials)
        known = [(age, len(t.intermediate_values), full(t)) for t, age in running]
        times = [age * whole / done for age, done, whole in known if done and whole]
    if not times or not running:
        return None
    each = statistics.mean(times)
    begun = sum(min(age, each) for _, age in running)
    return max(left * each - begun, 0.0) / min(len(running), left)


def _age(trial: FrozenTrial, now: datetime) -> float:
    return max((now - (trial.datetime_start or now)).total_seconds(), 0.0)


def _full(trials: Sequence[FrozenTrial]) -> Callable[[FrozenTrial], int | None]:
    return reports_as([trial for trial in trials if trial.state == TrialState.COMPLETE])


def _owners(study: optuna.Study) -> dict[int, str]:
    storage = storage_of(study)
    return storage.owners(study_id(study)) if isinstance(storage, Leased) else {}


def _running(trials: Sequence[FrozenTrial], owners: dict[int, str], now: datetime) -> list[str]:
    """Return a line per running trial: its epochs, how long, its last report, its worker."""
    full = _full(trials)
    cells = []
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        seconds, done, whole = int(_age(trial, now)), len(trial.intermediate_values), full(trial)
        epochs = f"epoch {done} of {whole}" if whole else f"{done} reports"
        value = shown(trial.intermediate_values[trial.last_step]) if done else ""  # type: ignore[index]
        worker = owners.get(trial.number) or str(trial.user_attrs.get("worker", "no lease"))
        took = f"{seconds // 60}:{seconds % 60:02}"
        cells.append((f"trial {trial.number}", epochs, took, value, worker.partition(", job ")[0]))
    # No wider than it must be: at 60 columns the worker's node is still in its line.
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _logs(owners: dict[int, str]) -> list[str]:
    """Return where the logs of the running workers are."""
    jobs = {owner.partition(", job ")[2].split(".")[0] for owner in owners.values()}
    return [f"{LOGS}/{job or 'local'}.*.out" for job in sorted(jobs)]


def _part(title: str, lines: Sequence[str], room: int, more: bool = True) -> list[str]:
    """Return a title and lines, at most `room` with an empty one before; `more` says what lacks."""
    most = room - 2
    if not lines or most < 1:
        return []
    if len(lines) > most and more:
        lines = [*lines[: most - 1], f"… and {len(lines) - most + 1} more"]
    return ["", title, *(f"  {line}" for line in lines[:most])]


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else " " for char in text)
