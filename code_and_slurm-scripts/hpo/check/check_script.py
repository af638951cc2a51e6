"""Is a script fit for a study?  `python my_model.py --check` says so before it is submitted.

    my_model.py: short trials in a temporary folder; your study is not touched
    one trial        ok     2 epochs in 1.3 s, value 0.6131, with TRAIN_IMAGES=1000
    prune            ok     it ends after the epoch in which should_prune() says yes
    resume           ok     interrupted after epoch 1 it went on at epoch 2, to the same value …
    lr               ok     0.000707 instead of 0.0001 changes the result
    dropout          MEND   suggested, but train_model never reads config["dropout"]; 0.25 …
    time             about  9 min per trial …
    memory           about  0.9 GB …
    1 to mend: dropout

ok     it was tried, and is so               look   tried, but proves nothing: look at it
MEND   it was tried, and is not so           -      not tried, for the reason that stands there

The trials (short_trial.py) have the smallest, or first, value of each parameter (picking.py).  They
can be repeated to the last bit; so when another value leaves all as it is, that value has not
reached the model (parameters.py); and when an interrupted trial comes to another result than one
that was not, something is not in its checkpoint (resuming.py; live.py names it).
"""

from __future__ import annotations

import logging
import math
import os
import sys
import tempfile
import warnings
from dataclasses import replace
from itertools import pairwise

import optuna
from optuna.trial import TrialState

from hpo import gpu, script
from hpo.check import costs, resuming
from hpo.check.afresh import Kept
from hpo.check.bench import FIRST_SECONDS, LEAST, Bench
from hpo.check.parameters import Parameters
from hpo.check.short_trial import Outcome, ShortTrial
from hpo.check.table import Table, progress
from hpo.drain import Drain
from hpo.script import Script
from hpo.search.known import first_trials
from hpo.search.objectives import check_objectives
from hpo.search.pruners import check_search
from hpo.search.remembered import plan_of
from hpo.settings import Settings, use
from hpo.trial import Objective, be_ordinary
from hpo.words import duration, logger, shown, values

INTERRUPTED = 130  # exit status after Ctrl-C, as a shell has it


def check_script(objective: Objective, me: Script, settings: Settings) -> int:
    """Check a script and its objective, print a table, and return the exit status.

    Raises:
        UserError: a setting is wrong, or the search space cannot be used.
    """
    be_ordinary(settings.rank)
    check_objectives(settings)
    script.check_needs(settings.py_script)
    check_search(settings)
    first_trials(settings, me, plan_of(settings, me))  # what is known beforehand is legal
    _be_quiet()
    head = f"{me.py_script}: short trials in a temporary folder; your study is not touched"
    print(head, flush=True)
    script.prepare(me)
    gpu.check(start=settings.gpus_per_trial == 1)
    ShortTrial.drain = Drain(float("inf"))  # from now on, Ctrl-C is noted
    ShortTrial.kept = Kept(objective)
    table = Table()
    try:
        with tempfile.TemporaryDirectory(prefix="check-") as folder:
            study = f"sqlite:///{folder}/study.db"
            own = replace(settings, study_db=study, study_name="check-0", stop_value=None)
            _try_all(Bench(objective, me, use(own)), table)
    except KeyboardInterrupt:
        print("interrupted")
        return INTERRUPTED
    except gpu.Unusable as error:
        return _without_gpu(error)
    print(f"\n{head}")
    table.show()
    if table.to_mend:
        print(f"{len(table.to_mend)} to mend: {', '.join(table.to_mend)}")
        return 1
    print(f"ok: PY_SCRIPT={me.py_script} STUDY_NAME=my_study sbatch run-optuna-multinode_Turpan.sh")
    return 0


def _without_gpu(error: gpu.Unusable) -> int:
    """Return the exit status where CUDA of this process is gone: every later row would be wrong.

    After a capture that failed, the whole check begins anew in a fresh process, without captures.
    """
    print(f"{error}", flush=True)
    if error.status == gpu.NO_CAPTURE and not os.environ.get(gpu.NO_CUDA_GRAPHS):
        os.environ[gpu.NO_CUDA_GRAPHS] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return 1


def _be_quiet() -> None:
    """Leave the lines to the table: a failure's reason stands there."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="The reported value is ignored")
    mine = logger("hpo")
    mine.handlers[:] = [logging.NullHandler()]
    mine.propagate = False


def _try_all(bench: Bench, table: Table) -> None:
    """Run all trials of a check, and fill the table."""
    bench.begin()
    if not _one_trial(bench, table):
        return
    rows = Table()
    if bench.whole.reports:
        resume = ("-", "not tried: see report") if _wrong_step(bench) else resuming.resumed(bench)
        Parameters(bench).check(rows)
        table.add("prune", *resuming.pruned(bench))
        table.add("resume", *resume)
    else:
        Parameters(bench).check(rows)
    table.rows += rows.rows
    costs.time_rows(bench, table)
    costs.memory_row(bench, table)


def _one_trial(bench: Bench, table: Table) -> bool:
    """Add the rows of the trial that the others are compared with; return whether it can be."""
    whole = bench.whole
    if whole.state == TrialState.FAIL:
        table.add("one trial", "MEND", f"it failed: {whole.reason}")
    elif whole.refused:
        table.add("one trial", "MEND", "it raised TrialPruned before its first report")
    elif whole.late and not whole.reports:
        late = f"no report in {duration(FIRST_SECONDS)}, so nothing was tried"
        table.add("one trial", "MEND", f"{late}; fewer data: Settings.from_env().train_images")
    else:
        return _its_end(bench, table)
    return False


def _its_end(bench: Bench, table: Table) -> bool:
    """Add what is known of the end of the objective, and of its reports."""
    ending, images = bench.whole, bench.few
    if not ending.ended and bench.images_matter and images > LEAST:
        progress(f"the end of the objective, with TRAIN_IMAGES={LEAST}")
        limit = max(20.0, bench.left() / 4)
        shorter = bench.trial(bench.values, LEAST).run(limit=limit)
        if shorter.ended or shorter.state == TrialState.FAIL:
            ending, images = shorter, LEAST
    table.add("one trial", *_ended(ending, images))
    if ending.state == TrialState.FAIL:
        return False
    if not ending.reports and not bench.me.offers("NO_EPOCHS"):
        table.add("report", "MEND", "never called: trial.report(value, epoch) after each epoch "
                  "(or NO_EPOCHS = True in the script)")  # fmt: skip
    elif ending.fraction is not None:
        what = f"the step {shown(ending.fraction)} is no whole number"
        table.add("report", "MEND", f"{what}; trial.report(value, epoch), in this order")
    elif wrong := _wrong_step(bench):
        table.add("report", "MEND", f"{wrong}; trial.report(value, epoch): 0, 1, 2, …")
    elif other := _another_value(ending):
        table.add("report", "look", other)
    return True


def _ended(ending: Outcome, images: int) -> tuple[str, str]:
    number = len(ending.reports)
    epochs = f"{number} epoch{'s' * (number != 1)} in " if number else ""
    text = f"{epochs}{duration(ending.seconds)}"
    if ending.ended:
        return "ok", f"{text}, value {values(ending.value)}, with TRAIN_IMAGES={images}"
    if ending.state == TrialState.FAIL:
        return "MEND", f"it failed after {text}: {ending.reason}"
    if ending.state == TrialState.PRUNED:
        return "look", f"{text}; it raised TrialPruned, though should_prune() never said yes"
    return "look", f"{text}, with TRAIN_IMAGES={images}; its end takes long: not tried"


def _another_value(ending: Outcome) -> str:
    """Say so where a trial returns what it never reported: pruners compare something else then."""
    reported = [value for _, value in ending.reports]
    if not (ending.ended and reported) or len(ending.value) > 1:
        return ""
    if any(math.isclose(ending.value[0], value, rel_tol=1e-4) for value in reported):
        return ""
    last = f"the trial ends with {values(ending.value)}, its last report was {shown(reported[-1])}"
    return f"{last}; pruners compare the reports: are both of one kind?"


def _wrong_step(bench: Bench) -> str:
    """Return what is wrong with the order of the steps: Optuna compares the largest one alone."""
    steps = [step for step, _ in bench.whole.reports]
    for before, step in pairwise(steps):
        if len(set(steps)) < len(steps) and step <= before:
            return f"step {step} is reported more than once"
        if step < before:
            return f"step {step} comes after step {before}"
    return ""
