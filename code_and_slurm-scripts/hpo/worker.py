"""A worker: claim a trial, run the objective, tell the result; again, until the study is full.

    python optuna_mnist.py            is one worker; the launch scripts start one per GPU
    python optuna_mnist.py --check    is the script fit for a study?  (hpo/check)
    python my_model.py -- --data x    what follows -- is the script's own

How a worker ends, and with which exit status:

    0   the study has its TOTAL_TRIALS trials, or has been stopped, or the worker was asked to stop:
        DRAIN_FILE, or the job's end near   finish the epoch, give the trial back to the queue
        SIGTERM, Ctrl-C, the job's end      give it back at once (the running epoch is lost)
    1   the same failure again and again: the objective itself is broken; or most trials failed
        or a GPU was promised, and there is none
    2   a setting is wrong (hpo/settings.py)
    70, 71  CUDA has failed for good (hpo/gpu.py), or a package is there by half (hpo/site.py):
        hpo/job/keep_running.sh starts a new process
    74  the job's end came in a call that cannot be interrupted: its trial goes back, too
    75  the site: study.db or a disk cannot be used, for minutes; the trial goes back to the queue

One bad trial (out of memory, a loss that is no number, whatever leaves the objective) is recorded
as FAIL with the reason in its user attribute `fail_reason`, and the worker goes on.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from functools import partial

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from hpo import gpu, script
from hpo import settings as process
from hpo.drain import Drain, DrainingPruner, handlers_put_back
from hpo.search import finals
from hpo.search.given import equip
from hpo.search.guard import SearchFailed
from hpo.search.known import begin_with, known_for
from hpo.search.objectives import check_objectives
from hpo.search.pruners import check_search
from hpo.search.remembered import Plan, adopt_space, plan_of
from hpo.settings import Settings, UserError, use
from hpo.site import Patience, SiteFault, wait_inside
from hpo.study.opening import create_or_open_study, is_gone, stuck
from hpo.study.optuna_private import storage_of, study_id, trial_id
from hpo.study.serving.served import Leased
from hpo.study.storage import NoTrialLeft
from hpo.study.trials import STOPS, Stops, best_line, best_searched, count, same_reason
from hpo.study.upkeep import Upkeep
from hpo.trial import (
    Objective,
    Outcome,
    be_ordinary,
    let_several_objectives_report,
    run_trial,
    spare_the_old,
)
from hpo.values import SITE_FAULT, SiteAway, end_of, without_password
from hpo.words import logger, parameters, shown, values

SAME_FAILURES = 3, 6  # in a row, before and after a success: then it is not the parameters
POLL_SECONDS = 0.05, 1.0  # at first and at most, while other workers run the last trials

log = logger("hpo.worker")
script.end_without_needs()  # now, before the script imports what is missing …
script.take_arguments()  # … and looks at them
gpu.keep_own()  # … or at its GPU


def run_worker(objective: Objective) -> int:
    """Run trials until the study has TOTAL_TRIALS of them; return the exit status.

    Does nothing while check_best_model.py imports the script.  Without run_script around it, it
    ends a script whose settings are wrong.

    Raises:
        UserError: a setting is wrong, or the study belongs to another objective.
    """
    if process.imported_by_another:
        return 0
    try:
        if threading.current_thread() is not threading.main_thread():
            raise UserError("run_worker is for the main thread, which alone is told of signals")
        with handlers_put_back() if script.in_a_notebook() else nullcontext():
            return _work(objective)
    except (UserError, OSError) as error:
        if process.ends_with_a_line or script.in_a_notebook():
            raise
        sys.exit(end_of(error))


def _work(objective: Objective) -> int:
    me = script.running(objective)
    asked = script.workers_arguments()
    settings = Settings.from_env(PY_SCRIPT=me.py_script)
    if asked == ["--check"]:
        from hpo.check.check_script import check_script  # no worker needs it

        return check_script(objective, me, settings)
    if asked:
        raise UserError(
            f"unknown: {' '.join(asked)} (there is --check; what follows -- is the script's own)"
        )
    _log_to_stdout(settings)
    be_ordinary(settings.rank)
    check_objectives(settings)
    script.check_needs(settings.py_script)
    check_search(settings)
    script.prepare(me)
    drain = Drain(settings.job_end, settings.drain_file)
    drain.watch_the_end()
    plan = plan_of(settings, me)
    found = known_for(settings, me, plan)
    patience = Patience(settings.lease_grace, drain)
    try:
        study = patience.call(partial(_open, settings))
    except SiteFault as error:
        log.error("%s", error)
        return SITE_FAULT
    patience.restore()
    try:
        adopt_space(study, settings, plan)
        plan.known = begin_with(study, found)
        settings = use(equip(study, settings, plan))
        study.pruner = DrainingPruner(study.pruner, drain)
        gpu.check(start=settings.gpus_per_trial == 1)
        with Upkeep(study, settings) as upkeep:
            return _Loop(study, settings, plan, drain).run(objective, upkeep)
    except (SiteFault, StorageInternalError) as error:
        log.error("%s", error)
        return SITE_FAULT
    except KeyError:
        if not is_gone(study):
            raise
        name = settings.study_name
        raise UserError(f"the study {name} was deleted while this worker ran") from None


def _open(settings: Settings) -> optuna.Study:
    """Open the study; a disk or a server that is away is the site's fault, all else the user's."""
    try:
        return create_or_open_study(settings)
    except SiteAway as error:
        raise error.__cause__ or error from None


class _Loop:
    """What a worker does until the study is full, and what it has seen so far."""

    def __init__(self, study: optuna.Study, settings: Settings, plan: Plan, drain: Drain) -> None:
        self.study, self.settings, self.plan, self.drain = study, settings, plan, drain
        self.patience = Patience(settings.lease_grace, drain)
        self.successes = 0
        self.failures: list[str] = []  # reasons, since the last success
        self.stops = Stops()
        # A study that was stopped goes on when it is started again, as with Optuna.
        self.stopped_before = self.stops.among(study.get_trials(deepcopy=False))

    def run(self, objective: Objective, upkeep: Upkeep) -> int:
        """Run trials until there is no more; return the exit status. Raises SiteFault."""
        while not gpu.ending and (trial := self.claim()) is not None:
            upkeep.trial_id = trial_id(trial)
            begin = time.monotonic()
            outcome = run_trial(self.study, trial, objective, self.drain, self.patience.call)
            upkeep.trial_id = None
            if outcome.state != TrialState.RUNNING:
                _log_end(self.study, trial, outcome, time.monotonic() - begin)
            spare_the_old()
            if gpu.ending:
                break
            if outcome.site:
                self.patience.wait(outcome.site)
                continue
            self.patience.restore()
            if self._broken(outcome):
                return 1
        if gpu.ending:
            log.error("%s", gpu.ending)
            return gpu.ending.status
        return self._say_why_it_ends()

    def claim(self) -> optuna.Trial | None:
        """Take a waiting trial, or a new one while the study has fewer than TOTAL_TRIALS.

        While other workers run the last ones it waits: one of them may die, and its trial return.
        Returns None when all trials are finished, or when it is time to stop.
        """
        pause, longest = POLL_SECONDS
        waiting_said = False
        while not self.drain.is_due():
            trial, others_run = self.patience.call(self._try_to_claim)
            if trial is not None or not others_run:
                return trial
            if not waiting_said:
                log.info("no trial left to claim; waiting for those that still run elsewhere")
                waiting_said = True
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return None

    def _try_to_claim(self) -> tuple[optuna.Trial | None, bool]:
        """Return a trial; or none, and whether one may still come back from another worker."""
        while True:
            trials = self.study.get_trials(deepcopy=False)
            if self.ended_early(trials):
                return None, False
            total = self.limit(trials)
            # Only the bundle's storage refuses in the same transaction; others overshoot a bit.
            if len(trials) >= total and all(t.state != TrialState.WAITING for t in trials):
                return None, _others_run(self.study)
            try:
                trial = self.study.ask()
            except NoTrialLeft:
                continue
            except SearchFailed:  # the trial was claimed before its parameters were chosen
                _give_back_all(self.study)
                raise
            finals.mark(self.study, self.settings, self.plan, trial)
            self.study.stop = partial(trial.set_user_attr, STOPS, True)  # type: ignore[method-assign]
            if len(self.study.directions) > 1:
                let_several_objectives_report(trial)
            wait_inside(trial, self.patience)
            return trial, True

    def limit(self, trials: Sequence[FrozenTrial]) -> int:
        """Return how many trials the study may have now (see hpo/search/finals.py)."""
        total = finals.limit(self.study, self.settings, self.plan, trials)
        storage = storage_of(self.study)
        if isinstance(storage, Leased):
            storage.total_trials = total
        return total

    def ended_early(self, trials: list[FrozenTrial]) -> str:
        """Return why no further trial is wanted: study.stop(), or STOP_VALUE; "" otherwise."""
        if stops := self.stops.among(trials) - self.stopped_before:
            return f"trial {min(stops)} has stopped the study"
        wanted = self.settings.stop_value
        if wanted is not None and len(self.study.directions) == 1:
            best = best_searched(self.study, 1)
            maximize = self.study.direction == optuna.study.StudyDirection.MAXIMIZE
            if best and (best[0].values[0] >= wanted if maximize else best[0].values[0] <= wanted):
                return f"trial {best[0].number} has reached STOP_VALUE={shown(wanted)}"
        return ""

    def _broken(self, outcome: Outcome) -> bool:
        """Whether the same failure has come so often that it is not the parameters' fault."""
        if outcome.state in (TrialState.COMPLETE, TrialState.PRUNED):
            self.successes += 1
            self.failures.clear()
        if outcome.state != TrialState.FAIL:
            return False
        self.failures.append(same_reason(outcome.reason))
        most = SAME_FAILURES[bool(self.successes)]
        if len(self.failures) < most or len(set(self.failures[-most:])) > 1:
            return False
        succeeded = "none succeeded" if not self.successes else "with the same reason"
        log.error("%d trials in a row failed, %s: stopping (%s)", most, succeeded, outcome.reason)
        log.error(
            "mend the script, then give the failed trials another try: "
            "python init_optuna_db.py --retry-failed"
        )
        return True

    def _say_why_it_ends(self) -> int:
        trials = self.study.get_trials(deepcopy=False)
        counts = count(self.study, self.settings)
        if why := self.ended_early(trials):
            log.info("%s: no further trial", why)
        elif self.drain.is_due():
            log.info("asked to stop, or the job's end is near: no further trial")
            return 0
        elif text := stuck(self.study, counts):
            log.warning("there is no other trial to claim, but %s", text)
        else:
            log.info("the study has its %d trials", self.limit(trials))
        if counts.failed > counts.finished / 2:
            log.error("most of its trials failed: %d of %d", counts.failed, counts.finished)
            return 1
        return 0


def _others_run(study: optuna.Study) -> bool:
    """Whether a worker that can lose its lease still runs a trial; others return nothing."""
    storage = storage_of(study)
    if isinstance(storage, Leased):
        return storage.count_leases(study_id(study)) > 0
    return False


def _give_back_all(study: optuna.Study) -> None:
    storage = storage_of(study)
    if isinstance(storage, Leased):
        storage.return_held()


def _log_end(study: optuna.Study, trial: optuna.Trial, outcome: Outcome, seconds: float) -> None:
    what = outcome.state.name.lower()
    if outcome.values:
        what = f"complete: {values(outcome.values)}"
    elif outcome.state == TrialState.WAITING:
        what = "back to the queue"
    elif outcome.reason:
        what = f"failed ({outcome.reason})"
    line = f"trial {trial.number} {what} after {seconds:.1f} s ({parameters(trial.params)})"
    log.info("%s; %s", line, best_line(study))


class _Lines(logging.Formatter):
    """What a worker logs; an error of a driver, or its traceback, may hold the URL of the study."""

    def format(self, record: logging.LogRecord) -> str:
        return without_password(super().format(record))


def _log_to_stdout(settings: Settings) -> None:
    """Give the worker's lines a handler of their own: a script may set up logging as it likes."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    mine = logger("hpo")
    mine.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_Lines(f"%(asctime)s {settings.worker}: %(message)s", datefmt="%H:%M:%S"))
    handler.handleError = partial(_say_elsewhere, handler)  # type: ignore[method-assign]
    mine.handlers[:] = [handler]


def _say_elsewhere(handler: logging.Handler, record: logging.LogRecord) -> None:
    """Print a line with the errors, where the script has closed its output; as logging, or not."""
    with suppress(OSError, ValueError):
        print(handler.format(record), file=sys.stderr)
