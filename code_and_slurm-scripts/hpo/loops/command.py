"""Any program as an objective: a command line with the parameters in it, and where its metric is.

    program = Command(
        "python train.py --lr {lr} --epochs {epochs} --output {folder}",
        pattern=r"epoch (?P<step>[0-9]+): loss (?P<value>.+)",
    )
    def prepare(): program.check(search_space)                 before the first trial
    def objective(trial): return program.run(trial, search_space(trial))

In the command, and in `results`, these are replaced; {{word}} stands for {word} itself:

    {lr}       the parameter of that name; each one has to be there
    {folder}   the trial's own folder (checkpoint.folder): what the program leaves there is there
               again when the trial goes on, also elsewhere; it goes unless the trial is a good one
    {seed}     another number for each trial, the same when it goes on
    {trial}    its number          {gpu}      CUDA_VISIBLE_DEVICES of this worker, e.g. 0

The command is divided into words, as a shell does, before anything is replaced, and no shell runs
it: a value is never more than part of a word.  For pipes and variables write sh -c '…'.  It runs in
the scripts' folder, and `python` is the Python of the worker.

Where the metric is:

    pattern=r"loss ([0-9.]+)"         in its output: the group `value`, or the first one.  Each
                                      match is a report, and the last one the trial's value.
    results="{folder}/results.jsonl"  in a file: {"step": 3, "loss": 0.5, "size": 10} on each line,
                                      with the names in `objectives`; the first is reported.
                                      "constraints": {"memory": -0.5}: kept if at most 0.

The step is the group `step`, or "step"; otherwise matches are counted.  A trial that goes on counts
from where it was if the command has {folder}, since the program can go on from there; otherwise the
program begins again.  A step that was reported is not reported again.

A program that goes on should save its state before it prints its metric, since whoever reads that
may end it; and print the last one again when it goes on, since it may be ended in between.

A C program that prints to a file keeps its lines for long: let it call fflush(stdout), or write
stdbuf -oL before the command.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FixedTrial

from hpo import checkpoint
from hpo.drain import Drained
from hpo.loops.metric import Metric
from hpo.loops.process import Lines, Program, running
from hpo.search.space import explore, value_at
from hpo.settings import SCRIPTS, Settings, UserError
from hpo.site import WORDS
from hpo.words import plain

OURS = ("folder", "seed", "trial", "gpu")  # placeholders that are no parameters
INTERPRETERS = ("python", "python3", "bash", "sh", "Rscript", "julia", "perl", "ruby", "node")
MEMORY = re.compile(
    r"out of memory|OutOfMemory|MemoryError|bad_alloc|can(?:'t|not) allocate memory|oom.kill", re.I
)
POLL_SECONDS = (
    0.1,
    1.0,
)  # between two looks at its output: at first, and at most while nothing comes
SIGNAL_SECONDS = 2.0  # from the end of a program by SIGTERM to the same signal for the worker
LAST_LINES = 3  # of its output, in the reason of a failure
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}|\{(\w+)\}")


class Command:
    """A command line and where its metric is; see above."""

    def __init__(
        self,
        command: str,
        *,
        pattern: str = "",
        results: str = "",
        objectives: Sequence[str] = ("value",),
        grace: float = 10.0,
    ) -> None:
        """Note it; nothing is looked at before `check` and `run`.

        Args:
            command: the program and its arguments, with placeholders.
            pattern: a regular expression, for one line of its output.
            results: a file of JSON lines that it writes; instead of `pattern`.
            objectives: the names of the metrics in the file, as in the script's OBJECTIVES.
            grace: seconds from SIGTERM to SIGKILL.
        """
        self.command, self.pattern, self.results = command, pattern, results
        self.objectives, self.grace = tuple(objectives), grace

    def check(self, search_space: Callable[[Any], Mapping[str, Any]]) -> None:
        """Raise UserError for what is wrong whatever the parameters' values are."""
        first = {name: value_at(each, 0.0) for name, each in explore(search_space).items()}
        self._check(set(search_space(FixedTrial(first))))

    def run(self, trial: optuna.Trial, config: Mapping[str, Any]) -> float | tuple[float, ...]:
        """Run the program to its end; return the value of the trial, or of several objectives.

        Raises:
            UserError: the program fails, or no metric is found.
            optuna.TrialPruned: the pruner sees no chance for this configuration.
        """
        self._check(set(config))
        values = self._values(trial, config)
        words = [_fill(word, values) for word in self._program()]
        log_file, begin = _begin_log(trial.number)
        results = SCRIPTS / _fill(self.results, values) if self.results else None
        goes_on = "folder" in _placeholders(self.command)
        metric = Metric(
            trial,
            Lines(results) if results else Lines(log_file, begin),
            None if results else self._compiled(),
            self.objectives,
            f"in {results}" if results else f"matches pattern={self.pattern!r} ({log_file})",
            goes_on and not results,
        )
        try:
            with running(words, log_file, self.grace) as program:
                status = self._watch(program, metric)
        except Drained:  # it may have finished an epoch when it was told to end
            metric.look()
            raise
        metric.look(whole=False)
        if status:
            _fail(status, log_file, begin)
        return metric.value()

    def _watch(self, program: Program, metric: Metric) -> int:
        """Report what comes, until the program ends; return its exit status."""
        pause, longest = POLL_SECONDS
        while (status := program.wait(pause)) is None:
            pause = min(1.5 * pause, longest)
            if metric.look(ask=True):
                pause = POLL_SECONDS[0]
        if status in (-signal.SIGTERM, 128 + signal.SIGTERM):
            time.sleep(SIGNAL_SECONDS)  # scancel signals all processes: ours raises Drained here
        return status

    # ---------- The command line ----------

    def _check(self, parameters: set[str]) -> None:
        """Raise UserError for a wrong placeholder, a wrong pattern, or no program."""
        for name in ("command", "results"):
            for word in _placeholders(getattr(self, name)) - parameters - set(OURS):
                ours = ", ".join(f"{{{each}}}" for each in OURS)
                raise UserError(
                    f"the {name} has {{{word}}}, which is no parameter of search_space, nor one of "
                    f"{ours}; for the word itself write {{{{{word}}}}}"
                )
        if left := parameters - _placeholders(self.command):
            which = " and ".join(f"{{{name}}}" for name in sorted(left))
            raise UserError(f"the command has no {which}, which search_space returns")
        if taken := parameters & set(OURS):
            raise UserError(
                f"search_space returns {' and '.join(taken)}, which is another thing here"
            )
        if bool(self.pattern) == bool(self.results):
            raise UserError("Command: give either pattern=… or results=…: where the metric is")
        if self.results and not _placeholders(self.results) & {"folder", "trial"}:
            raise UserError(
                f"results={self.results!r}: trials share it; write {{folder}}/results.jsonl"
            )
        self._compiled()
        self._program()

    def _compiled(self) -> re.Pattern[str]:
        try:
            compiled = re.compile(self.pattern)
        except re.error as error:
            raise UserError(
                f"pattern={self.pattern!r} is no regular expression: {error}"
            ) from error
        if self.pattern and not compiled.groups:
            raise UserError(f"pattern={self.pattern!r} has no group (…) around the metric")
        return compiled

    def _program(self) -> list[str]:
        """Return the words of the command. Raises UserError if its program is not there."""
        try:
            words = shlex.split(self.command)
        except ValueError as error:
            raise UserError(f"the command is none: {error}: {self.command}") from error
        if not words:
            raise UserError("the command is empty")
        interpreter = words[0] in INTERPRETERS
        if words[0] in ("python", "python3"):
            words[0] = sys.executable
        where = SCRIPTS / words[0] if "/" in words[0] else words[0]
        if not _placeholders(words[0]) and not shutil.which(where):
            raise UserError(f"the command's program is not found, or cannot be run: {where}")
        script = words[1] if interpreter and len(words) > 1 else "-"
        known = not script.startswith("-") and not _placeholders(script)
        if known and not (SCRIPTS / script).is_file():
            raise UserError(f"the command's program is not found: {SCRIPTS / script}")
        return words

    def _values(self, trial: optuna.Trial, config: Mapping[str, Any]) -> dict[str, str]:
        """Return the text of each placeholder."""
        settings = Settings.from_env()
        text = {name: str(plain(value)) for name, value in config.items()}
        text["seed"] = str((settings.seed or 0) + trial.number)
        text["trial"] = str(trial.number)
        text["gpu"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        if "folder" in _placeholders(self.command + self.results):
            text["folder"] = str(checkpoint.folder(trial))
        return text


def _placeholders(text: str) -> set[str]:
    return {match[2] for match in PLACEHOLDER.finditer(text) if match[2]}


def _fill(text: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda m: f"{{{m[1]}}}" if m[1] else values[m[2]], text)


# ---------- Its log, and why it failed ----------


def _begin_log(number: int) -> tuple[Path, int]:
    """Return where the output of a trial's program goes (logs/, beside study.db), from which byte.

    A trial that goes on has its first part in there.
    """
    settings = Settings.from_env()
    path = settings.beside / "logs" / f"{settings.study_name}.trial-{number:05d}.out"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        print(f"--- trial {number}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file)
    return path, path.stat().st_size


def _fail(status: int, log_file: Path, begin: int) -> None:
    """Raise UserError with what the program said last."""
    lines = Lines(log_file, begin).new(whole=False)
    last = " | ".join(line[:200] for line in lines[-LAST_LINES:])
    what = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    reason = f"{what}: {last or 'no output'}"
    if any(words in line for line in lines[-20:] for words in WORDS):
        raise RuntimeError(reason)  # the site's fault: the trial goes back (hpo/site.py)
    if any(MEMORY.search(line) for line in lines[-20:]):
        reason = f"out of memory ({reason})"
    elif status in (-signal.SIGKILL, 128 + signal.SIGKILL):
        reason = f"out of memory? ({reason})"
    raise UserError(f"{reason} ({log_file})")
