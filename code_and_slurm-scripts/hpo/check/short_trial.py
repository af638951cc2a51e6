"""One short trial of a script, watched: what --check (hpo/check/check_script.py) is made of.

    trial = ShortTrial(objective, me, {"lr": 0.1})         a new study, in the folder of STUDY_DB
    outcome = trial.run(after(1, Do.STOP))                 interrupted after its first report …
    outcome = trial.run()                                  … it goes on, to the end of the objective

Every such trial is number 0 of a study of its own and starts from the same seeds, with values that
are picked instead of sampled: two of them with the same values compute the same.
"""

from __future__ import annotations

import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from types import FrameType
from typing import Any, TypeAlias

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from hpo import checkpoint, gpu
from hpo.check import live
from hpo.check.afresh import Kept
from hpo.check.config import Config
from hpo.check.picking import Picked
from hpo.drain import Drain, Drained
from hpo.script import Script
from hpo.settings import Settings, use
from hpo.study.opening import create_or_open_study
from hpo.trial import Objective, freeze_all, let_several_objectives_report, run_trial
from hpo.words import place_of

Reports: TypeAlias = "list[tuple[int, float]]"  # step, value
LOOKING = 3.0  # seconds that the snapshots of a run may take; the first two are always made
PATIENCE = 20, 5.0  # reports, seconds: until a script that is to end is no longer waited for


class Do(Enum):
    """What a trial is to do after a report."""

    GO_ON = 0
    END = 1  # should_prune() says yes
    STOP = 2  # the worker stops, as when its job ends: the trial goes on another time


Answer: TypeAlias = Callable[[Reports], Do]


def after(reports: int, what: Do) -> Answer:
    """Return the answer of a trial that is to end, or to stop, after so many reports."""
    return lambda so_far: what if len(so_far) >= reports else Do.GO_ON


def to_the_end(so_far: Reports) -> Do:
    """Never end it."""
    return Do.GO_ON


@dataclass
class Outcome:
    """What one run of a short trial did."""

    state: TrialState = TrialState.RUNNING
    value: Any = None  # of the objective, a list; None unless the trial is complete
    reason: str = ""  # of a failure
    reports: Reports = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of the reports, seconds after the start
    fraction: float | None = None  # a step that is no whole number; Optuna cuts it off
    asked: int = 0  # calls of should_prune
    late: bool = False  # the time was over
    seconds: float = 0.0
    saves: list[list[float]] = field(default_factory=list)  # sums of the weights
    kept: set[int] = field(default_factory=set)  # what was given to checkpoint.save
    seen: list[dict[str, live.Seen]] = field(default_factory=list)  # at each of the first reports
    distributions: dict[str, BaseDistribution] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # what train_model was given
    read: set[str] = field(default_factory=set)  # keys that it asked its config for

    @property
    def first_report(self) -> float:
        """Seconds from the start to the first report; infinite without one."""
        return self.times[0] if self.times else math.inf

    @property
    def epoch(self) -> float:
        """Seconds of an epoch: not of the first, which pays for the start, if there are more."""
        steps = sorted(b - a for a, b in zip(self.times, self.times[1:], strict=False))
        return steps[len(steps) // 2] if steps else min(self.first_report, self.seconds)

    @property
    def refused(self) -> bool:
        """Whether the script takes no trial with these values."""
        return self.state == TrialState.PRUNED and not self.reports and not self.asked

    @property
    def ended(self) -> bool:
        """Whether it ran to the end of the objective."""
        return self.state == TrialState.COMPLETE


class _Pruner(optuna.pruners.BasePruner):
    """Answers should_prune(), and notes that it was called."""

    def __init__(self, outcome: Outcome, answer: Answer) -> None:
        self.outcome, self.answer, self.over = outcome, answer, False

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Return the answer; Drained goes through the trial, as in a worker."""
        self.outcome.asked += 1
        what = self.answer(self.outcome.reports) if self.outcome.reports else Do.GO_ON
        self.over = what != Do.GO_ON
        if what == Do.STOP:
            raise Drained
        return self.over


class ShortTrial:
    """Trial 0 of a new study in STUDY_DB, which is a temporary one."""

    studies = 0
    drain: Drain | None = None  # of the trial before
    asks = True  # whether the script is known to ask should_prune()
    kept: Kept  # of the script, since the check began

    def __init__(
        self, objective: Objective, me: Script, values: Mapping[str, Any], chance: int = 0
    ) -> None:
        """Make the study; see `Picked` for `values` and `chance`."""
        ShortTrial.studies += 1
        # Its checkpoints are its own, too.
        settings = use(replace(Settings.from_env(), study_name=f"check-{self.studies}"))
        self.settings = settings
        self.study = create_or_open_study(settings)
        self.study.sampler = Picked(values, chance)
        self.objective, self.me = objective, me
        self.runs = 0

    def run(self, answer: Answer = to_the_end, limit: float = math.inf) -> Outcome:
        """Run it until it ends, or `answer` or the `limit` (seconds) ends it; again, to resume it.

        Raises:
            KeyboardInterrupt: Ctrl-C.
            gpu.Unusable: CUDA of this process is gone.
        """
        use(self.settings)
        outcome = Outcome()
        before, drain = ShortTrial.drain, Drain(math.inf)
        ShortTrial.drain = drain
        if before and before.at_once:  # Ctrl-C between two trials
            raise KeyboardInterrupt
        seed_everything(self.runs)  # whoever resumes it is another process, elsewhere in its seeds
        ShortTrial.kept.put_back(new_process=self.runs > 0)
        self.runs += 1
        pruner = self.study.pruner = _Pruner(outcome, answer)
        trial = self.study.ask()
        if len(self.study.directions) > 1:
            let_several_objectives_report(trial)
        freeze_all()  # then live.alive looks at what this trial makes, not at all of torch
        begin = time.monotonic()
        _watch_reports(trial, outcome, pruner, begin)
        places: list[str] = []
        with _watched(self.me, outcome), _time_limit(limit, outcome):
            ended = run_trial(self.study, trial, _placed(self.objective, places), drain)
        outcome.seconds = time.monotonic() - begin
        if drain.at_once:
            raise KeyboardInterrupt
        if gpu.ending:
            raise gpu.ending
        [frozen] = self.study.get_trials()
        outcome.state, outcome.value = ended.state, frozen.values
        outcome.reason = " ".join([frozen.user_attrs.get("fail_reason", ended.site), *places])
        outcome.params, outcome.distributions = frozen.params, frozen.distributions
        return outcome


def _placed(objective: Objective, places: list[str]) -> Objective:
    """Return the objective; where it fails, `places` is given the line of the user's script."""

    def placed(trial: optuna.Trial) -> Any:
        try:
            return objective(trial)
        except (optuna.TrialPruned, Drained):
            raise
        except BaseException as error:
            if place := place_of(error):
                places.append(place)
            raise

    return placed


def _watch_reports(trial: optuna.Trial, outcome: Outcome, pruner: _Pruner, begin: float) -> None:
    report = trial.report
    wanted: list[float] = []  # when it should have ended
    looking = 0.0  # seconds that the check itself has taken
    skipped = False

    def watched(value: float, step: int) -> None:
        nonlocal looking, skipped
        if outcome.late or pruner.over or (wanted and _waited(wanted)):
            raise Drained  # it does not ask, or it does not listen: nothing else ends it
        report(value, step)
        if int(step) != step:
            outcome.fraction = float(step)
        outcome.reports.append((int(step), float(value)))
        now = time.monotonic()
        outcome.times.append(now - begin - looking)
        if len(outcome.seen) < 2 or (looking < LOOKING and not skipped):
            outcome.seen.append(live.snapshot(sys._getframe(1)))
        else:
            skipped = True  # of those there are, none may be missing in between
        looking += time.monotonic() - now
        what = pruner.answer(outcome.reports)
        if what != Do.GO_ON:
            wanted.append(time.monotonic())
        if what == Do.STOP:
            signal.raise_signal(signal.SIGUSR1)  # the worker is to stop after this epoch

    trial.report = watched  # type: ignore[method-assign]


def _waited(wanted: list[float]) -> bool:
    """Whether a trial that was to end has had its time to ask should_prune()."""
    reports, seconds = PATIENCE
    long_ago = time.monotonic() - wanted[0] > seconds
    return not ShortTrial.asks or len(wanted) >= reports or long_ago


@contextmanager
def _time_limit(seconds: float, outcome: Outcome) -> Iterator[None]:
    """Interrupt the trial that runs in this block when its time is over.

    Again, where Python ignores what is raised: in a __del__, or what a weak reference calls.
    """

    def stop(signum: int, frame: FrameType | None) -> None:
        outcome.late = True
        raise Drained

    def ignored(what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, Drained):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        else:
            hook(what)

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds if seconds < math.inf else 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.unraisablehook = hook


@contextmanager
def _watched(me: Script, outcome: Outcome) -> Iterator[None]:
    """Note what train_model asks its configuration for, and the weights that it saves.

    What search_space itself reads, or what counts the parameters, does not train.  The processes
    of a trial on several GPUs import the script afresh: there, nothing is noted.
    """
    names: Any = me.names
    save, train_model = checkpoint.save, names.get("train_model")

    def saved(*arguments: Any, **others: Any) -> Any:
        found = save(*arguments, **others)
        model = arguments[1] if len(arguments) > 1 else others.get("model")
        state: Any = getattr(model, "state_dict", dict)()
        outcome.kept |= {live.identity_of(each) for each in (*arguments, *others.values())}
        outcome.saves.append(live.totals(state.values()))
        return found

    def watched(*arguments: Any, **others: Any) -> Any:
        return train_model(*map(note, arguments), **{n: note(v) for n, v in others.items()})

    def note(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        outcome.config = value
        return Config(value, outcome.read)

    replaced = {name: value for name, value in names.items() if value is save}
    if callable(train_model) and Settings.from_env().gpus_per_trial == 1:
        replaced["train_model"] = train_model
    for name in replaced:
        names[name] = watched if name == "train_model" else saved
    checkpoint.save = saved
    try:
        yield
    finally:
        checkpoint.save = save
        names.update(replaced)


def seed_everything(seed: int) -> None:
    """Seed what a script may draw from, so that an unseeded one can be repeated, too."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
