"""The worker's loop: budget, failures, signals; with an objective that needs no torch."""

from __future__ import annotations

import gc
import itertools
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
import weakref
from collections import Counter
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from common import HELPERS, LIMIT, SCRIPTS, Run, wait_for
from hpo import trial
from hpo.drain import Drain
from hpo.search.samplers import sampler_seed
from hpo.settings import Settings
from hpo.site import Patience, SiteFault
from hpo.study.engines.sqlite_errors import CorruptStudy
from hpo.study.opening import open_study

OBJECTIVE = HELPERS / "objective_for_tests.py"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests/objective_for_tests.py import hpo, as a script in the scripts' folder can."""
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    return open_study(Settings.from_env()).get_trials()


def start(**env: str) -> subprocess.Popen[str]:
    """Start one worker in the background."""
    return subprocess.Popen(
        [sys.executable, str(OBJECTIVE)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_damaged_study_is_not_waited_for() -> None:
    """A full disk is; it may be well again in a minute."""
    calls = []

    def step() -> None:
        calls.append(1)
        raise CorruptStudy("study.db is damaged")

    with pytest.raises(SiteFault, match=r"^study.db is damaged$"):
        Patience(0.1, Drain(math.inf, None)).call(step)
    assert len(calls) == 1


def test_a_worker_does_not_begin_in_a_file_that_is_no_study(run: Run, own_study: Path) -> None:
    own_study.write_bytes(b"anything else" * 100)
    result = run(OBJECTIVE, LEASE_GRACE="1")
    assert result.returncode == 2, result.stdout
    assert f"error: {own_study} is damaged" in result.stderr
    assert "trying again" not in result.stdout
    assert own_study.read_bytes() == b"anything else" * 100


def test_worker_stops_at_total_trials_and_a_larger_total_adds(run: Run) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="7")
    assert result.returncode == 0, result.stderr
    assert "the study has its 7 trials" in result.stdout
    assert run(OBJECTIVE, TOTAL_TRIALS="7").returncode == 0
    assert len(trials()) == 7
    run(OBJECTIVE, TOTAL_TRIALS="10")
    assert [trial.number for trial in trials()] == list(range(10))
    # By hand, without the job's environment: the study knows the total of its last job.
    assert "10 of 10 trials" in run("check_best_model.py").stdout
    assert "(10 of 10 trials)" in run("init_optuna_db.py", PY_SCRIPT=str(OBJECTIVE)).stdout
    assert "10 of 12 trials" in run("check_best_model.py", TOTAL_TRIALS="12").stdout
    assert all(trial.state.is_finished() for trial in trials())


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("raise once", "ValueError: no such layer"),
        ("memory", "out of memory (MemoryError: 8 GiB asked for)"),
        ("nan", "the objective returned NaN"),
    ],
)
def test_one_bad_trial_is_recorded_and_the_worker_goes_on(
    behaviour: str, reason: str, run: Run
) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="4", BEHAVIOUR=behaviour)
    assert result.returncode == 0
    found = trials()
    assert found[0].state == TrialState.FAIL
    assert found[0].user_attrs["fail_reason"] == reason
    assert all(trial.state != TrialState.FAIL for trial in found[1:])
    assert len(found) == 4


@pytest.mark.parametrize(
    ("behaviour", "says"), [("raise", "Traceback"), ("text", "'nothing' (str), which is no number")]
)
def test_broken_objective_stops_the_worker_and_says_why(
    behaviour: str, says: str, run: Run
) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="50", BEHAVIOUR=behaviour)
    assert result.returncode == 1
    assert len(trials()) == 3
    assert says in result.stdout
    assert "3 trials in a row failed" in result.stdout


def test_usr1_returns_the_trial_after_its_epoch(run: Run) -> None:
    result = run(OBJECTIVE, TOTAL_TRIALS="6", BEHAVIOUR="usr1")
    assert result.returncode == 0
    assert "trial 2 back to the queue" in result.stdout
    returned = trials()[2]
    assert returned.state == TrialState.WAITING
    assert list(returned.intermediate_values) == [0]  # the epoch was reported first
    run(OBJECTIVE, TOTAL_TRIALS="6")
    assert trials()[2].params == returned.params
    assert Counter(trial.state.is_finished() for trial in trials()) == {True: 6}


@pytest.mark.parametrize(
    ("signum", "behaviour"),
    [(signal.SIGTERM, "sleep"), (signal.SIGINT, "sleep"), (signal.SIGTERM, "image gone")],
)
def test_sigterm_returns_the_trial_at_once(signum: signal.Signals, behaviour: str) -> None:
    worker = start(BEHAVIOUR=behaviour)
    read_until_it_sleeps(worker)
    worker.send_signal(signum)
    output, _ = worker.communicate(timeout=LIMIT)
    assert worker.returncode == 0, output
    assert "trial 0 back to the queue" in output
    assert [trial.state for trial in trials()] == [TrialState.WAITING]
    assert trials()[0].params


def test_trial_of_a_worker_that_sigterm_has_killed_is_returned_too(own_study: Path) -> None:
    job = {"SLURM_JOB_ID": "7", "LEASE_GRACE": "600"}
    other = start(BEHAVIOUR="sleep", WORKER_RANK="1", **job)
    read_until_it_sleeps(other)
    killed = subprocess.Popen(
        ["bash", "hpo/job/keep_running.sh", str(OBJECTIVE), sys.executable, "-u"],
        env={**os.environ, "BEHAVIOUR": "die of SIGTERM", "WORKER_RANK": "0", **job},
        cwd=SCRIPTS,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    read_until_it_sleeps(killed)
    os.killpg(killed.pid, signal.SIGTERM)  # as Slurm does, to all processes of a step
    output, _ = killed.communicate(timeout=LIMIT)
    assert killed.returncode == 128 + signal.SIGTERM
    assert "trial 1 back to the queue" in output
    assert [trial.state for trial in trials()] == [TrialState.RUNNING, TrialState.WAITING]
    with sqlite3.connect(own_study) as database:
        attempts = database.execute("SELECT attempts FROM leases WHERE owner IS NULL").fetchall()
    assert attempts == [(0,)]  # no crash
    other.kill()
    other.communicate()


def read_until_it_sleeps(worker: subprocess.Popen[str]) -> None:
    """Wait until a worker is in its objective; what it says then is still to be read."""
    assert worker.stdout
    assert any(line == "asleep\n" for line in worker.stdout)


def test_trial_of_a_killed_worker_is_run_by_the_one_that_waits() -> None:
    killed = start(BEHAVIOUR="sleep", TOTAL_TRIALS="1", LEASE_GRACE="2")
    read_until_it_sleeps(killed)
    wait_for(lambda: trials()[0].params)  # they are written with a renewal of the lease
    waiting = start(TOTAL_TRIALS="1", LEASE_GRACE="2")
    killed.kill()
    params = trials()[0].params
    output, _ = waiting.communicate(timeout=LIMIT)
    assert waiting.returncode == 0, output
    assert "no trial left to claim; waiting" in output
    assert "trial 0 of a worker that died goes back to the queue" in output
    assert [(t.state, t.params) for t in trials()] == [(TrialState.COMPLETE, params)]
    assert params
    killed.communicate()


def freeze(worker: subprocess.Popen[str], path: Path) -> None:
    """Stop a process, but not while it has the lock of its study, for which others wait."""
    while True:
        worker.send_signal(signal.SIGSTOP)
        with closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as database:
            try:
                database.execute("BEGIN EXCLUSIVE")
                database.execute("ROLLBACK")
            except sqlite3.OperationalError:
                worker.send_signal(signal.SIGCONT)
            else:
                return


def test_frozen_worker_is_told_that_its_trial_is_not_its_own(
    own_study: Path, tmp_path: Path
) -> None:
    frozen = start(GATES=str(tmp_path), TOTAL_TRIALS="1", LEASE_GRACE="1")
    wait_for((tmp_path / f"process {frozen.pid}").exists)
    freeze(frozen, own_study)
    other = start(TOTAL_TRIALS="1", LEASE_GRACE="1")
    output, _ = other.communicate(timeout=LIMIT)
    assert other.returncode == 0, output
    assert "trial 0 complete" in output
    value = trials()[0].value
    (tmp_path / "0").touch()  # it may go on to its report
    frozen.send_signal(signal.SIGCONT)
    output, _ = frozen.communicate(timeout=LIMIT)
    assert frozen.returncode == 0, output
    assert "trial 0 is no longer this worker's" in output
    assert "Traceback" not in output
    assert [(t.state, t.value) for t in trials()] == [(TrialState.COMPLETE, value)]


def test_no_trial_starts_when_the_job_ends_too_soon(run: Run) -> None:
    end = str(int(time.time()) + 80)
    result = run(OBJECTIVE, TOTAL_TRIALS="5", SLURM_JOB_END_TIME=end)
    assert result.returncode == 0, result.stderr
    assert "the job's end is near: no further trial" in result.stdout
    assert trials() == []


def test_trial_goes_back_when_the_job_ends_before_its_next_epoch(run: Run) -> None:
    end = str(int(time.time()) + 1500)  # of an epoch each ten seconds, and the reserve
    result = run(OBJECTIVE, TOTAL_TRIALS="1", SLURM_JOB_END_TIME=end, BEHAVIOUR="epochs")
    assert result.returncode == 0, result.stderr
    (trial,) = trials()
    assert trial.state == TrialState.WAITING
    assert 1 <= len(trial.intermediate_values) < 1000
    assert "trial 0 back to the queue" in result.stdout


def test_drain_file_stops_all_workers_of_a_job(run: Run, tmp_path: Path) -> None:
    (tmp_path / "drain").touch()
    result = run(OBJECTIVE, TOTAL_TRIALS="5", DRAIN_FILE=str(tmp_path / "drain"))
    assert result.returncode == 0, result.stderr
    assert "no further trial" in result.stdout
    assert trials() == []


def test_backup_is_made_while_the_study_runs(run: Run, own_study: Path) -> None:
    run(OBJECTIVE, TOTAL_TRIALS="3")
    storage = f"sqlite:///{own_study}.backup"
    copy = optuna.load_study(study_name="mnist_hpo", storage=storage)
    assert [t.params for t in copy.get_trials()] == [t.params for t in trials()]


def test_four_workers_share_the_study_and_suggest_different_trials() -> None:
    workers = [
        start(
            WORKER_RANK=str(rank), SEED="1", TOTAL_TRIALS="24", BEHAVIOUR="slow", SAMPLER="random"
        )
        for rank in range(4)
    ]
    output = [worker.communicate(timeout=LIMIT)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, output
    assert all(f"worker {rank} on" in text for rank, text in enumerate(output))
    found = trials()
    assert [trial.number for trial in found] == list(range(24))
    assert len({trial.params["x"] for trial in found}) == 24
    assert {trial.user_attrs["worker"] for trial in found} <= {
        f"worker {rank} on {os.uname().nodename}" for rank in range(4)
    }


def test_sampler_seeds_differ_between_workers_and_starts() -> None:
    seeds = {sampler_seed(1, rank, trials) for rank in range(8) for trials in (0, 4, 500)}
    assert len(seeds) == 24
    assert sampler_seed(1, 2, 3) == sampler_seed(1, 2, 3)
    assert sampler_seed(None, 0, 0) is None


def test_what_was_hidden_from_gc_and_is_garbage_since_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ring:
        def __init__(self) -> None:
            self.itself = self

    monkeypatch.setattr(trial, "_ended", itertools.count())
    ring = Ring()
    alive = weakref.ref(ring)
    try:
        trial.freeze_all()
        del ring
        gc.collect()
        assert alive() is not None
        trial.spare_the_old()  # as after the first trial, and after every hundredth
        assert alive() is None
    finally:
        gc.unfreeze()
