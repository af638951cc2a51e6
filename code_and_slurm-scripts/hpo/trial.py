"""One trial, from its claim to its end.

outcome = run_trial(study, trial, objective, drain)

COMPLETE   with its value: whatever Optuna accepts as one
PRUNED     it raised optuna.TrialPruned
FAIL       it did something wrong itself; the reason is its user attribute `fail_reason`
WAITING    it goes back to the queue, with its parameters and its reports: the worker has to
           stop, or the site is at fault (a full disk, a lost database, a failing sampler, a GPU)
RUNNING    it is another worker's now: this one was frozen, and its lease is lost
"""

from __future__ import annotations

import atexit
import gc
import itertools
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from hpo import checkpoint, gpu
from hpo.drain import Drain, Drained
from hpo.settings import Settings, UserError
from hpo.site import fault_of, half_imported
from hpo.study.cache import Follower
from hpo.study.leases import NoTrialLeft
from hpo.study.optuna_private import storage_of, trial_id
from hpo.study.serving.served import Leased
from hpo.study.trials import to_keep
from hpo.values import without_password
from hpo.words import logger, one_line, text_of

Objective: TypeAlias = Callable[[optuna.Trial], Any]
# What tells a process that it is one of several; each worker trains for itself.
RANKS = (
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS", "SLURM_NPROCS"),
    *("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NNODES"),
    *("SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_NODES", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
)

log = logger("hpo.worker")


@dataclass
class Outcome:
    """How a trial has ended."""

    state: TrialState
    values: tuple[float, ...] = ()
    reason: str = ""  # of a FAIL
    site: str = ""  # what is wrong with the site, where that is why it goes back


def run_trial(
    study: optuna.Study,
    trial: optuna.Trial,
    objective: Objective,
    drain: Drain,
    patiently: Callable[[Callable[[], None]], None] = lambda step: step(),
) -> Outcome:
    """Run one trial and tell Optuna how it ended.

    `patiently` calls what writes the end, again and again while the database is away.
    """
    log.info("trial %d started", trial.number)
    if not trial.params:  # one that goes on has those that it began with
        checkpoint.discard(trial.number)
    with _one_trial_alone(study):
        outcome = _call(objective, trial, drain)
    checkpoint.let_end()
    try:
        patiently(lambda: _finish(study, trial, outcome))
    except UpdateFinishedTrialError:  # this worker was frozen, and another one has taken over
        log.warning("trial %d is no longer this worker's: result dropped", trial.number)
        outcome = Outcome(TrialState.RUNNING)
    checkpoint.release()
    free_memory()
    return outcome


def _call(objective: Objective, trial: optuna.Trial, drain: Drain) -> Outcome:
    """Return how the trial should end."""
    try:
        with drain.interruptible():
            value = _in_this_process(objective, trial)
        checkpoint.wait()
        return judge(value, len(trial.study.directions))
    except optuna.TrialPruned:
        return Outcome(TrialState.PRUNED)
    except Drained:
        return Outcome(TrialState.WAITING)
    except gpu.Unusable as error:
        gpu.give_up(str(error), error.status)  # it may come from another process (train/ddp.py)
        return Outcome(TrialState.WAITING, site=str(error))
    except UserError as error:  # a configuration that cannot be: its one line says all
        log.error("trial %d failed: %s", trial.number, error)
        return Outcome(TrialState.FAIL, reason=str(error))
    except BaseException as error:  # whatever leaves the objective costs the trial, not the worker
        if drain.came_to(error):  # scancel takes the container's image away, too
            return Outcome(TrialState.WAITING)
        if isinstance(error, UpdateFinishedTrialError) and _is_lost(trial):  # LeaseLost, too
            return Outcome(TrialState.WAITING)
        if half := half_imported(error):
            gpu.give_up(half, gpu.BROKEN)
            return Outcome(TrialState.WAITING, site=half)
        if site := fault_of(error):
            return Outcome(TrialState.WAITING, site=site)
        log.exception("trial %d failed", trial.number)
        if not gpu.healthy() and not gpu.is_to_blame(trial):
            return Outcome(TrialState.WAITING, site=str(gpu.ending))
        return Outcome(TrialState.FAIL, reason=reason_of(error))


def _is_lost(trial: optuna.Trial) -> bool:
    """Whether this trial is no longer this worker's; else the error was about another one."""
    storage = storage_of(trial.study)
    if not isinstance(storage, Leased):
        return storage.get_trial(trial_id(trial)).state != TrialState.RUNNING
    try:
        storage.renew_lease(trial_id(trial))
    except (UpdateFinishedTrialError, StorageInternalError):  # or the next step says what it is
        return True
    return False


def _in_this_process(objective: Objective, trial: optuna.Trial) -> Any:
    """Return what the objective returns; a process that it has forked, and that leaves it, ends."""
    me = os.getpid()
    try:
        return objective(trial)
    finally:
        if os.getpid() != me:  # otherwise it would go on as a second worker, with this one's trial
            error = sys.exc_info()[1]
            if error and not isinstance(error, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            status = getattr(error, "code", 1) if error else 0
            os._exit(status if isinstance(status, int) else int(status is not None))


def judge(value: Any, objectives: int) -> Outcome:
    """Return COMPLETE with the value of an objective, or FAIL with what is wrong with it.

    As Optuna, it takes whatever float() takes (NumPy's numbers, tensors of one element), and a
    list or tuple of them for several objectives; but no text.
    """
    several = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    found: list[float] = []
    for number in value if several else [value]:
        try:
            if isinstance(number, (str, bytes)):
                raise TypeError
            found.append(float(number))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            what = f"{one_line(repr(number), 60)} ({type(number).__name__})"
            return _wrong(f"the objective returned {what}, which is no number")
    if len(found) != objectives:
        return _wrong(f"the objective returned {len(found)} values for {objectives} objectives")
    if any(math.isnan(number) for number in found):
        return _wrong("the objective returned NaN")
    return Outcome(TrialState.COMPLETE, values=tuple(found))


def _wrong(reason: str) -> Outcome:
    log.error("%s", reason)
    return Outcome(TrialState.FAIL, reason=reason)


def _finish(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    if outcome.state == TrialState.WAITING:
        # The same trial, with its parameters and its reports: the next worker goes on with it.
        _give_back(study, trial, outcome)
        return
    if outcome.state == TrialState.FAIL:
        trial.set_user_attr("fail_reason", outcome.reason)
    if outcome.state == TrialState.COMPLETE:
        checkpoint.keep_weights(trial.number)
    optuna.Study.tell(study, trial, outcome.values or None, outcome.state)
    tidy(study)


@contextmanager
def _one_trial_alone(study: optuna.Study) -> Iterator[None]:
    """Refuse what would begin or end a trial in an objective: the worker does.

    It may queue trials (study.enqueue_trial): as many as the study still takes.
    """

    def refused(name: str) -> Callable[..., Any]:
        def refuse(*arguments: Any, **others: Any) -> Any:
            raise UserError(
                f"the objective called study.{name}(): it returns the value of its trial, and no "
                "more; a search of its own inside needs optuna.create_study()"
            )

        return refuse

    names = ("tell", "ask", "optimize")

    def queue(frozen: FrozenTrial) -> None:
        try:
            optuna.Study.add_trial(study, frozen)
        except NoTrialLeft as error:  # its own trial shall not fail for it
            log.warning("what the objective queues is left out: %s", error.args[0])

    vars(study).update({name: refused(name) for name in names}, add_trial=queue)
    try:
        yield
    finally:
        for name in (*names, "add_trial"):
            vars(study).pop(name, None)


def _give_back(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    storage = storage_of(study)
    if isinstance(storage, Leased):
        if storage.return_trial(trial_id(trial), excused=bool(outcome.site)) == TrialState.FAIL:
            outcome.state = TrialState.FAIL
            frozen = storage.get_trial(trial_id(trial))
            outcome.reason = str(frozen.user_attrs["fail_reason"])
    else:
        storage.set_trial_state_values(trial_id(trial), TrialState.WAITING)


def tidy(study: optuna.Study) -> None:
    """Remove what finished trials have left, except for the weights of the best."""
    settings = Settings.from_env()
    finished = _finished.setdefault(study, _Finished())
    finished.look(study.get_trials(deepcopy=False))
    checkpoint.tidy(finished.numbers, to_keep(study, settings.keep_best))


class _Finished(Follower):
    def forget(self) -> None:
        self.numbers: set[int] = set()

    def take(self, trial: FrozenTrial) -> None:
        self.numbers.add(trial.number)


_finished: WeakKeyDictionary[optuna.Study, _Finished] = WeakKeyDictionary()


def reason_of(error: BaseException) -> str:
    """Return one line for the user attribute `fail_reason`."""
    text = f"{type(error).__name__}: {without_password(one_line(error))}".removesuffix(": ")
    # torch reports a full GPU with a class of its own and a full CPU with a RuntimeError.
    exhausted = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if exhausted or "can't allocate memory" in text_of(error):
        return f"out of memory ({text})"
    return text


def free_memory() -> None:
    """Give the GPU back what the trial has used, before the next trial starts."""
    gc.collect()
    gpu.healthy()
    gpu.check()


def spare_the_old() -> None:
    """After the first trial, and every 100: later collections skip what it has imported, 0.1 s each
    with torch, and finished trials.
    """
    if next(_ended) % 100 == 0:
        gc.unfreeze()  # what has become garbage since goes
        freeze_all()


def freeze_all() -> None:
    """Hide all that is there from gc's later calls; what is garbage by then goes first.

    What is hidden already is not looked at again.
    """
    gc.collect()
    gc.freeze()


_ended = itertools.count()
atexit.register(gc.unfreeze)  # some C++ bindings complain of leaks otherwise


def be_ordinary(rank: int) -> None:
    """Hide from the objective that this process has a rank: it would wait for the others.

    And let it have the GPU that it was given.
    """
    gpu.keep_own()
    os.environ["WORKER_RANK"] = str(rank)
    for name in RANKS:
        os.environ.pop(name, None)


def let_several_objectives_report(trial: optuna.Trial) -> None:
    """Let a trial of several objectives report, though nothing can be pruned by it.

    Optuna refuses report() and should_prune() there.  The same training loop shall run all the
    same: curves are kept, the lease is renewed, and the worker can drain.
    """
    study, number = trial.study, trial_id(trial)

    def report(value: float, step: int) -> None:
        trial.storage.set_trial_intermediate_value(number, step, float(value))

    def should_prune() -> bool:  # does no more than to drain the worker
        return study.pruner.prune(study, trial.storage.get_trial(number))

    trial.report = report  # type: ignore[method-assign]
    trial.should_prune = should_prune  # type: ignore[method-assign]
