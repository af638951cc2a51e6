"""Is a script fit for a study?  `python my_model.py --check` says so before it is submitted.

    my_model.py: short trials in a temporary folder; your study is not touched
    one trial        ok     2 epochs in 1.3 s, value 0.6131, with TRAIN_IMAGES=1000
    prune            ok     it ends after the epoch in which should_prune() says yes
    resume           ok     interrupted after epoch 1 it went on at epoch 2, to the same value
    lr               ok     0.000707 instead of 0.0001 changes the result
    dropout          MEND   train_model never reads config["dropout"]; 0.25 instead of 0 changes …
    time             about  9 min per trial …
    memory           about  0.9 GB …
    1 to mend: dropout

The trials (hpo/check/short_trial.py) have the first, as a rule the smallest, value of each
parameter.  They can be repeated to the last bit; so when another value leaves the result as it is,
that value has not reached the model.
"""

from __future__ import annotations

import math
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType

import optuna
from optuna.trial import TrialState

from hpo.check.short_trial import EPOCHS, Outcome, Reports, ShortTrial
from hpo.drain import Drained
from hpo.script import Script
from hpo.search.objectives import check_objectives
from hpo.search.space import value_at
from hpo.settings import Settings, use
from hpo.trial import Objective
from hpo.words import duration, shown

FEW = 1000  # TRAIN_IMAGES of a short trial: images, or whatever the script counts
LEAST = 128  # the least that it may be
EPOCH_SECONDS = 2.0  # that an epoch may take with FEW
SECONDS = 45.0  # after which no further short trial is begun
LARGEST_SECONDS = 15.0  # at most, for one epoch with the last value of each parameter


def check_script(objective: Objective, me: Script, settings: Settings) -> int:
    """Check a script and its objective, print a table, and return the exit status.

    Raises:
        UserError: a setting is wrong.
    """
    script = me.py_script
    check_objectives(settings)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    with tempfile.TemporaryDirectory(prefix="check-") as folder:
        use(replace(settings, study_db=f"sqlite:///{folder}/study.db"))
        check = Check(objective, me, settings.train_images)
        print(
            f"{script}: short trials in a temporary folder; your study is not touched", flush=True
        )
        check.choose_few()
        if check.one_trial():
            check.prune()
            check.resume()
            check.parameters()
            check.time_and_memory()
    if check.to_mend:
        print(f"{len(check.to_mend)} to mend: {', '.join(check.to_mend)}")
        return 1
    print(f"ok: PY_SCRIPT={script} STUDY_NAME=my_study sbatch run-optuna-multinode_Turpan.sh")
    return 0


class Check:
    """The steps of a check, in their order, and what they have found."""

    def __init__(self, objective: Objective, me: Script, images: int) -> None:
        """Prepare; `images` is the number that a real trial trains on."""
        self.me = me
        self.objective, self.images, self.few = objective, images, min(FEW, images)
        self.deadline = time.monotonic() + SECONDS
        self.to_mend: list[str] = []
        self.epochs = EPOCHS  # of a short trial, if it has not ended by itself
        self.first = Outcome()  # the trial that is told to stop after its first epoch
        self.whole = Outcome()  # the trial that every other one is compared with
        self.repeatable = False
        self.suggested: set[str] = set()
        self.read: set[str] = set()  # names that train_model has asked its config for

    def row(self, name: str, verdict: str, text: str) -> None:
        """Print a row, at once: the next step may take long."""
        if verdict == "MEND":
            self.to_mend.append(name)
        print(f"{name:16} {verdict:6} {text}", flush=True)

    def choose_few(self) -> None:
        """Take fewer images and epochs where one takes long: each parameter needs a trial."""
        self.first = self._epoch(0.0, self.few)
        seconds = self.first.first_report
        if EPOCH_SECONDS < seconds < math.inf:
            self.epochs = 2
            self.few = min(self.few, max(LEAST, int(self.few * EPOCH_SECONDS / seconds)))
        use(replace(Settings.from_env(), train_images=self.few))

    def one_trial(self) -> bool:
        """Run the trial that the others are compared with; return whether it can be."""
        whole = self.first
        if whole.state != TrialState.FAIL:
            whole = ShortTrial(self.objective, self.me).run(
                lambda reports: len(reports) >= self.epochs
            )
        self.whole, self.read = whole, whole.read
        if whole.state == TrialState.FAIL:
            self.row("one trial", "MEND", f"it failed: {whole.reason}")
            return False
        if whole.reports:
            epochs = f"{len(whole.reports)} epochs in {duration(whole.seconds)}"
            value = f"value {whole.reports[-1][1]:.4f}"
            self.row("one trial", "ok", f"{epochs}, {value}, with TRAIN_IMAGES={self.few}")
        else:
            self.row("report", "MEND", "never called: trial.report(value, epoch) after each epoch")
        if SECONDS / 4 < whole.first_report < math.inf:
            print(
                f"    An epoch takes {duration(whole.first_report)}, so this check takes minutes."
            )
            print("    Faster: train on the first Settings.from_env().train_images of your data.")
        return True

    def prune(self) -> None:
        """Say yes after the first epoch: the trial must end there."""
        again, whole = self.first, self.whole
        if again.reports[:1] != whole.reports[:1]:  # it had more images
            again = self._epoch(0.0, self.few)
        self.repeatable = again.reports[:1] == whole.reports[:1]
        if not whole.reports:
            self.repeatable = again.value == whole.value
        if not whole.asked:
            self.row("prune", "MEND", "should_prune() is never asked; after each epoch: "
                     "if trial.should_prune(): raise optuna.TrialPruned")  # fmt: skip
        elif again.state == TrialState.PRUNED:
            self.row("prune", "ok", "it ends after the epoch in which should_prune() says yes")
        else:
            text = "should_prune() said yes and the trial went on; then: raise optuna.TrialPruned"
            self.row("prune", "MEND", text)

    def resume(self) -> None:
        """Interrupt a trial after its first epoch, and go on with it."""
        if not self.whole.asked or len(self.whole.reports) < 2:
            why = "the trial has one epoch only" if self.whole.asked else "see above"
            self.row("resume", "-", f"not tried: {why}")
            return
        trial = ShortTrial(self.objective, self.me)
        first = trial.run(interrupted)
        rest = trial.run(lambda reports: len(first.reports + reports) >= self.epochs)
        self.row("resume", *self._resumed(first.reports + rest.reports, rest))

    def _resumed(self, reports: Reports, rest: Outcome) -> tuple[str, str]:
        """Return the verdict on an interrupted trial whose second part is `rest`."""
        whole = self.whole
        if not rest.reports or rest.state == TrialState.FAIL:
            return "MEND", f"an interrupted trial did not go on {rest.reason}"
        if rest.reports[0][0] != whole.reports[1][0]:
            return "MEND", (
                "an interrupted trial began again; checkpoint.load belongs before the epochs, "
                "checkpoint.save before trial.should_prune"
            )
        went_on = "interrupted after epoch 1 it went on at epoch 2"
        if (reports, rest.value) == (whole.reports, whole.value):
            return "ok", f"{went_on}, to the same value"
        ended = f"{rest.reports[-1][1]:.6g} instead of {whole.reports[-1][1]:.6g}"
        if on_gpu() or not self.repeatable:
            return "ok", f"{went_on} ({ended}; here, no two runs are quite the same)"
        return "MEND", (
            f"{went_on}, but to {ended}: something is not in its checkpoint "
            "(a scheduler? random numbers that are not torch's?)"
        )

    def parameters(self) -> None:
        """Change one value after the other: it must be read, and change the result."""
        for name, distribution in self.whole.distributions.items():
            verdict = self._parameter(name, self.whole.params[name], value_at(distribution, 0.5))
            self.row(name, *verdict)
        for name in sorted(self.suggested - self.whole.params.keys()):
            verdict = ("ok", "reads it") if name in self.read else ("MEND", "never reads it")
            self.row(name, verdict[0], f"in a branch of search_space; train_model {verdict[1]}")

    def _parameter(self, name: str, before: object, other: object) -> tuple[str, str]:
        change = f"{shown(other)} instead of {shown(before)}"
        changed = None  # not known
        if other != before and self.repeatable and time.monotonic() < self.deadline:
            outcome = self._with_another(name, other)
            if outcome.state == TrialState.FAIL:
                return "look", f"{change}: the trial fails ({outcome.reason})"
            changed = outcome.result != self.whole.result
        if changed:
            return "ok", f"{change} changes the result"
        if name in self.read and changed is None:
            return "ok", "train_model reads it (no other value was tried)"
        epochs = f"nothing in {len(self.whole.reports)} epochs"
        if name in self.read:
            return "look", f"train_model reads it, but {change} changes {epochs}: is it used?"
        if changed is None and name not in self.whole.config:
            return "look", "not proven: train_model(config, trial) is not given it by this name"
        tried = f"; {change} changes {epochs}" if changed is False else ""
        return "MEND", f'suggested, but train_model never reads config["{name}"]{tried}'

    def _with_another(self, name: str, value: object) -> Outcome:
        """Run the trial with another value, until its result is another."""
        known = self.whole.reports
        outcome = ShortTrial(self.objective, self.me, changes={name: value}).run(
            lambda reports: reports != known[: len(reports)] or len(reports) >= self.epochs
        )
        self.read |= outcome.read
        self.suggested |= outcome.params.keys()
        return outcome

    def time_and_memory(self) -> None:
        """Extrapolate what one trial will need, from middle values and from the last ones."""
        first = self.whole.first_report
        if not self.whole.reports:
            self.row("time", "-", "not known: the trial reports no epoch")
            return
        if time.monotonic() > self.deadline:
            self.row(
                "time", "about", f"{duration(first)} per epoch of this trial; others not tried"
            )
            return
        few, twice = self._epoch(0.5, self.few), self._epoch(0.5, min(2 * self.few, self.images))
        if not few.reports or not twice.reports:
            self.row("time", "look", f"with middle values the trial fails: {few.reason}")
            return
        seconds = self._whole_epoch(few, twice)
        self.row("time", "about", f"{self._trial(few, seconds)} {device()}; middle values:")
        self.row("", "", " ".join(f"{name}={shown(value)}" for name, value in few.params.items()))
        with time_limit(LARGEST_SECONDS):
            last = self._epoch(1.0, self.few)
        if last.reports:
            seconds *= last.first_report / few.first_report
            self.row("", "", f"{self._trial(last, seconds)}; last value of each")
        else:
            why = last.reason or f"more than {duration(LARGEST_SECONDS)} for {self.few} images"
            self.row("", "", f"last value of each: not measured ({why})")
        self.row(
            "memory", "about", f"{peak_memory() / 1e9:.1f} GB at most in these trials {device()}"
        )

    def _epoch(self, position: float, images: int) -> Outcome:
        use(replace(Settings.from_env(), train_images=images))
        return ShortTrial(self.objective, self.me, position).run(lambda reports: True)

    def _whole_epoch(self, few: Outcome, twice: Outcome) -> float:
        """Return the seconds of an epoch on all images: a straight line through two points.

        A script that takes no longer for twice the images does not look at TRAIN_IMAGES: its few
        are all.
        """
        more = twice.first_report - few.first_report
        if twice.reports == few.reports or more < few.first_report / 10:
            print("    (TRAIN_IMAGES makes no difference: these trials have all of your data)")
            return few.first_report
        return few.first_report + more * (self.images - self.few) / self.few

    def _trial(self, outcome: Outcome, seconds: float) -> str:
        """Return how long the trial would take with `seconds` per epoch."""
        epochs = outcome.config.get("epochs")
        if not isinstance(epochs, int):
            return f"{duration(seconds)} per epoch"
        return f"{duration(epochs * seconds)} per trial of {epochs} epochs"


def interrupted(reports: Reports) -> bool:
    """Do what a worker does when its job ends, where it is asked should_prune()."""
    raise Drained


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the trial that runs in this block when its time is over."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise Drained

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def on_gpu() -> bool:
    """Return whether torch has one, and the script so presumably uses it."""
    return "torch" in sys.modules and bool(sys.modules["torch"].cuda.is_available())


def device() -> str:
    """Return where the trials ran."""
    if on_gpu():
        return f"on {sys.modules['torch'].cuda.get_device_name()}"
    threads = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else 1
    return f"on this CPU ({threads} thread{'s' * (threads > 1)})"


def peak_memory() -> int:
    """Return the most bytes so far: of the GPU that torch had, else of this process."""
    if on_gpu():
        return int(sys.modules["torch"].cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
