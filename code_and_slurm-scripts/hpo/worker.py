"""A worker: claim a trial, run the objective, tell the result; again, until the study is full.

    python optuna_mnist.py      is one worker; the launch scripts start one per GPU

How a worker ends, and with which exit status:

    0  the study has its TOTAL_TRIALS trials, or the worker was asked to stop:
       SIGUSR1           finish the epoch, give the trial back to the queue
       SIGTERM, Ctrl-C   give the trial back at once (the epoch that was running is lost)
    1  three trials in a row failed and none has succeeded: the objective itself is broken
    2  a setting is wrong (hpo/settings.py)

One bad trial (out of memory, a loss that is no number, an exception) is recorded as FAIL with the
reason in its user attribute `fail_reason`, and the worker goes on.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo import checkpoint
from hpo.samplers import make_pruner, make_sampler, sampler_seed
from hpo.settings import Settings
from hpo.storage import create_or_open_study

Objective: TypeAlias = Callable[[optuna.Trial], float]
FAILURES_IN_A_ROW = 3  # without any success: then it is not the parameters, it is the objective

log = logging.getLogger("hpo.worker")


class Drained(BaseException):
    """The trial that is running goes back to the queue.

    Not an `Exception`, so that no `except Exception` in an objective can swallow it.
    """


class Drain:
    """Whether this worker has been asked to stop, and whether it may be interrupted just now."""

    def __init__(self) -> None:
        self.requested = False
        self.in_objective = False
        signal.signal(signal.SIGUSR1, self._finish_epoch)
        signal.signal(signal.SIGTERM, self._stop_now)
        signal.signal(signal.SIGINT, self._stop_now)

    def _finish_epoch(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True

    def _stop_now(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        if self.in_objective:  # elsewhere the worker is at the database: let it finish that
            self.in_objective = False
            raise Drained


class DrainingPruner(optuna.pruners.BasePruner):
    """The study's pruner, asked after each epoch: the moment to stop without losing anything."""

    def __init__(self, pruner: optuna.pruners.BasePruner, drain: Drain) -> None:
        self._pruner = pruner
        self._drain = drain

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        if self._drain.requested:
            raise Drained
        return self._pruner.prune(study, trial)


def run_worker(objective: Objective) -> int:
    """Run trials until the study has TOTAL_TRIALS of them; return the exit status.

    Raises:
        UserError: a setting is wrong, or the study belongs to another objective.
    """
    settings = Settings.from_env(PY_SCRIPT=Path(objective.__code__.co_filename).name)
    _log_to_stdout(settings)
    drain = Drain()
    study = create_or_open_study(settings)
    started = len(study.get_trials(deepcopy=False))
    study.sampler = make_sampler(
        settings.sampler, sampler_seed(settings.seed, settings.rank, started)
    )
    study.pruner = DrainingPruner(make_pruner(settings.pruner), drain)
    failures, successes = 0, 0
    while not drain.requested:
        trial = claim(study, settings.total_trials)
        if trial is None:
            log.info("the study has its %d trials", settings.total_trials)
            break
        state = run_trial(study, trial, objective, drain)
        failures = failures + 1 if state == TrialState.FAIL else 0
        successes += state in (TrialState.COMPLETE, TrialState.PRUNED)
        if failures >= FAILURES_IN_A_ROW and not successes:
            log.error("%d trials in a row failed, none succeeded: stopping", failures)
            return 1
    return 0


def claim(study: optuna.Study, total_trials: int) -> optuna.Trial | None:
    """Take a waiting trial, or a new one while the study has fewer than `total_trials`."""
    trials = study.get_trials(deepcopy=False)
    waiting = any(trial.state == TrialState.WAITING for trial in trials)
    return study.ask() if waiting or len(trials) < total_trials else None


def run_trial(
    study: optuna.Study, trial: optuna.Trial, objective: Objective, drain: Drain
) -> TrialState:
    """Run one trial and tell Optuna how it ended; WAITING if it went back to the queue."""
    begin = time.monotonic()
    log.info("trial %d started", trial.number)
    value, state = None, TrialState.FAIL
    try:
        drain.in_objective = True
        value = objective(trial)
        drain.in_objective = False
        if not isinstance(value, (int, float)):
            raise TypeError(f"the objective returned {value!r}, which is no number")
        state = TrialState.FAIL if math.isnan(value) else TrialState.COMPLETE
        reason = "the objective returned NaN"
    except optuna.TrialPruned:
        state = TrialState.PRUNED
    except Drained:
        state = TrialState.WAITING
    except Exception as error:  # one bad trial must not end the worker
        log.exception("trial %d failed", trial.number)
        reason = _reason(error)
    finally:
        drain.in_objective = False
    if state == TrialState.FAIL:
        trial.set_user_attr("fail_reason", reason)
        value = None
    _finish(study, trial, state, value)
    _log_end(study, trial, state, value, time.monotonic() - begin)
    return state


def _finish(
    study: optuna.Study, trial: optuna.Trial, state: TrialState, value: float | None
) -> None:
    if state == TrialState.WAITING:
        # The same trial, with its parameters and its reports: the next worker goes on with it.
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        return
    if state == TrialState.COMPLETE:
        checkpoint.keep_weights(trial.number)
    study.tell(trial, value, state)
    checkpoint.tidy(study)
    _free_memory()


def _reason(error: Exception) -> str:
    """One line for the user attribute `fail_reason`."""
    text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    # torch reports a full GPU with a class of its own and a full CPU with a RuntimeError.
    exhausted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if exhausted or "can't allocate memory" in str(error):
        return f"out of memory ({text})"
    return text


def _free_memory() -> None:
    """Give the GPU back what the trial has used, before the next trial starts."""
    gc.collect()
    if "torch" in sys.modules and (cuda := sys.modules["torch"].cuda).is_available():
        cuda.empty_cache()


def _log_end(
    study: optuna.Study,
    trial: optuna.Trial,
    state: TrialState,
    value: float | None,
    seconds: float,
) -> None:
    what = state.name.lower() if value is None else f"complete: {value:.4f}"
    if state == TrialState.WAITING:
        what = "back to the queue"
    params = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in trial.params.items()
    )
    line = f"trial {trial.number} {what} after {seconds:.1f} s ({params})"
    if any(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)):
        line += f"; best so far {study.best_value:.4f} (trial {study.best_trial.number})"
    log.info(line)


def _log_to_stdout(settings: Settings) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format=f"%(asctime)s worker {settings.rank} on {os.uname().nodename}: %(message)s",
        datefmt="%H:%M:%S",
    )
