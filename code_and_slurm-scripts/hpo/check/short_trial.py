"""One short trial of a script, watched: what --check (hpo/check/check_script.py) is made of.

    trial = ShortTrial(objective)                          a new study, in the folder of STUDY_DB
    outcome = trial.run(lambda reports: len(reports) >= 3)      until should_prune says yes
    outcome = trial.run(...)                               goes on, if it was interrupted

Every such trial is number 0 of a study of its own and starts from the same seeds, with values that
are picked instead of sampled: two of them with the same values compute the same.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo.drain import Drain, Drained
from hpo.script import Script
from hpo.search.space import value_at
from hpo.settings import Settings, use
from hpo.study.opening import create_or_open_study
from hpo.trial import Objective, let_several_objectives_report, run_trial

Reports: TypeAlias = "list[tuple[int, float]]"  # step, value
EPOCHS = 3  # of a short trial, if it has not ended by itself
Answer: TypeAlias = Callable[[Reports], bool]  # of should_prune; may raise Drained


@dataclass
class Outcome:
    """What one run of a short trial did."""

    state: TrialState = TrialState.RUNNING
    value: Any = None  # of the objective; None unless the trial is complete
    reason: str = ""  # of a failure
    reports: Reports = field(default_factory=list)
    asked: int = 0  # calls of should_prune
    first_report: float = math.inf  # seconds after the start
    seconds: float = 0.0
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # what train_model was given
    read: set[str] = field(default_factory=set)  # keys that it asked its config for

    @property
    def result(self) -> tuple[Any, ...]:
        """What two trials have in common if they computed the same."""
        return self.state, self.value, self.reports


class Picked(optuna.samplers.BaseSampler):
    """Gives each parameter the value at `position`, but for those that `changes` has."""

    def __init__(self, position: float, changes: Mapping[str, Any]) -> None:
        self.position, self.changes = position, changes

    def infer_relative_search_space(self, *_: Any) -> dict[str, BaseDistribution]:
        """Return nothing: every parameter is independent of the others."""
        return {}

    def sample_relative(self, *_: Any) -> dict[str, Any]:
        """Return nothing, for the same reason."""
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        """Return the value of one parameter."""
        return self.changes.get(name, value_at(distribution, self.position))


class Config(dict[str, Any]):
    """A configuration that notes which of its values are asked for by name.

    Copies (`**config`, dict(config)) and items() ask for all of them, which proves nothing.
    """

    def __init__(self, config: Mapping[str, Any], read: set[str]) -> None:
        super().__init__(config)
        self.read = read

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value, as dict.get does."""
        self.read.add(key)
        return super().get(key, default)


class AskedPruner(optuna.pruners.BasePruner):
    """Gives the answers of a check to should_prune(), and notes that it was called."""

    def __init__(self, outcome: Outcome, answer: Answer) -> None:
        self.outcome, self.answer = outcome, answer
        self.said_yes = False

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return the answer; Drained, which it may raise, goes through the trial."""
        self.outcome.asked += 1
        self.said_yes = self.answer(self.outcome.reports)
        return self.said_yes


class ShortTrial:
    """Trial 0 of a new study in STUDY_DB, which is a temporary one."""

    studies = 0

    def __init__(
        self,
        objective: Objective,
        me: Script,
        position: float = 0.0,
        changes: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the study; see `Picked` for `position` and `changes`."""
        ShortTrial.studies += 1
        # Its checkpoints are its own, too.
        settings = use(replace(Settings.from_env(), study_name=f"check-{self.studies}"))
        self.study = create_or_open_study(settings)
        self.study.sampler = Picked(position, changes or {})
        self.objective, self.names = objective, me.names
        self.runs = 0

    def run(self, answer: Answer) -> Outcome:
        """Run it until it ends, or until `answer` ends it; once more to resume it.

        Raises:
            SystemExit: Ctrl-C.
        """
        outcome = Outcome()
        drain = Drain(math.inf)
        seed_everything(self.runs)  # whoever resumes it is another process, elsewhere in its seeds
        self.runs += 1
        self.study.pruner = pruner = AskedPruner(outcome, answer)
        trial = self.study.ask()
        if len(self.study.directions) > 1:
            let_several_objectives_report(trial)
        self._watch_reports(trial, outcome, pruner)
        begin = time.monotonic()
        with watch_config(self.names, outcome):
            outcome.state = run_trial(self.study, trial, self.objective, drain).state
        outcome.seconds = time.monotonic() - begin
        if drain.is_due():
            raise SystemExit("the check was interrupted")
        [frozen] = self.study.get_trials()
        outcome.value = frozen.values
        outcome.reason = frozen.user_attrs.get("fail_reason", "")
        outcome.params, outcome.distributions = frozen.params, frozen.distributions
        return outcome

    def _watch_reports(self, trial: optuna.Trial, outcome: Outcome, pruner: AskedPruner) -> None:
        report, begin = trial.report, time.monotonic()

        def watched(value: float, step: int) -> None:
            if pruner.said_yes or len(outcome.reports) >= EPOCHS:
                raise Drained  # it does not ask, or it does not listen: nothing else ends it
            report(value, step)
            outcome.reports.append((step, float(value)))
            outcome.first_report = min(outcome.first_report, time.monotonic() - begin)

        trial.report = watched  # type: ignore[method-assign]


@contextmanager
def watch_config(script: Any, outcome: Outcome) -> Iterator[None]:
    """Note what the script's train_model asks its configuration for, where it has both.

    What search_space itself reads, or what counts the parameters, does not train.
    """
    original = script.get("train_model")

    def watched(*args: Any, **kwargs: Any) -> Any:
        return original(
            *[note(value) for value in args],
            **{name: note(value) for name, value in kwargs.items()},
        )

    def note(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        outcome.config = value
        return Config(value, outcome.read)

    if original is None:
        yield
        return
    script["train_model"] = watched
    try:
        yield
    finally:
        script["train_model"] = original


def seed_everything(seed: int) -> None:
    """Seed what a script may draw from, so that an unseeded one can be repeated, too."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
