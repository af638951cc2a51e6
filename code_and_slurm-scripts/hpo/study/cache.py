"""What a worker remembers of a study's trials, and the one SELECT that brings it up to date.

Pruners and samplers ask for all trials several times per trial. Finished ones never change and are
kept; of the others only what can have changed is read; and nothing is, while nobody has written.
"""

from __future__ import annotations

import json
import math
import sys
import time
from bisect import insort
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    json_to_distribution,
)
from optuna.trial import FrozenTrial, TrialState

from hpo.study.engines import Engine, Version
from hpo.study.optuna_private import trial_id as id_of

ALL = tuple(TrialState)
BY_ID = id_of

# All there is to know about some trials, as rows (kind, trial, position, text, text, text, number),
# in one statement: so it is one consistent picture.  They are a study's after an id, and of those
# that are known to be unfinished the ones that may have changed: each write of its holder moves the
# counter of a running trial's lease.  What others note about such a trial comes with it.
# The text is nearly always the same, so that the engine finds it prepared; the + keeps SQLite from
# the index on study_id, which is all rows, and CROSS JOIN from going through all trials.
READ_TRIALS = """
WITH {leases} known(trial_id, counter) AS (VALUES {marks}),
     picked AS (SELECT trials.*, owner, counter FROM trials LEFT JOIN leases USING (trial_id)
                WHERE trials.trial_id > ? AND +study_id = ?
                UNION ALL SELECT trials.*, owner, leases.counter
                FROM known CROSS JOIN trials LEFT JOIN leases ON leases.trial_id = trials.trial_id
                WHERE trials.trial_id = known.trial_id AND (state <> 'RUNNING' OR owner IS NULL
                                                            OR leases.counter <> known.counter))
SELECT 0, trial_id, number, CAST(state AS VARCHAR), CAST(datetime_start AS VARCHAR),
    CAST(datetime_complete AS VARCHAR), CASE WHEN owner IS NULL THEN NULL ELSE counter END
    FROM picked
UNION ALL SELECT 1, trial_id, param_id, param_name, distribution_json, NULL, param_value
    FROM trial_params WHERE trial_id IN (SELECT trial_id FROM picked)
UNION ALL SELECT 2, trial_id, objective, CAST(value_type AS VARCHAR), NULL, NULL, value
    FROM trial_values WHERE trial_id IN (SELECT trial_id FROM picked)
UNION ALL SELECT 3, trial_id, step, CAST(intermediate_value_type AS VARCHAR), NULL, NULL,
    intermediate_value
    FROM trial_intermediate_values WHERE trial_id IN (SELECT trial_id FROM picked)
UNION ALL SELECT 4, trial_id, trial_user_attribute_id, key, value_json, NULL, NULL
    FROM trial_user_attributes WHERE trial_id IN (SELECT trial_id FROM picked)
UNION ALL SELECT 5, trial_id, trial_system_attribute_id, key, value_json, NULL, NULL
    FROM trial_system_attributes WHERE trial_id IN (SELECT trial_id FROM picked)
UNION ALL SELECT 6, study_id, 0, NULL, NULL, NULL, NULL FROM studies WHERE study_id = ?
ORDER BY 1, 2, 3
"""
# Stock Optuna's study, looked at by who may not write: it has no table of leases.
NO_LEASES = "leases AS (SELECT -1 AS trial_id, '' AS owner, -1 AS counter),"


@lru_cache(maxsize=4096)  # most trials have the same few distributions
def parse_distribution(text: str) -> BaseDistribution:
    """Return a distribution as every worker sees it: choices that are tuples stay so.

    JSON knows lists alone, and Optuna takes (8, 8) and [8, 8] for two different choices.
    """
    distribution = json_to_distribution(text)
    if isinstance(distribution, CategoricalDistribution):
        distribution.choices = tuple(map(_as_tuple, distribution.choices))
    return distribution


def _as_tuple(choice: Any) -> Any:
    return tuple(map(_as_tuple, choice)) if isinstance(choice, list) else choice


class TrialCache:
    """What this process has read of a study's trials. Those that are finished never change."""

    def __init__(self, study_id: int) -> None:
        self.study_id = study_id
        self.finished: dict[int, FrozenTrial] = {}
        self._unfinished: dict[int, FrozenTrial] = {}
        self._counters: dict[int, int] = {}  # of their leases; -1: without one, read each time
        self._last = -1  # the highest trial id seen
        # The finished trials in some states, in order; pruners ask for the same after each report.
        self._selected: dict[tuple[TrialState, ...], list[FrozenTrial]] = {}
        self._version: Version | None = None  # of the database, when it was read
        self._looked = -math.inf  # when, by time.monotonic()

    def count(self) -> int:
        """Return how many trials the study has, as far as they were read."""
        return len(self.finished) + len(self._unfinished)

    def read(
        self, file: Engine, states: tuple[TrialState, ...], max_age: float = 0.0
    ) -> list[FrozenTrial]:
        """Read what can have changed; return the trials in `states`, in order.

        Nothing is read if that was done less than `max_age` seconds ago.
        Raises KeyError if there is no such study.
        """
        if time.monotonic() - self._looked >= max_age:
            self._look(file)
        if states not in self._selected:
            finished = sorted(self.finished.values(), key=BY_ID)
            self._selected[states] = [trial for trial in finished if trial.state in states]
        trials = self._selected[states].copy()
        for trial in self._unfinished.values():
            if trial.state in states:
                insort(trials, trial, key=BY_ID)
        return trials

    def _look(self, file: Engine) -> None:
        begin = time.monotonic()
        sql, args = question(file, self._counters, self._last, self.study_id)
        self._version, rows = file.read_changed(self._version, sql, args)
        if rows is not None:
            self._take_in(rows)
        self._looked = begin

    def _take_in(self, rows: list[tuple[Any, ...]]) -> None:
        """Remember what was read."""
        if not rows:
            raise KeyError(f"There is no study {self.study_id}.")
        trials = build_trials(rows)
        for trial_id, trial in trials.items():
            if trial.state.is_finished():
                self.finish(trial)
            else:
                self._unfinished[trial_id] = trial
            self._last = max(self._last, trial_id)
        for kind, trial_id, *_, counter in rows:
            if kind == 0 and trial_id in self._unfinished:
                self._counters[trial_id] = -1 if counter is None else counter

    def finish(self, trial: FrozenTrial) -> None:
        """Remember a trial that is finished."""
        self.expire()
        self._unfinished.pop(id_of(trial), None)
        self._counters.pop(id_of(trial), None)
        if id_of(trial) in self.finished:
            return
        self.finished[id_of(trial)] = trial
        for states, trials in self._selected.items():
            if trial.state in states:
                insort(trials, trial, key=BY_ID)

    def expire(self) -> None:
        """Read next time, however young this is: this process has changed more than a report."""
        self._looked = -math.inf

    def ignore_own_write(self) -> None:
        """Stay up to date: this process wrote once, and only what it has in memory as well."""
        if self._version is not None:
            self._version = self._version._replace(writes=self._version.writes + 1)


class Follower:
    """What is made of a study's finished trials, which never change: each is taken once.

    A worker asks for it several times per trial, and a study may have ten thousand.
    """

    def __init__(self) -> None:
        self._leading: list[FrozenTrial] = []  # taken, before the first that has not ended
        self._later: dict[int, FrozenTrial] = {}  # taken, after it; by their id() in memory
        self.forget()

    def forget(self) -> None:
        """Begin anew: a trial that was taken has changed, or is gone."""
        raise NotImplementedError

    def take(self, trial: FrozenTrial) -> None:
        """Take a trial that has ended."""
        raise NotImplementedError

    def look(self, trials: list[FrozenTrial]) -> list[FrozenTrial]:
        """Take those of all trials, in order, that have ended since; return those that have not.

        The storage gives the same objects again: what it has read anew is taken anew.
        """
        rest = trials[len(self._leading) :]
        later = {id(trial): trial for trial in rest if trial.state.is_finished()}
        # Lists of the same objects are compared in no time.
        if trials[: len(self._leading)] != self._leading or self._later.keys() - later.keys():
            self._leading, self._later = [], {}
            self.forget()
            return self.look(trials)
        for number, trial in later.items():
            if number not in self._later:
                self.take(trial)
        for trial in rest:
            if id(trial) not in later:
                break
            self._leading.append(later.pop(id(trial)))
        self._later = later
        return [trial for trial in rest if not trial.state.is_finished()]


def question(
    file: Engine, counters: Mapping[int, int], after: int = sys.maxsize, study_id: int = -1
) -> tuple[str, tuple[int, ...]]:
    """Return the SELECT of a study's trials after an id, and of those whose counter has moved."""
    if len(counters) > 8_000:  # too many to be named in SQL: read the study anew
        counters, after = {}, -1
    marks = 1 << len(counters).bit_length()
    pairs = [x for pair in counters.items() for x in pair] + [-1] * 2 * (marks - len(counters))
    leases = "" if file.has_leases else NO_LEASES
    sql = READ_TRIALS.format(marks=",".join(["(?, ?)"] * marks), leases=leases)
    return sql, (*pairs, after, study_id, study_id)


def read_trial(file: Engine, trial_id: int) -> FrozenTrial:
    """Return one trial. Raises KeyError."""
    rows = file.read(*question(file, {trial_id: -1}))
    if not rows:
        raise KeyError(f"There is no trial {trial_id}.")
    return build_trials(rows)[trial_id]


def build_trials(rows: list[tuple[Any, ...]]) -> dict[int, FrozenTrial]:
    """Make trials of the rows of READ_TRIALS."""
    found: dict[int, dict[str, Any]] = {}
    for kind, trial_id, position, a, b, c, x in rows:
        if kind == 0:
            found[trial_id] = {
                "number": position, "trial_id": trial_id, "state": TrialState[a],
                "datetime_start": to_time(b), "datetime_complete": to_time(c), "params": {},
                "distributions": {}, "values": [], "intermediate_values": {}, "user_attrs": {},
                "system_attrs": {},
            }  # fmt: skip
        elif kind == 1:
            distribution = found[trial_id]["distributions"][a] = parse_distribution(b)
            found[trial_id]["params"][a] = distribution.to_external_repr(x)
        elif kind == 2:
            found[trial_id]["values"].append(to_float(x, a))
        elif kind == 3:
            found[trial_id]["intermediate_values"][position] = to_float(x, a)
        elif kind in (4, 5):
            found[trial_id]["user_attrs" if kind == 4 else "system_attrs"][a] = json.loads(b)
    return {
        trial_id: FrozenTrial(value=None, **{**fields, "values": fields["values"] or None})
        for trial_id, fields in found.items()
    }


def to_float(value: float | None, kind: str) -> float:
    special = {"NAN": math.nan, "INF_POS": math.inf, "INF_NEG": -math.inf}
    return special[kind] if value is None else value


def to_time(text: str | None) -> datetime | None:
    if text is None:
        return None
    seconds, _, fraction = text.partition(".")  # PostgreSQL leaves zeros out, which 3.10 needs
    utc = datetime.fromisoformat(f"{seconds}.{fraction:0<6}").replace(tzinfo=timezone.utc)
    return utc.astimezone().replace(tzinfo=None)
