"""The short trials of one check: with which values, on how many images, and how much time is left.

bench = Bench(objective, me, settings)     in a temporary folder
bench.begin()                              the values, and the images, that all others have
bench.whole                                the trial that every other one is compared with
bench.differ(bench.whole, outcome, 1)      did one more computed differ in its first epoch?
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import TrialState

from hpo.check.picking import pick, value_of
from hpo.check.short_trial import Answer, Do, Outcome, Reports, ShortTrial, after, to_the_end
from hpo.check.table import progress
from hpo.script import Script
from hpo.search.remembered import plan_of
from hpo.search.space import check_choices
from hpo.settings import Settings, UserError, use
from hpo.study.opening import create_or_open_study
from hpo.trial import Objective

SECONDS = 150.0  # for a whole check, but for what a slow script needs at least
FIRST_SECONDS = 180.0  # until a trial must have reported, or ended
FEW = 1000  # TRAIN_IMAGES of a short trial: images, or whatever the script counts
LEAST = 128  # the least that it may be
EPOCH_SECONDS = 2.0  # that an epoch may take with FEW
START_SECONDS = 15.0  # of the processes of a trial on several GPUs, which begin anew each time
CHEAP_SECONDS = 1.0  # for one more epoch, here and after a resume
EPOCHS = 4  # at least, if the trial has them: 1, and 3 after the interruption
LONGER_SECONDS = 10.0  # for the same with more epochs
REFUSALS = 20  # of an objective, until it is no longer tried with other values


class Bench:
    """What the steps of a check have in common."""

    def __init__(self, objective: Objective, me: Script, settings: Settings) -> None:
        """Prepare.

        Raises:
            UserError: the search space cannot be used.
        """
        self.objective, self.me, self.images = objective, me, settings.train_images
        self.begun = time.monotonic()
        self.several = settings.gpus_per_trial > 1
        self.few = min(FEW, self.images)
        self.images_matter = True
        self.search_space = me.offers("search_space")
        self.space: dict[str, BaseDistribution] = plan_of(settings, me).space
        self.study = create_or_open_study(settings)
        self.fixed = settings.fixed
        self.chance = 0  # above 0: values drawn by chance, because the first ones are refused
        self.values = self.pick(0.0) or {}
        self.interrupted: ShortTrial  # after its first report, which `first` has
        self.first = Outcome()
        self._reported: dict[int, float] = {}  # when the trial that runs to its end began to
        self.whole = Outcome()
        self.epochs_name = ""  # the parameter that is the number of epochs, once it is known
        self.failing: dict[str, str] = {}  # name → why a trial with more of it fails
        self.read: set[str] = set()  # names that train_model has asked its config for
        self.noise = {"reports": 0.0, "saves": 0.0}  # between two trials that are the same
        self.ends: list[Outcome] = []  # of trials that should_prune() told to end

    # ---------- Values ----------

    def pick(
        self, position: float, given: Mapping[str, Any] | None = None, needed: tuple[str, ...] = ()
    ) -> dict[str, Any] | None:
        """Return a combination that search_space takes; see `hpo.check.picking.pick`."""
        given = {**(given or {}), **self.fixed}
        if self.search_space is None:
            return dict(given) or None
        found = pick(self.search_space, self.study, given, position, needed)
        if found is None and not needed:
            raise UserError("search_space refuses every combination that was tried (TrialPruned)")
        return found

    def changed(self, values: Mapping[str, Any], name: str, other: Any) -> dict[str, Any] | None:
        """Return `values` with another one of a parameter; None if search_space refuses that."""
        given = {**values, name: other}
        if self.search_space is None:
            return given
        return pick(self.search_space, self.study, given, tries=1)

    # ---------- Trials ----------

    def left(self) -> float:
        """Seconds that the check still has."""
        return SECONDS - (time.monotonic() - self.begun)

    def trial(self, values: Mapping[str, Any], images: int = 0) -> ShortTrial:
        """Return a new trial."""
        use(replace(Settings.from_env(), train_images=images or self.few))
        return ShortTrial(self.objective, self.me, values, self.chance)

    def run(
        self, values: Mapping[str, Any], answer: Answer = to_the_end, limit: float = math.inf
    ) -> Outcome:
        """Run a new trial and return what it did."""
        outcome = self.trial(values).run(answer, limit)
        self.read |= outcome.read
        return outcome

    def one_epoch(self, values: Mapping[str, Any]) -> Outcome:
        """Run a trial that should_prune() tells to end after its first report."""
        outcome = self.run(values, after(1, Do.END), FIRST_SECONDS)
        if outcome.reports and outcome.state != TrialState.FAIL:
            self.ends.append(outcome)
        return outcome

    @property
    def cost(self) -> float:
        """Seconds that a trial of one epoch takes."""
        return min(self.whole.first_report, self.whole.seconds)

    # ---------- The trials that all others are compared with ----------

    def begin(self) -> None:
        """Interrupt a trial, so that torch is warm and the number of images fits; run another."""
        progress("a trial that is interrupted after its first epoch")
        self._interrupt()
        while self.first.refused and self.search_space is None and self.chance < REFUSALS:
            self.chance += 1  # the objective itself suggests, and takes no such values
            self._interrupt()
        check_choices(self.first.distributions)
        if self._failed(self.first):
            return
        start = START_SECONDS if self.several else 0.0
        if self.first.epoch > EPOCH_SECONDS + start:
            self._take_fewer_images()
        progress("a trial that runs to its end")
        self.whole = self.run(self.values or self.first.params, self._go_on, FIRST_SECONDS * 4)
        self.values = {**self.whole.params, **self.values}
        self.space = {**self.whole.distributions, **self.space}
        ShortTrial.asks = self.whole.asked > 0
        self._measure_noise()

    def _failed(self, first: Outcome) -> bool:
        """Whether there is nothing to compare with: then the first trial says why."""
        nothing = first.state == TrialState.FAIL or first.refused
        if nothing or (first.late and not first.reports):
            self.whole = first
            return True
        return False

    def _interrupt(self) -> None:
        self.interrupted = self.trial(self.values)
        self.first = self.interrupted.run(after(1, Do.STOP), FIRST_SECONDS)
        self.read |= self.first.read

    def _take_fewer_images(self) -> None:
        """A slow epoch, or the first one of a process: again, on half of the images."""
        before = self.first.epoch
        self.few = max(min(LEAST, self.few), self.few // 2)
        progress(f"again with TRAIN_IMAGES={self.few}: that took {before:.0f} s")
        self._interrupt()
        again = self.first.epoch
        if again > EPOCH_SECONDS and again > 0.8 * before:
            self.images_matter = False
        elif again > EPOCH_SECONDS and self.few > LEAST:
            self.few = max(LEAST, int(self.few * EPOCH_SECONDS / again))
            self._interrupt()

    def _go_on(self, reports: Reports) -> Do:
        """To its end, as long as there is time for the same again and for every parameter."""
        number, now = len(reports), time.monotonic()
        begun = self._reported.setdefault(1, now)
        if number < EPOCHS:
            return Do.GO_ON
        each, spent = (now - begun) / (number - 1), now - self.begun
        if 2 * each < CHEAP_SECONDS and spent < SECONDS / 2:
            return Do.GO_ON  # however long the start of a trial takes
        configured = [*self.first.params.values(), *self.first.config.values()]
        if any(type(value) is int and value == number for value in configured):
            return Do.GO_ON  # presumably that was its last epoch, and it ends by itself
        trials = 2 + len(self.space or self.first.params)
        needed = each * (number + 1) + trials * self.first.first_report
        return Do.GO_ON if spent + needed < SECONDS else Do.STOP

    def _measure_noise(self) -> None:
        if not self.differ(self.whole, self.first, 1):
            return
        trials = [self.whole, self.first, self.one_epoch(self.values)]
        for kind in self.noise:
            lists = [numbers(trial, kind, 1) for trial in trials]
            gaps = [_gap(one, other) for one in lists for other in lists]
            self.noise[kind] = max(gaps)

    @property
    def repeatable(self) -> bool:
        """Whether two trials with the same values compute the same."""
        return not any(self.noise.values())

    def differ(self, one: Outcome, other: Outcome, reports: int) -> bool:
        """Whether two trials computed different things, as far as their first reports.

        Where no two trials are the same, by ten times more than those differ.
        """
        if reports == 0 or not one.reports:
            return _gap(one.value or [], other.value or []) > 10 * self.noise["reports"]
        return any(
            _gap(numbers(one, kind, reports), numbers(other, kind, reports)) > 10 * noise
            for kind, noise in self.noise.items()
        )

    # ---------- More epochs ----------

    def longer(self) -> tuple[Outcome, ShortTrial, Outcome] | None:
        """Return the same trial with more epochs, uninterrupted and interrupted after the first.

        None where no parameter is the number of epochs, or where that would take too long.
        """
        whole = self.whole
        if not whole.ended or not whole.reports:
            return None
        for name in sorted(self.like_epochs(), key=lambda name: "epoch" not in name):
            for more in self._affordable(name):
                values = self.changed(self.values, name, more)
                if values is None:
                    continue
                progress(f"more epochs: {name}={more}")
                again = self.run(values)
                if again.state == TrialState.FAIL:
                    self.failing[name] = f"with {name}={more} the trial fails: {again.reason}"
                if again.ended and len(again.reports) == more:
                    self.epochs_name = name
                    trial = self.trial(values)
                    return again, trial, trial.run(after(1, Do.STOP))
                break
        return None

    def like_epochs(self) -> list[str]:
        """Return the parameters whose value is the number of reports, and could be more."""
        number = len(self.whole.reports) if self.whole.ended else 0
        params = self.whole.params
        return [n for n, value in params.items() if type(value) is int and value == number]

    def _affordable(self, name: str) -> list[int]:
        number, each = len(self.whole.reports), max(self.whole.epoch, 1e-4)
        ladder = [value_of(self.space[name], position / 20) for position in range(21)]
        larger = sorted({value for value in ladder if value > number}, reverse=True)
        quick = [value for value in larger if 2 * value * each < LONGER_SECONDS]
        if number < EPOCHS and not quick:
            quick = [v for v in reversed(larger) if v >= EPOCHS][:1] or larger[:1]
        return quick

    @property
    def longest(self) -> bool:
        """Whether no trial has more epochs than `whole`, which has run to its end."""
        if not self.whole.ended:
            return False
        names = [self.epochs_name] if self.epochs_name else self.like_epochs()
        return not any(value_of(self.space[name], 1.0) > len(self.whole.reports) for name in names)


def numbers(outcome: Outcome, kind: str, reports: int) -> list[float]:
    """Return the numbers of a trial's first reports, or of its first savings."""
    if kind == "reports":
        return [number for report in outcome.reports[:reports] for number in report]
    return [number for save in outcome.saves[:reports] for number in save]


def _gap(one: list[float], other: list[float]) -> float:
    """Return the largest difference; infinite where one list is longer."""
    if len(one) != len(other):
        return math.inf
    pairs = zip(one, other, strict=True)
    gaps = [abs(a - b) for a, b in pairs if a != b and not (math.isnan(a) and math.isnan(b))]
    return max((math.inf if math.isnan(gap) else gap for gap in gaps), default=0.0)
