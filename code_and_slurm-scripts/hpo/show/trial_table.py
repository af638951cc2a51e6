"""The trials as a table: for the report's page, and as CSV for pandas or a spreadsheet."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from hpo.files import whole
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.study.trials import attributes
from hpo.words import cut, plain, to_json

LOGS = SCRIPTS.parent / "logs"
MOST_CHARACTERS = 1_200_000  # of the page's table
OURS = r'"?number"?[,;\t]|\Z'  # how a table begins, also as a spreadsheet saves it; or is empty
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what begins one in a spreadsheet
Cell = Any  # a number, a text, True, False; "" where there is none


def write_csv(
    study: optuna.Study, settings: Settings, names: Sequence[str], path: Path
) -> tuple[Path, Path]:
    """Write the trials to `path`, and their curves beside it; return both paths.

    A trial has one line; of the curves each report has one: number, step, value.  UTF-8 with the
    mark by which a spreadsheet knows it, which pandas skips.  A text that a spreadsheet would run
    as a formula (=, +, -, @) has a ' before it, which makes it a text there, too.

    Raises:
        UserError: they cannot be written, or would replace what is no such table.
    """
    curves = path.with_name(f"{path.stem}-curves{path.suffix}")
    trials = study.get_trials(deepcopy=False)
    reports: list[list[Cell]] = [
        [trial.number, step, float(value)]
        for trial in trials
        for step, value in sorted(trial.intermediate_values.items())
    ]
    head, rows = table(trials, settings, names)
    try:
        _check_free(path)
        _check_free(curves)
        for file, lines in (
            (path, [head, *rows]),
            (curves, [["number", "step", "value"], *reports]),
        ):
            with (
                whole(file.resolve(), durable=False) as temporary,  # a link stays one
                temporary.open("w", encoding="utf-8-sig", newline="") as stream,
            ):
                csv.writer(stream).writerows(map(_harmless, line) for line in lines)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path, curves


def _check_free(path: Path) -> None:
    """Raise UserError if there is something by that name, and it is no table of an earlier call."""
    if path.is_file():
        with path.open(encoding="utf-8-sig", errors="replace") as stream:
            if re.match(OURS, stream.readline()):
                return
    if path.exists():
        raise UserError(f"{path} is there already, and is no table of trials: give another name")


def _harmless(cell: Cell) -> Cell:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def table(
    trials: Sequence[FrozenTrial], settings: Settings, names: Sequence[str]
) -> tuple[list[str], list[list[Cell]]]:
    """Return the names of the columns, and a row per trial; columns as in Optuna's dataframe."""
    params = list(dict.fromkeys(name for trial in trials for name in trial.params))
    noted = list(dict.fromkeys(name for trial in trials for name in attributes(trial)))
    head = ["number", "state", *names, "seconds", "datetime_start", "datetime_complete"]
    head += [f"params_{name}" for name in params] + [f"user_attrs_{name}" for name in noted]
    head += ["worker", "log", "fail_reason"]
    return head, [_row(trial, settings, len(names), params, noted) for trial in trials]


def _row(
    trial: FrozenTrial, settings: Settings, objectives: int, params: list[str], noted: list[str]
) -> list[Cell]:
    own = attributes(trial)
    return [
        trial.number,
        trial.state.name,
        *map(_cell, trial.values or [None] * objectives),
        round(trial.duration.total_seconds(), 3) if trial.duration else "",
        *(_cell(when) for when in (trial.datetime_start, trial.datetime_complete)),
        *(_cell(trial.params.get(name)) for name in params),
        *(_cell(own.get(name)) for name in noted),
        _cell(trial.user_attrs.get("worker")),
        log_name(trial, settings),
        _cell(trial.user_attrs.get("fail_reason")),
    ]


def _cell(value: Any) -> Cell:
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "isoformat"):
        return value.isoformat(sep=" ", timespec="seconds")
    try:
        return to_json(value)
    except (TypeError, ValueError):  # a key that is no text, a list that holds itself
        return str(value)


def log_name(trial: FrozenTrial, settings: Settings) -> str:
    """Return the name of the log of the worker that ran a trial, in logs/; "" if unknown."""
    pattern = r"worker (\d+)(?: on [^,]+)?(?:, job (\d+)\S*)?"
    match = re.fullmatch(pattern, str(trial.user_attrs.get("worker", "")))
    if not match:
        return ""
    rank, job = match.groups()
    # Several workers of a job that share a GPU share the log of their task, too.
    return f"{job}.{int(rank) // settings.workers_per_gpu}.out" if job else f"local.{rank}.out"


def for_page(
    trials: Sequence[FrozenTrial], settings: Settings, names: Sequence[str], first: Sequence[int]
) -> tuple[str, int]:
    """Return the table as JSON for the page's script, and how many trials are in it.

    The numbers `first` come first; those behind MOST_CHARACTERS are left out.
    """
    order = {number: place for place, number in enumerate(first)}
    trials = sorted(trials, key=lambda trial: order.get(trial.number, len(order)))
    head, rows = table(trials, settings, names)
    head = [re.sub(r"^(params|user_attrs)_", "", name) for name in head]
    logs = sorted({row[-2] for row in rows if row[-2] and (LOGS / row[-2]).exists()})
    lines: list[str] = []
    size = 0
    for row in rows:
        lines.append(json.dumps(list(map(_short, row)), separators=(",", ":")))
        size += len(lines[-1])
        if size > MOST_CHARACTERS:
            break
    text = f'{{"head":{json.dumps(head)},"logs":{json.dumps(logs)},"rows":[{",".join(lines)}]}}'
    return text.replace("<", r"\u003c"), len(lines)  # nothing in it can end the script


def _short(cell: Cell) -> Cell:
    if isinstance(cell, float):
        return float(f"{cell:.6g}") if math.isfinite(cell) else str(cell)
    if isinstance(cell, int) and abs(cell) > 2**53:  # JavaScript's numbers are floats
        return str(cell)
    return cut(cell, 200) if isinstance(cell, str) else cell
