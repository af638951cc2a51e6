"""Drain: how a worker is told to stop, and when its trial may be interrupted.

Six things end a worker early, none of which loses a finished epoch:

    SIGUSR1             to this process: stop after the running epoch
    DRAIN_FILE          the same for all workers of a job: hpo/job/job.sh makes this file when Slurm
                        signals the batch shell.  A signal to the workers' step would also end the
                        process that mounts the container's image, under the workers' feet.
    the job's end       the next epoch would not be finished in time: stop before it starts
    … is there          the running epoch has not ended, REPORT_SECONDS before: interrupt it.  One
                        that does not react within HARD_SECONDS, as in a long call of a library,
                        ends with its process, and keep_running.sh returns the trial
    SIGTERM, SIGINT     from scancel or Ctrl-C: stop at once; SIGHUP, of a closed terminal, too
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import optuna
from optuna.trial import FrozenTrial

from hpo.words import logger

REPORT_SECONDS = 45.0  # of the job, for what comes after the workers: returns, successor, report
HARD_SECONDS = 15.0  # of these, until a process that does not react is ended
INTERRUPTED = 74  # its exit status, known to hpo/job/keep_running.sh
MARGIN_SECONDS = 5.0  # from the moment that a trial is saved until it is asked to stop, at most
AGAIN_SECONDS = 20.0  # after a signal that a trial has swallowed, until another interrupts again
RESERVE_SECONDS = 90.0  # before the job's end; as #SBATCH --signal=B:USR1@90, the second net

RAISING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # these raise `Drained`

log = logger("hpo.worker")


class Drained(BaseException):
    """The trial that is running goes back to the queue.

    Not an `Exception`, so that no `except Exception` in an objective can swallow it.
    """


class Drain:
    """Whether this worker has to stop.  Installs the signal handlers."""

    def __init__(self, job_end: float, drain_file: Path | None = None) -> None:
        """Prepare for a job that ends at `job_end` (Unix seconds, or infinite)."""
        self._job_end = job_end
        self._drain_file = drain_file
        self._requested = False
        self._at_once = False
        self._interruptible = False
        self._interrupted = float("inf")  # when, by time.monotonic()
        # A plain value, no Event: what a signal raises may leave an Event's lock locked for ever.
        self._running = False  # a trial
        self._last = time.monotonic()  # start of the running epoch
        self._longest_epoch = 0.0  # seconds
        _in_use[:] = [self]
        self._install()

    def _install(self) -> None:
        signal.signal(signal.SIGUSR1, self._stop_after_epoch)
        signal.signal(signal.SIGTERM, self._stop_now)
        signal.signal(signal.SIGINT, self._stop_now)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # unless it shall survive: nohup
            signal.signal(signal.SIGHUP, self._stop_now)

    def is_due(self) -> bool:
        """Whether to stop: asked to, or the next epoch would not end before the job does."""
        if self._drain_file and self._drain_file.exists():
            return True
        return self._requested or self._too_late_for(self._longest_epoch)

    def will_be_due(self) -> bool:
        """Whether `is_due` will say so at the end of the running epoch, which is about now."""
        epoch = max(self._longest_epoch, time.monotonic() - self._last)
        return self.is_due() or self._too_late_for(epoch, MARGIN_SECONDS)

    def _too_late_for(self, epoch: float, margin: float = 0.0) -> bool:
        needed = max(RESERVE_SECONDS, REPORT_SECONDS + epoch)
        return time.time() + margin + needed > self._job_end

    @property
    def at_once(self) -> bool:
        """Whether SIGTERM or SIGINT has come."""
        return self._at_once

    def came_to(self, error: BaseException) -> bool:
        """Whether `error` was raised in a signal handler of the script's own; then it stops."""
        handlers = [signal.getsignal(number) for number in (*RAISING, signal.SIGUSR1)]
        codes = [getattr(handler, "__code__", None) for handler in handlers]
        frames = traceback.walk_tb(error.__traceback__)
        if any(frame.f_code in codes for frame, _ in frames):
            self._requested = self._at_once = True
        return self._at_once

    def epoch_ended(self) -> None:
        """Note how long the epoch took."""
        now = time.monotonic()
        self._longest_epoch = max(self._longest_epoch, now - self._last)
        self._last = now

    def leave_out(self, seconds: float) -> None:
        """Note that so much of the running epoch was a wait for the site."""
        self._last += seconds

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let SIGTERM and SIGINT raise `Drained` in this block; elsewhere they only ask."""
        self._install()  # the trial before may have put in handlers of its own
        self._last = time.monotonic()
        self._interruptible = self._running = True
        try:
            if self._at_once:  # the signal came while the trial was being claimed
                raise Drained
            yield
            self.epoch_ended()  # of an objective without reports: all of it
        finally:
            self._interruptible = self._running = False

    def watch_the_end(self) -> None:
        """From now on, interrupt an epoch that would outlast the job; for a thread, see above."""
        if self._job_end < float("inf"):
            threading.Thread(target=self._interrupt, name="job's end", daemon=True).start()

    def _interrupt(self) -> None:
        while (left := self._job_end - REPORT_SECONDS - time.time()) > 0:
            time.sleep(min(left, 60.0))  # the clock may be set meanwhile
        if not self._running:
            return  # the next claim sees that it is too late
        log.info("the job ends in %.0f s: the running epoch is interrupted", REPORT_SECONDS)
        if thread := threading.main_thread().ident:  # also out of a call that waits
            signal.pthread_kill(thread, signal.SIGTERM)
        end = time.monotonic() + HARD_SECONDS
        while self._running and time.monotonic() < end:
            time.sleep(0.1)
        if self._running:
            log.warning("it does not react: its process ends, and the trial goes back")
            sys.stdout.flush()
            os._exit(INTERRUPTED)

    def _stop_after_epoch(self, signum: int, frame: FrameType | None) -> None:
        self._requested = True

    def _stop_now(self, signum: int, frame: FrameType | None) -> None:
        self._requested = self._at_once = True
        # A second signal, which scancel sends at once, must not interrupt what the trial cleans up.
        swallowed = time.monotonic() - self._interrupted > AGAIN_SECONDS and self._running
        if self._interruptible or swallowed:
            self._interruptible = False
            self._interrupted = time.monotonic()
            raise Drained


@contextmanager
def signals_held() -> Iterator[None]:
    """Let a signal that comes in this block do what it does at the block's end.

    To block them (pthread_sigmask) would not do: any other thread can take a signal instead, and
    what its handler raises still comes out of the main thread, between any two lines.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # nothing is raised here
        return
    came: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        came.append(signum)

    # One that is ignored (nohup) stays so: the programs that start here shall ignore it, too.
    handlers = {number: signal.getsignal(number) for number in RAISING}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in held:
        signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for signum in came:
            os.kill(os.getpid(), signum)


@contextmanager
def handlers_put_back() -> Iterator[None]:
    """Let signals do after this block what they did before it: a notebook's cell can be stopped."""
    handlers = {number: signal.getsignal(number) for number in (*RAISING, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # one that is not Python's
                signal.signal(number, handler)


_in_use: list[Drain] = []  # at most one: signals have one handler


def _be_ordinary() -> None:
    """Let a process that the objective forks take signals as any other: a Pool's end by SIGTERM,
    and at Ctrl-C a DataLoader's leave without a word.
    """
    for number in RAISING:
        if getattr(signal.getsignal(number), "__func__", None) is Drain._stop_now:
            interrupt = number == signal.SIGINT
            signal.signal(number, signal.default_int_handler if interrupt else signal.SIG_DFL)


os.register_at_fork(after_in_child=_be_ordinary)


def asked_to_stop() -> bool:
    """Whether this worker's trial will have to stop when it next asks should_prune()."""
    return any(drain.will_be_due() for drain in _in_use)


class DrainingPruner(optuna.pruners.BasePruner):
    """The study's pruner, asked after each epoch: the moment to stop without losing anything."""

    def __init__(self, pruner: optuna.pruners.BasePruner, drain: Drain) -> None:
        self._pruner = pruner
        self._drain = drain

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Ask the pruner, unless it is time to stop; raises `Drained` then."""
        self._drain.epoch_ended()
        if self._drain.is_due():
            raise Drained
        return self._pruner.prune(study, trial)
