"""How a trial ends: whatever the objective returns, raises, or does to its process."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from optuna.trial import FrozenTrial, TrialState

from common import SCRIPTS, Run
from hpo import site, values
from hpo.settings import Settings
from hpo.study.opening import open_study
from hpo.study.trials import fail_reasons
from hpo.trial import judge, reason_of

COMPLETE, FAIL, WAITING = TrialState.COMPLETE, TrialState.FAIL, TrialState.WAITING
HEAD = """
import errno, os, sys, time
import optuna
from hpo import run_script, run_worker

def search_space(trial):
    return {"x": trial.suggest_float("x", -1, 1)}

def objective(trial):
    x = search_space(trial)["x"]
"""
END = """
    return x * x

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""


def work(
    folder: Path, body: str, *words: str, keep: bool = False, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run one worker of a script whose objective has this body; `keep` it running if it dies."""
    script = folder / "my.py"
    script.write_text(HEAD + "".join(f"    {line}\n" for line in body.splitlines()) + END)
    command = [sys.executable, str(script), *words]
    if keep:
        command = ["bash", "hpo/job/keep_running.sh", str(script), sys.executable]
    return subprocess.run(
        command,
        cwd=SCRIPTS,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "4", **env},
        capture_output=True,
        text=True,
        timeout=600,
    )


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    return open_study(Settings.from_env()).get_trials()


class Tensor:
    """Stands for a tensor of one element, which float() takes."""

    def __float__(self) -> float:
        return 2.0


@pytest.mark.parametrize(
    "value",
    [2.0, 2, np.float32(2), np.int64(2), np.array(2.0), Tensor(), [2.0], (2,), [np.float32(2)]],
)
def test_what_optuna_takes_as_a_value_is_taken(value: object) -> None:
    outcome = judge(value, 1)
    assert (outcome.state, outcome.values) == (COMPLETE, (2.0,))
    assert type(outcome.values[0]) is float


@pytest.mark.parametrize(
    ("value", "objectives", "says"),
    [
        (None, 1, "None (NoneType), which is no number"),
        ("0.5", 1, "'0.5' (str), which is no number"),
        (float("nan"), 1, "NaN"),
        (np.float32("nan"), 1, "NaN"),
        ([1.0, None], 2, "None (NoneType)"),
        ((1.0, 2.0), 1, "2 values for 1 objectives"),
        (1.0, 2, "1 values for 2 objectives"),
        ({"loss": 1.0}, 1, "(dict), which is no number"),
        (np.array([1.0, 2.0]), 1, "(ndarray), which is no number"),
        (1j, 1, "(complex)"),
    ],
)
def test_what_is_no_value_is_a_fail_with_one_line(
    value: object, objectives: int, says: str
) -> None:
    outcome = judge(value, objectives)
    assert outcome.state == FAIL
    assert says in outcome.reason
    assert "\n" not in outcome.reason


@pytest.mark.parametrize(
    ("leave", "reason"),
    [
        ("sys.exit('no data')", "SystemExit: no data"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt('from a library')", "KeyboardInterrupt: from a library"),
        ("raise GeneratorExit", "GeneratorExit"),
        ("raise type('Enough', (BaseException,), {})('of it')", "Enough: of it"),
        ("raise ValueError", "ValueError"),
    ],
)
def test_whatever_leaves_the_objective_costs_that_trial(
    leave: str, reason: str, tmp_path: Path
) -> None:
    done = work(tmp_path, f"if trial.number == 1:\n    {leave}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert trials()[1].user_attrs["fail_reason"] == reason


@pytest.mark.parametrize("how", ["os._exit(0)", "os._exit(2)", "os.kill(os.getpid(), 9)"])
def test_a_process_that_is_gone_is_a_crash_whatever_its_status(how: str, tmp_path: Path) -> None:
    """It is started again, its trial comes back at once, and fails after MAX_ATTEMPTS of them."""
    done = work(tmp_path, f"if trial.number == 1:\n    {how}", keep=True, MAX_ATTEMPTS="2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trial 1 back to the queue") == 2
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert trials()[1].user_attrs["fail_reason"].startswith("crashed 2 times")


@pytest.mark.parametrize(
    "fault",
    [
        "raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))",
        "raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))",
        "raise PermissionError(errno.EACCES, 'Permission denied', '/data')",
        "raise RuntimeError('[enforce fail at x.cc:1] . PytorchStreamWriter failed writing file')",
    ],
)
def test_the_sites_fault_is_no_trials_failure(fault: str, tmp_path: Path) -> None:
    """The trial goes back, the worker tries again for five grace periods, and stops with 75."""
    done = work(tmp_path, fault, LEASE_GRACE="1", MAX_ATTEMPTS="1")
    assert done.returncode == values.SITE_FAULT, done.stdout + done.stderr
    assert "trying again for 5 s" in done.stdout
    assert "submit again" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert [trial.state for trial in trials()] == [WAITING]
    assert work(tmp_path, "pass").returncode == 0
    assert [trial.state for trial in trials()] == [COMPLETE] * 4


def test_a_fault_that_passes_costs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    body = (
        f"if trial.number == 1 and not os.path.exists({str(mark)!r}):\n"
        f"    open({str(mark)!r}, 'w').close()\n"
        "    raise OSError(errno.EIO, os.strerror(errno.EIO))"
    )
    done = work(tmp_path, body)
    assert done.returncode == 0, done.stdout
    assert "it works again" in done.stdout
    assert [trial.state for trial in trials()] == [COMPLETE] * 4


def test_an_error_of_the_sampler_is_no_trials_failure(tmp_path: Path) -> None:
    body = "pass"
    script = tmp_path / "my.py"
    work(tmp_path, body, TOTAL_TRIALS="1")
    script.write_text(
        "import optuna\n"
        "class Bad(optuna.samplers.TPESampler):\n"
        "    def sample_relative(self, *args):\n"
        "        raise RuntimeError('singular matrix')\n"
        "optuna.samplers.TPESampler = Bad\n" + script.read_text()
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "4", "LEASE_GRACE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == values.SITE_FAULT, done.stdout + done.stderr
    assert "the sampler CompleteTPE failed: RuntimeError: singular matrix" in done.stdout
    assert {trial.state for trial in trials()} == {COMPLETE, WAITING}


@pytest.mark.parametrize(
    ("error", "fault"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (ValueError("No space left on device"), True),
        (ValueError("too small"), False),
    ],
)
def test_what_is_the_sites_fault(error: Exception, fault: bool) -> None:
    assert bool(site.fault_of(error)) == fault
    outer = RuntimeError("in a library")
    outer.__context__ = error
    assert bool(site.fault_of(outer)) == fault


def test_the_same_failure_again_and_again_stops_the_worker(tmp_path: Path) -> None:
    """Whatever has succeeded before; numbers in the reason make no other one."""
    body = "if trial.number > 2:\n    raise ValueError(f'no layer {trial.number}, x={x}')"
    done = work(tmp_path, body, TOTAL_TRIALS="50")
    assert done.returncode == 1
    assert "6 trials in a row failed" in done.stdout
    assert "init_optuna_db.py --retry-failed" in done.stdout
    found = trials()
    assert Counter(trial.state for trial in found) == {COMPLETE: 3, FAIL: 6}
    assert fail_reasons(found) == [("ValueError: no layer 3, x=" + reason_x(found[3]), 6)]


def reason_x(trial: FrozenTrial) -> str:
    """Return the x in the reason of a trial."""
    return str(trial.user_attrs["fail_reason"]).split("x=")[1]


def test_failed_trials_run_again_once_the_bug_is_mended(tmp_path: Path) -> None:
    work(tmp_path, "raise ValueError('a bug')", TOTAL_TRIALS="50")
    before = [trial.params for trial in trials()]
    assert [trial.state for trial in trials()] == [FAIL] * 3
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "init_optuna_db.py"), "--retry-failed"],
        env={**os.environ, "PY_SCRIPT": str(tmp_path / "my.py"), "TOTAL_TRIALS": "3"},
        capture_output=True,
        text=True,
    )
    assert "3 failed trials go back to the queue" in done.stdout, done.stderr
    assert [trial.state for trial in trials()] == [WAITING] * 3
    assert work(tmp_path, "pass", TOTAL_TRIALS="3").returncode == 0
    found = trials()
    assert [(trial.state, trial.params) for trial in found] == [(COMPLETE, p) for p in before]
    assert not any("fail_reason" in trial.user_attrs for trial in found)


def test_a_study_of_failures_is_no_success(tmp_path: Path) -> None:
    body = "if trial.number % 3:\n    raise [ValueError, KeyError][trial.number % 3 - 1]('no')"
    done = work(tmp_path, body, TOTAL_TRIALS="9")
    assert done.returncode == 1
    assert "most of its trials failed: 6 of 9" in done.stdout


def test_a_trial_that_is_longer_than_the_job_is_said_to_be(tmp_path: Path) -> None:
    """It comes back MAX_ATTEMPTS times without a new epoch."""
    body = "import signal; os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)"
    for attempt in (1, 2, 3):
        done = work(tmp_path, body)
        assert done.returncode == 0
        assert [trial.state for trial in trials()] == [WAITING if attempt < 3 else FAIL]
    assert "came back without one new epoch 3 times" in trials()[0].user_attrs["fail_reason"]
    assert "--time" in done.stdout


def test_study_stop_ends_the_study_and_loses_nothing(tmp_path: Path) -> None:
    body = "if trial.number == 1:\n    trial.study.stop()"
    done = work(tmp_path, body, TOTAL_TRIALS="6")
    assert done.returncode == 0
    assert "trial 1 has stopped the study" in done.stdout
    assert [trial.state for trial in trials()] == [COMPLETE] * 2
    assert work(tmp_path, body, TOTAL_TRIALS="6").returncode == 0  # as with Optuna, it goes on
    assert len(trials()) == 6


def test_a_value_that_is_good_enough_ends_the_study(tmp_path: Path) -> None:
    done = work(tmp_path, "pass", TOTAL_TRIALS="200", STOP_VALUE="0.3")
    assert done.returncode == 0
    assert "has reached STOP_VALUE=0.3" in done.stdout
    values = [trial.value for trial in trials()]
    assert len(values) < 200
    assert [value <= 0.3 for value in values if value is not None].index(True) == len(values) - 1


def test_reasons() -> None:
    assert reason_of(MemoryError("8 GiB")) == "out of memory (MemoryError: 8 GiB)"
    assert reason_of(ValueError("one\ntwo")) == "ValueError: one"


def test_an_error_whose_text_fails_costs_the_trial_alone(tmp_path: Path) -> None:
    body = """
class Odd(Exception):
    def __str__(self):
        return self.args[7]
if trial.number == 1:
    raise Odd("no seven")"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    reason = "Odd: <a Odd whose text fails: IndexError>"
    assert trials()[1].user_attrs["fail_reason"] == reason


def test_an_objective_that_tells_its_trial_is_told_so(tmp_path: Path) -> None:
    body = "if trial.number == 1:\n    trial.study.tell(trial, 3.0)"
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert "the objective called study.tell()" in trials()[1].user_attrs["fail_reason"]


@pytest.mark.parametrize("call", ["ask()", "optimize(float, n_trials=1)"])
def test_an_objective_that_begins_trials_is_told_so(call: str, tmp_path: Path) -> None:
    """One that it asks for, nobody would run, and every worker would wait for."""
    result = work(tmp_path, f"if trial.number == 1:\n    trial.study.{call}")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert "the objective called study." in trials()[1].user_attrs["fail_reason"]


def test_what_an_objective_queues_beyond_the_total_costs_nothing(tmp_path: Path) -> None:
    body = "if trial.number % 3 == 0:\n    trial.study.enqueue_trial({'x': 0.5})"
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE] * 4
    assert [trial.params["x"] == 0.5 for trial in trials()] == [False, True, False, False]
    assert "what the objective queues is left out: The study has its 4 trials." in result.stdout


@pytest.mark.parametrize("after", [0, 1])
def test_a_study_that_is_deleted_ends_its_worker_with_one_line(after: int, tmp_path: Path) -> None:
    """By hand or in a dashboard: while a trial runs, and between two trials."""
    body = f"""
if trial.number == 1:
    here = f"sqlite:///{{os.environ['STUDY_DB'][10:]}}", trial.study.study_name
    delete = lambda *_: optuna.delete_study(storage=here[0], study_name=here[1])
    tell = optuna.Study.tell
    if {after}:
        optuna.Study.tell = lambda *values: (tell(*values), delete())
    else:
        delete()"""
    result = work(tmp_path, body)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert "error: the study mnist_hpo was deleted while this worker ran" in result.stderr


def test_a_step_that_no_database_can_hold_costs_that_trial_alone(tmp_path: Path) -> None:
    result = work(tmp_path, "if trial.number == 1:\n    trial.report(x, 2 ** 63)")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert "the step 9223372036854775808 of a report" in trials()[1].user_attrs["fail_reason"]


def test_a_range_without_an_end_costs_that_trial_alone(tmp_path: Path) -> None:
    """It is no fault of the sampler's."""
    body = "if trial.number == 1:\n    trial.suggest_float('y', 0, float('inf'))"
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    reason = trials()[1].user_attrs["fail_reason"]
    assert reason == "ValueError: y is from 0 to inf, which is no range"


@pytest.mark.parametrize(("leave", "status"), [("sys.exit(3)", 3), ("return 5.0", 0), ("1 / 0", 1)])
def test_a_process_that_the_objective_forks_is_no_worker(
    leave: str, status: int, tmp_path: Path
) -> None:
    body = f"""
child = os.fork() if trial.number == 1 else -1
if child == 0:
    {leave}
if child > 0:
    trial.set_user_attr("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == 4 * [COMPLETE]
    assert trials()[1].user_attrs["status"] == status


def test_a_pool_of_processes_ends_without_a_word(tmp_path: Path) -> None:
    """Each of them is ended by a signal, for which the worker has a handler."""
    body = """
import multiprocessing
with multiprocessing.get_context("fork").Pool(2) as pool:
    x = sum(pool.map(abs, [x, x]))"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == 4 * [COMPLETE]
    assert "Traceback" not in result.stdout + result.stderr


def test_ctrl_c_is_a_forked_processes_own_affair(tmp_path: Path) -> None:
    """A DataLoader's leave at KeyboardInterrupt without a word; anything else is an error there."""
    body = """
import signal
child = os.fork() if trial.number == 1 else -1
if child == 0:
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        os._exit(7)
if child > 0:
    trial.set_user_attr("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert trials()[1].user_attrs["status"] == 7


def test_a_report_to_an_earlier_trial_costs_that_trial_alone(tmp_path: Path) -> None:
    """It is a mistake of the script, not a trial that another worker has taken."""
    body = """
first = vars(optuna).setdefault("first", trial)
if trial.number == 1:
    first.report(x, 1)"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]
    assert "UpdateFinishedTrialError: Trial 0 is" in trials()[1].user_attrs["fail_reason"]


@pytest.mark.parametrize("first", [0, 1])
def test_a_handler_of_the_scripts_own_loses_no_trial(first: int, tmp_path: Path) -> None:
    """The trial that a signal ends, through it, or though an earlier one ignores all signals."""
    body = f"""
import signal
def handler(number, frame):
    sys.exit(3)
if trial.number == {first}:
    signal.signal(signal.SIGTERM, handler if {first} else signal.SIG_IGN)
if trial.number == 1:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, WAITING]
    assert "Traceback" not in result.stdout + result.stderr


def test_what_the_script_leaves_behind_holds_up_no_worker(tmp_path: Path) -> None:
    """Python waits for such a thread as long as it runs, here two minutes."""
    body = """
import threading
from hpo import files
files.LONGEST_END = 1.0
if trial.number == 1:
    threading.Thread(target=time.sleep, args=(120,), name="feeder").start()"""
    result = work(tmp_path, body)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == 4 * [COMPLETE]
    assert "left behind by the script, and ended after 1 s: feeder" in result.stderr


def test_a_process_that_goes_on_after_the_worker_is_left_alone(run: Run, tmp_path: Path) -> None:
    """As a notebook does, or a program that catches SystemExit."""
    script = tmp_path / "my.py"
    script.write_text("""
import time
from hpo import files, settings
files.LONGEST_END = 0.0
try:
    settings.run_script(lambda: 3)
except SystemExit as end:
    time.sleep(1)
    print("goes on after", end.code)
""")
    result = run(script, PYTHONPATH=str(SCRIPTS))
    assert (result.returncode, result.stdout) == (0, "goes on after 3\n"), result.stderr


@pytest.mark.parametrize("end", ["run_script(run_worker(objective))", "run_worker(objective)"])
def test_a_worker_that_is_started_in_another_way(end: str, tmp_path: Path) -> None:
    script = tmp_path / "my.py"
    script.write_text(HEAD + "    return x\n" + end + "\n")
    for total, status in (("none", 2), ("2", 0)):
        result = subprocess.run(
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": total},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == status, result.stdout + result.stderr
        assert ("TOTAL_TRIALS='none' is not an integer" in result.stderr) == bool(status)
        assert "Traceback" not in result.stderr
    assert [trial.state for trial in trials()] == 2 * [COMPLETE]


def test_a_closed_output_changes_no_status(tmp_path: Path) -> None:
    result = work(tmp_path, "if trial.number == 1:\n    sys.stdout.close()")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == 4 * [COMPLETE]
    assert "the study has its 4 trials" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_package_that_was_imported_by_half_costs_no_trial(tmp_path: Path) -> None:
    """Its files were away for a moment; only a new process can import the rest of it."""
    package = tmp_path / "site-packages" / "half"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import half.deep")
    (package / "deep.py").write_text("from half import lost")
    once = tmp_path / "once"
    body = f"""
if trial.number == 1 and not os.path.exists({str(once)!r}):
    open({str(once)!r}, "w")
    import half"""
    path = f"{SCRIPTS}{os.pathsep}{package.parent}"
    result = work(tmp_path, body, keep=True, PYTHONPATH=path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == 4 * [COMPLETE]
    assert "half was imported by half" in result.stdout
    assert "the worker died with status 70: starting it again" in result.stdout + result.stderr


def test_a_circle_in_modules_of_ones_own_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "mine_a.py").write_text("import mine_b\nlater = 1")
    (tmp_path / "mine_b.py").write_text("from mine_a import later")
    result = work(tmp_path, "if trial.number == 1:\n    import mine_a")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [trial.state for trial in trials()] == [COMPLETE, FAIL, COMPLETE, COMPLETE]


def test_a_file_that_torch_cannot_open_is_the_site_s_fault(tmp_path: Path) -> None:
    """As on a full disk; but not where the script has named a folder, or one that is not there."""
    old, new = f"File {tmp_path}/a.pt cannot be opened.", "x] . open file failed with strerror: {}"
    assert site.fault_of(RuntimeError(old)) == old  # so said torch 2.6 on a full GlusterFS
    away = new.format(os.strerror(errno.ENOTCONN))
    assert site.fault_of(RuntimeError(away)) == away
    assert site.fault_of(RuntimeError(new.format(os.strerror(errno.ENOENT)))) == ""
    for path in (tmp_path, tmp_path / "none" / "a.pt"):
        with pytest.raises(RuntimeError) as caught:
            torch.save({}, path)
        assert site.fault_of(caught.value) == ""
