"""Does each parameter reach the model?  Another value must change what a trial computes.

Each is tried once, for one epoch; then, while there is time, those that changed nothing: with
other values, beside other values of the other parameters, and to the end of the trial.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from hpo.check.bench import Bench
from hpo.check.config import Config
from hpo.check.picking import others_of
from hpo.check.short_trial import Outcome
from hpo.check.table import Table, progress
from hpo.words import own_file, shown

VALUES = 3  # of one parameter that are tried
OTHERS = 2  # combinations of the other parameters, drawn by chance


class Parameters:
    """What is known of each parameter."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.verdicts: dict[str, tuple[str, str]] = {}
        self.tried: dict[str, str] = {}  # name → the last change that changed nothing
        self.epochs: dict[str, int] = {}  # of that
        self.failed: dict[str, str] = {}
        self.branches: dict[str, dict[str, Any]] = {}  # name → a combination that has it
        self.to_the_end: set[str] = set()

    def check(self, table: Table) -> None:
        """Try them all, and add their rows."""
        bench = self.bench
        for name in list(bench.space):
            self.first_try(name)
        for name in [name for name in bench.space if name not in self.verdicts]:
            self.further_tries(name)
        for name in bench.space:
            table.add(name, *(self.verdicts.get(name) or self.undecided(name)))

    # ---------- Tries ----------

    def first_try(self, name: str) -> None:
        """Give a parameter another value, for one epoch."""
        bench = self.bench
        if name in bench.fixed:
            self.verdicts[name] = "-", f"not tried: FIX gives it {shown(bench.fixed[name])}"
            return
        if name in bench.failing:
            self.verdicts[name] = "MEND", bench.failing[name]
            return
        if name == bench.epochs_name:
            self.verdicts[name] = "ok", "it is the number of epochs"
            return
        if name not in bench.whole.params:
            if values := self.combination_with(name):
                self.branches[name] = values
            return
        others = others_of(bench.space[name], bench.values[name])
        if not others:
            self.verdicts[name] = "-", f"has one value only: {shown(bench.values[name])}"
            return
        if name in bench.like_epochs() and bench.left() < bench.cost * (len(bench.space) + 6):
            number = f"the trial had as many epochs as it says, {shown(bench.values[name])}"
            self.verdicts[name] = "look", f"{number}; another number takes too long: not tried"
            return
        self.compare(name, bench.values, bench.whole, others)

    def combination_with(self, name: str) -> dict[str, Any] | None:
        """Return a combination that has a parameter of a branch."""
        if self.bench.search_space is None:
            return self.branches.get(name)
        return self.bench.pick(0.0, self.bench.values, (name,))

    def compare(
        self, name: str, values: Mapping[str, Any], known: Outcome, others: list[Any]
    ) -> None:
        """Run trials of one epoch until another value changes what `known` computed."""
        bench = self.bench
        for other in others:
            changed = bench.changed(values, name, other)
            if changed is None:
                continue
            if bench.left() < bench.cost:
                return
            change = f"{shown(other)} instead of {shown(values.get(name, known.params.get(name)))}"
            progress(f"{name}: {change}")
            outcome = bench.one_epoch(changed)
            for found in outcome.distributions.keys() - bench.space.keys():
                bench.space[found] = outcome.distributions[found]
                self.branches[found] = {**changed, **outcome.params}
            if outcome.state == TrialState.FAIL:
                self.failed[name] = f"{change}: the trial fails ({outcome.reason})"
            elif outcome.refused or outcome.late:
                continue
            elif bench.differ(known, outcome, 1):
                self.verdicts[name] = "ok", f"{change} changes the result"
                return
            else:
                self.note(name, change, min(1, len(outcome.reports)))
                return

    def note(self, name: str, change: str, epochs: int) -> None:
        """Note a change that changed nothing."""
        if epochs >= self.epochs.get(name, 0):
            self.tried[name], self.epochs[name] = change, epochs

    def further_tries(self, name: str) -> None:
        """Do what the time allows for a parameter that has changed nothing so far."""
        bench = self.bench
        if name in bench.whole.params:
            others = others_of(bench.space[name], bench.values[name])[1:VALUES]
            for other in others:
                if name not in self.verdicts:
                    self.compare(name, bench.values, bench.whole, [other])
            if name not in self.verdicts:
                self.run_to_the_end(name, bench.values, bench.whole)
        bases = [self.branches[name]] if name in self.branches else []
        for chance in range(OTHERS + 1 - len(bases)):
            if name in self.verdicts or bench.left() < 2 * bench.cost:
                return
            given = bases[chance] if chance < len(bases) else self.drawn(name, chance)
            if given is not None:
                self.beside(name, given)

    def drawn(self, name: str, chance: int) -> dict[str, Any] | None:
        """Return other values of all parameters; in the middle, or at three quarters."""
        if self.bench.search_space is None and not self.bench.values:
            return None
        if self.bench.search_space is None:
            return {n: (others_of(d, self.bench.values.get(n)) or [self.bench.values.get(n)])[0]
                    for n, d in self.bench.space.items()}  # fmt: skip
        return self.bench.pick((0.5, 0.75, 0.25)[chance % 3], {}, (name,))

    def beside(self, name: str, values: Mapping[str, Any]) -> None:
        """Try a parameter beside other values of the others."""
        known = self.bench.one_epoch(values)
        if known.state in (TrialState.PRUNED, TrialState.COMPLETE, TrialState.WAITING):
            mine = {**values, **known.params}
            others = others_of(self.bench.space[name], mine.get(name))
            self.compare(name, mine, known, others[:1])
            if name not in self.verdicts and name not in self.bench.whole.params:
                self.whole_branch(name, mine)

    def whole_branch(self, name: str, values: Mapping[str, Any]) -> None:
        """Run whole trials of a branch that the first trial has not taken."""
        bench = self.bench
        epochs = max(1, len(bench.whole.reports))
        if name not in self.to_the_end and bench.left() > 2 * epochs * bench.cost:
            self.run_to_the_end(name, values, bench.run(values, limit=bench.left()))

    def run_to_the_end(self, name: str, values: Mapping[str, Any], whole: Outcome) -> None:
        """Run whole trials with other values: they may act later, as a schedule's do."""
        bench = self.bench
        needed = whole.first_report + whole.epoch * len(whole.reports)
        if not whole.ended or not bench.repeatable:  # what differs by chance adds up
            return
        for other in others_of(bench.space[name], values[name])[:VALUES]:
            changed = bench.changed(values, name, other)
            if name in self.verdicts or changed is None or bench.left() < needed:
                continue
            change = f"{shown(other)} instead of {shown(values[name])}"
            progress(f"{name}: {change}, to the end of the trial")
            outcome = bench.run(changed, limit=max(needed, bench.left()))
            if outcome.state == TrialState.FAIL:
                self.failed[name] = f"{change}: the trial fails ({outcome.reason})"
            elif outcome.ended:
                self.judge_whole(name, change, whole, outcome)

    def judge_whole(self, name: str, change: str, whole: Outcome, outcome: Outcome) -> None:
        """Compare two trials that have run to their ends."""
        if len(outcome.reports) != len(whole.reports):
            self.verdicts[name] = "ok", f"{change} changes the number of epochs"
        elif self.bench.differ(whole, outcome, len(whole.reports)):
            self.verdicts[name] = "ok", f"{change} changes the result"
        elif outcome.value != whole.value:
            self.verdicts[name] = "ok", f"{change} changes the value"
        else:
            self.to_the_end.add(name)
            self.note(name, change, len(outcome.reports))

    # ---------- Where nothing has changed ----------

    def undecided(self, name: str) -> tuple[str, str]:
        """Return the row of a parameter whose other values changed nothing, or were not tried."""
        bench = self.bench
        if name not in self.tried:
            if name in self.failed:
                return "look", self.failed[name]
            if name not in bench.whole.params:
                return "-", "not tried: it is in a branch of search_space"
            late = bench.left() < bench.cost
            return "-", f"not tried: {'no time left' if late else 'no other value is taken'}"
        epochs = self.epochs[name]
        nothing = f"nothing in {epochs} epoch{'s' * (epochs > 1)}" if epochs else "nothing"
        change = f"{self.tried[name]} changes {nothing}"
        if not bench.repeatable:
            return (
                "look",
                f"not proven: {change} that is not by chance (no two trials are the same)",
            )
        by_name = Config.ALL not in bench.read  # so it is known what train_model reads
        if by_name and name in bench.read:
            return "look", f"train_model reads it, but {change}: is it used?"
        if _mentioned(name) and not (by_name and name in bench.whole.config):
            return "look", f"{change}: is it used, or later?"
        if name not in self.to_the_end and bench.whole.reports:
            return "look", f"{change}, and more was not tried: is it used?"
        reader = "nothing reads it"
        if by_name and name in bench.whole.config:
            reader = f'train_model never reads config["{name}"]'
        return "MEND", f"suggested, but {reader}; {change}"


# ---------- Is a name used in the script?  ----------


def _mentioned(name: str) -> bool:
    """Whether the user's own files use a parameter's name, other than to suggest it."""
    return any(name in words for words in map(_words, _own_files()))


def _own_files() -> list[str]:
    files = {str(getattr(module, "__file__", None) or "") for module in sys.modules.values()}
    return [file for file in files if file.endswith(".py") and own_file(file)]


@cache
def _words(file: str) -> frozenset[str]:
    """Return the names, attributes and texts in a file, but not where parameters are suggested."""
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, SyntaxError, ValueError):
        return frozenset()
    return frozenset(filter(None, map(_word, _used(tree))))


def _used(node: ast.AST) -> Iterator[ast.AST]:
    yield node
    for child in ast.iter_child_nodes(node):
        if not _only_suggests(child):
            yield from _used(child)


def _only_suggests(node: ast.AST) -> bool:
    """Whether this is a function, or a statement, that suggests and does not train."""
    words = {word for each in ast.walk(node) if (word := _word(each))}
    if not any(word.startswith("suggest_") for word in words):
        return False
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return "space" in node.name or "report" not in words
    return isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return, ast.Expr, ast.Dict))


def _word(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id if isinstance(node.ctx, ast.Load) else ""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, (ast.arg, ast.keyword)):
        return node.arg or ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if node.value.isidentifier() else ""
    return ""
