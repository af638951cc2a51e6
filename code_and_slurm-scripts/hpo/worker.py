"""A worker: claim a trial, run the objective, tell the result; again, until the study is full.

    python optuna_mnist.py            is one worker; the launch scripts start one per GPU
    python optuna_mnist.py --check    is the script fit for a study?  (hpo/check_script.py)

How a worker ends, and with which exit status:

    0  the study has its TOTAL_TRIALS trials, or the worker was asked to stop:
       DRAIN_FILE, or the job's end near   finish the epoch, give the trial back to the queue
       SIGTERM, Ctrl-C                     give it back at once (the running epoch is lost)
    1  three trials in a row failed and none has succeeded: the objective itself is broken;
       or study.db cannot be written (disk full, …): the trial goes back to the queue
       or a GPU was promised and there is none
    2  a setting is wrong (hpo/settings.py)
    70, 71  (hpo/gpu.py) CUDA has failed for good: hpo/keep_running.sh starts a new process

One bad trial (out of memory, a loss that is no number, an exception) is recorded as FAIL with the
reason in its user attribute `fail_reason`, and the worker goes on.
"""

from __future__ import annotations

import atexit
import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from hpo import checkpoint, gpu
from hpo.drain import Drain, Drained, DrainingPruner
from hpo.objectives import as_claimed, check_needs, check_objectives
from hpo.samplers import check_packages, make_pruner, make_sampler, sampler_seed
from hpo.served_storage import ServedStorage
from hpo.settings import Settings, UserError
from hpo.space import Plan, adopt_space
from hpo.sqlite_storage import NoTrialLeft, SQLiteStorage
from hpo.storage import create_or_open_study
from hpo.study_file import StudyFileError
from hpo.upkeep import Upkeep

Value: TypeAlias = "float | tuple[float, ...]"  # one number per objective
Objective: TypeAlias = Callable[[optuna.Trial], Value]
FAILURES_IN_A_ROW = 3  # without any success: then it is not the parameters, it is the objective
POLL_SECONDS = 0.05, 1.0  # at first and at most, while other workers run the last trials

log = logging.getLogger("hpo.worker")


def run_worker(objective: Objective) -> int:
    """Run trials until the study has TOTAL_TRIALS of them; return the exit status.

    With --check on the command line: check the script instead.

    Raises:
        UserError: a setting is wrong, or the study belongs to another objective.
    """
    if sys.argv[1:] == ["--check"]:
        from hpo.check_script import check_script  # no worker needs it

        return check_script(objective)
    if sys.argv[1:]:
        raise UserError(f"unknown: {' '.join(sys.argv[1:])} (there is --check, and nothing else)")
    settings = Settings.from_env(PY_SCRIPT=Path(objective.__code__.co_filename).name)
    _log_to_stdout(settings)
    check_objectives(settings)
    check_needs(settings.py_script)
    check_packages(settings)
    drain = Drain(settings.job_end, settings.drain_file)
    study = create_or_open_study(settings)
    settings = _prepare(study, settings, adopt_space(study, settings, objective.__globals__))
    study.pruner = DrainingPruner(study.pruner, drain)
    gpu.check(start=settings.gpus_per_trial == 1)
    try:
        with Upkeep(study, settings) as upkeep:
            return _run_trials(study, settings, objective, drain, upkeep)
    except StudyFileError as error:
        log.error("%s", error)
        return 1


def _prepare(study: optuna.Study, settings: Settings, plan: Plan) -> Settings:
    """Give the study its sampler and pruner; return the settings with its real TOTAL_TRIALS."""
    seed = sampler_seed(settings.seed, settings.rank, len(study.get_trials(deepcopy=False)))
    study.sampler = make_sampler(
        settings.sampler,
        seed,
        study_seed=settings.seed,
        space=plan.space,
        combinations=plan.combinations,
    )
    if len(study.directions) > 1 and settings.pruner != "none":
        log.info("several objectives: nothing is pruned (PRUNER=%s is not used)", settings.pruner)
        settings = replace(settings, pruner="none")
    study.pruner = make_pruner(settings.pruner)
    if isinstance(study._storage, SQLiteStorage):
        study._storage.total_trials = plan.total(settings.total_trials)
    return replace(settings, total_trials=plan.total(settings.total_trials))


def _run_trials(
    study: optuna.Study, settings: Settings, objective: Objective, drain: Drain, upkeep: Upkeep
) -> int:
    failures, successes = 0, 0
    while not gpu.ending and (trial := claim(study, settings.total_trials, drain)) is not None:
        upkeep.trial_id = trial._trial_id
        state = run_trial(study, trial, objective, drain)
        upkeep.trial_id = None
        failures = failures + 1 if state == TrialState.FAIL else 0
        successes += state in (TrialState.COMPLETE, TrialState.PRUNED)
        if failures >= FAILURES_IN_A_ROW and not successes:
            log.error("%d trials in a row failed, none succeeded: stopping", failures)
            return 1
    if gpu.ending:
        log.error("%s", gpu.ending)
        return gpu.ending.status
    if not drain.is_due():
        log.info("the study has its %d trials", settings.total_trials)
    else:
        log.info("asked to stop, or the job's end is near: no further trial")
    return 0


def claim(study: optuna.Study, total_trials: int, drain: Drain) -> optuna.Trial | None:
    """Take a waiting trial, or a new one while the study has fewer than `total_trials`.

    While other workers run the last ones it waits: one of them may die, and its trial return.
    Returns None when all trials are finished, or when it is time to stop.
    """
    pause, longest = POLL_SECONDS
    waiting_said = False
    while not drain.is_due():
        trials = study.get_trials(deepcopy=False)
        # Only the bundle's SQLite storage refuses in the same transaction; others overshoot a bit.
        if len(trials) < total_trials or any(t.state == TrialState.WAITING for t in trials):
            try:
                return as_claimed(study.ask())
            except NoTrialLeft:
                continue
        if not _others_run(study):
            return None
        if not waiting_said:
            log.info("no trial left to claim; waiting for those that still run elsewhere")
            waiting_said = True
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return None


def _others_run(study: optuna.Study) -> bool:
    """Whether a worker that can lose its lease still runs a trial; others return nothing."""
    storage = study._storage
    if isinstance(storage, (SQLiteStorage, ServedStorage)):
        return storage.count_leases(study._study_id) > 0
    return False


def run_trial(
    study: optuna.Study, trial: optuna.Trial, objective: Objective, drain: Drain
) -> TrialState:
    """Run one trial and tell Optuna how it ended.

    Returns its new state; WAITING if it went back to the queue, RUNNING if another worker has it.
    """
    begin = time.monotonic()
    log.info("trial %d started", trial.number)
    if not trial.params:  # one that goes on has those that it began with
        checkpoint.discard(trial.number)
    state, value, reason = _call(objective, trial, drain)
    try:
        _finish(study, trial, state, value, reason)
    except UpdateFinishedTrialError:  # this worker was frozen, and another one has taken over
        log.warning("trial %d is no longer this worker's: result dropped", trial.number)
        state = TrialState.RUNNING
    _free_memory()
    if state != TrialState.RUNNING:
        _log_end(study, trial, state, value, time.monotonic() - begin)
    return state


def _call(
    objective: Objective, trial: optuna.Trial, drain: Drain
) -> tuple[TrialState, Value | None, str]:
    """Return the state that the trial should get, its value, and the reason of a FAIL."""
    try:
        with drain.interruptible():
            value = objective(trial)
        values: tuple[Any, ...] = value if isinstance(value, tuple) else (value,)
        if not all(isinstance(number, (int, float)) for number in values):
            raise TypeError(f"the objective returned {value!r}, which is no number")
        if len(values) != len(trial.study.directions):
            raise TypeError(f"{len(values)} values for {len(trial.study.directions)} objectives")
        if any(math.isnan(number) for number in values):
            return TrialState.FAIL, None, "the objective returned NaN"
        return TrialState.COMPLETE, values if len(values) > 1 else float(values[0]), ""
    except optuna.TrialPruned:
        return TrialState.PRUNED, None, ""
    except (Drained, gpu.Unusable, UpdateFinishedTrialError):  # the last says LeaseLost, too
        return TrialState.WAITING, None, ""
    except StudyFileError:
        raise
    except UserError as error:  # a configuration that cannot be: its one line says all
        log.error("trial %d failed: %s", trial.number, error)
        return TrialState.FAIL, None, str(error)
    except Exception as error:  # one bad trial must not end the worker
        if drain.at_once:  # scancel also takes the container's image away: not the trial's fault
            return TrialState.WAITING, None, ""
        log.exception("trial %d failed", trial.number)
        if not gpu.healthy() and not gpu.is_to_blame(trial):
            return TrialState.WAITING, None, ""
        return TrialState.FAIL, None, _reason(error)


def _finish(
    study: optuna.Study,
    trial: optuna.Trial,
    state: TrialState,
    value: Value | None,
    reason: str,
) -> None:
    if state == TrialState.WAITING:
        # The same trial, with its parameters and its reports: the next worker goes on with it.
        study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
        return
    if state == TrialState.FAIL:
        trial.set_user_attr("fail_reason", reason)
    if state == TrialState.COMPLETE:
        checkpoint.keep_weights(trial.number)
    study.tell(trial, value, state)
    checkpoint.tidy(study)


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
    gpu.healthy()
    gpu.check()
    _spare_imports()


@cache
def _spare_imports() -> None:
    """After the first trial: later collections skip what it has imported, 0.1 s each with torch."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # some C++ bindings complain of leaks otherwise


def _log_end(
    study: optuna.Study,
    trial: optuna.Trial,
    state: TrialState,
    value: Value | None,
    seconds: float,
) -> None:
    if isinstance(value, tuple):
        what = f"complete: {', '.join(f'{number:.6g}' for number in value)}"
    else:
        what = state.name.lower() if value is None else f"complete: {value:.4f}"
    if state == TrialState.WAITING:
        what = "back to the queue"
    params = " ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in trial.params.items()
    )
    line = f"trial {trial.number} {what} after {seconds:.1f} s ({params})"
    if len(study.directions) > 1:
        line += f"; {len(study.best_trials)} trials in the Pareto front"
    elif any(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)):
        line += f"; best so far {study.best_value:.4f} (trial {study.best_trial.number})"
    log.info(line)


def _log_to_stdout(settings: Settings) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    # A resumed trial may report its last epoch again, with the same value.
    warnings.filterwarnings("ignore", message="The reported value is ignored")
    logging.basicConfig(
        stream=sys.stdout,
        level=logging.INFO,
        format=f"%(asctime)s worker {settings.rank} on {os.uname().nodename}: %(message)s",
        datefmt="%H:%M:%S",
    )
