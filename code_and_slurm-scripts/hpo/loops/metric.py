"""The metric of a program, found in the lines that it writes: reported, and the trial's value."""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import optuna

from hpo.loops.process import Lines
from hpo.search.objectives import chosen
from hpo.settings import Settings, UserError
from hpo.words import logger, one_line

log = logger("hpo.worker")


class Metric:
    """What a program has measured so far."""

    def __init__(
        self,
        trial: optuna.Trial,
        lines: Lines,
        pattern: re.Pattern[str] | None,
        objectives: Sequence[str],
        where: str,
        goes_on: bool,
    ) -> None:
        """Begin to look.

        Args:
            trial: the one that runs.
            lines: of the output of the program, or of the file that it writes.
            pattern: with a group for the metric; None for lines of JSON.
            objectives: the names in the JSON; with a pattern the first one stands for its group.
            where: for people: where the metric should have been.
            goes_on: steps without a number are counted from those that the trial has.
        """
        self.trial, self._lines, self._pattern = trial, lines, pattern
        self._objectives, self._where = tuple(objectives), where
        self._lines_left: deque[str] = deque()  # when the trial was told to stop, some may be
        self._values: dict[str, float] = {}
        self._constraints: dict[str, float] = {}
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self._reported = dict(frozen.intermediate_values)
        self._next = max(self._reported, default=-1) + 1 if goes_on else 0

    def look(self, *, whole: bool = True, ask: bool = False) -> bool:
        """Report what is new; return whether there was anything.

        Args:
            whole: leave a last line that has no end to the next call.
            ask: after each report, whether the trial is to be pruned or its worker has to stop.

        Raises:
            UserError: a metric is no number.
            optuna.TrialPruned: with `ask`.
        """
        self._lines_left.extend(self._lines.new(whole))
        before = len(self._reported)
        while self._lines_left:
            line = self._lines_left.popleft()
            for step, value in self._in_text(line) if self._pattern else self._in_json(line):
                self._next = step + 1
                if step not in self._reported:
                    self._reported[step] = value
                    self.trial.report(value, step)
                    if ask and self.trial.should_prune():
                        raise optuna.TrialPruned
        return len(self._reported) > before

    def value(self) -> float | tuple[float, ...]:
        """Return the last value of each objective. Raises UserError for one that never came."""
        first = self._objectives[0]
        if self._pattern and not self._values and self._reported:
            # It went on where it had nothing left to do, and said no more.
            self._values[first] = self._reported[max(self._reported)]
        names = Settings.from_env().objectives or (first,)
        if left := [name for name in names if name not in self._values]:
            what = "nothing in its output" if self._pattern else f"no {' and no '.join(left)}"
            raise UserError(f"exit status 0, but {what} {self._where}")
        for name, value in self._constraints.items():
            self.trial.set_constraint(name, value)
        return chosen({name: self._values[name] for name in names})

    def _in_text(self, line: str) -> Iterator[tuple[int, float]]:
        """Yield step and value of each match in a line."""
        assert self._pattern
        for match in self._pattern.finditer(line):
            groups = match.groupdict()
            text = groups["value"] if "value" in groups else match[1]
            value = self._values[self._objectives[0]] = _number(text, "metric")
            yield self._step(groups.get("step")), value

    def _in_json(self, line: str) -> Iterator[tuple[int, float]]:
        """Yield step and value of the report in one line of JSON, and note the rest of it."""
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):  # a program that was killed leaves half a line
            log.warning("%s is no JSON object, and left out", one_line(repr(line), 60))
            return
        constraints = record.get("constraints", {})
        if not isinstance(constraints, dict):
            raise UserError('"constraints" in the JSON must be {"name": number, …}')
        self._constraints.update({name: _number(v, name) for name, v in constraints.items()})
        for name in self._objectives:
            if name in record:
                self._values[name] = _number(record[name], name)
        reported = (Settings.from_env().objectives or self._objectives)[0]
        if reported in record:
            yield self._step(record.get("step")), self._values[reported]

    def _step(self, text: Any) -> int:
        return self._next if text is None else int(_number(text, "step"))


def _number(text: Any, name: str) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        shown = one_line(repr(text), 60)
        raise UserError(f"{name}: the program says {shown}, which is no number") from None
