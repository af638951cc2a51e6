"""The batch script's own work, with stand-ins for Slurm, the container and Python: fast.

tests/test_launch.py runs whole studies with it; tests/cluster does so on a real Slurm.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common import SCRIPTS
from hpo import drain
from hpo.job import estimate
from hpo.settings import UserError

# Of a container: Python is given its options.  Notes its arguments, and which study it would open.
PYTHON = """#!/bin/bash
echo "$* : $STUDY_NAME $TOTAL_TRIALS ${SLURM_JOB_END_TIME:-endless}" >>"$RECORD"
ulimit -S -c >>"$RECORD.cores"
marker=$RECORD.away.${*// /} # a step's first run may find the disk full, or each
if [[ -n $AWAY && $* =~ (init_opt|job.count|check_cl|check_best) && ! -e $marker ]]; then
    [[ $AWAY == always ]] || touch "$marker"
    exit 75
fi
case "$*" in
    "-m hpo.job.begin") [[ -z $NO_OPTUNA ]] || exit 3; exec "$REAL_PYTHON" "$@" ;;
    "-m hpo.job.count")
        if [[ -e $RECORD.begun ]]; then echo "${AFTER:-1 9 4}"; else echo "0 10 0"; fi
        touch "$RECORD.begun" ;;
    "-m hpo.settings given") echo TOTAL_TRIALS=10 ;;
    *hpo.job.return_trials*) exit 0 ;;
    *my.py) exit "${WORKER:-0}" ;;
esac
"""
CONTAINER = """#!/bin/bash
# Refuses what no host has, as the real one does.
[[ $* != *missing* ]] || { echo "FATAL: mount source /missing doesn't exist" >&2; exit 255; }
echo "${0##*/} $1 $2 $3 $4" >>"$RECORD.container"
while [[ $1 != *.sif ]]; do shift; done
[[ -z $CLEAN ]] || export STUDY_NAME=
shift 2
exec python3 "$@"
"""
# A Slurm that obeys --export and has limits of its own, and a TaskProlog with its own ideas.
SRUN = """#!/bin/bash
ulimit -S -c "$(ulimit -H -c)"
while [[ $1 == --* ]]; do [[ $1 != --export=ALL ]] || SLURM_EXPORT_ENV= ; shift; done
[[ -z $SLURM_EXPORT_ENV ]] || exec env -i PATH="$PATH" RECORD="$RECORD" SLURM_PROCID=0 "$@"
export STUDY_NAME=of_the_prolog TOTAL_TRIALS=500 SLURM_PROCID=0
[[ -z $PROLOG ]] || unset JOB_SETTINGS
exec "$@"
"""
SQUEUE = """#!/bin/bash
case "$*" in
    *--format=%A) echo 4711 ;;
    *--format=%e) echo "${ENDS:-NONE}" ;;
    *) echo "4710|/other.sh|1:00|9|big|"
       echo "4711|$SLURM_SUBMIT_DIR/my job.sh|10:00|2|small|gres/gpu:2|(null)|mine|long|N/A|a b" ;;
esac
"""
SBATCH = """#!/bin/bash
printf '<%s>' "$@" "$CHAIN_JOBS" "$STUDY_NAME" "${SLURM_NTASKS-unset}" >"$RECORD.sbatch"
echo "Submitted batch job 4712"
"""
SCONTROL = """#!/bin/bash
echo "$*" >"$RECORD.scontrol"
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the scripts' folder of a copy, in whose path there is a space."""
    bundle, tools = tmp_path / "a bundle", tmp_path / "bin"
    tools.mkdir()
    for name, text in {
        "python3": PYTHON,
        "singularity": CONTAINER,
        "srun": SRUN,
        "squeue": SQUEUE,
        "sbatch": SBATCH,
        "scontrol": SCONTROL,
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (bundle / "logs").mkdir(parents=True)
    scripts = bundle / "code_and_slurm-scripts"
    ignore = shutil.ignore_patterns("__pycache__", "*-ubyte", "*.db*", "checkpoints", "logs")
    shutil.copytree(SCRIPTS, scripts, symlinks=True, ignore=ignore)
    (scripts / "my.py").touch()
    (bundle / "image.sif").touch()
    monkeypatch.delenv("STUDY_DB")
    for name, value in {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "REAL_PYTHON": sys.executable,
        "RECORD": str(tmp_path / "record"),
        "CONTAINER": str(bundle / "image.sif"),
        "PY_SCRIPT": "my.py",
        "STUDY_NAME": "mine",
        "TOTAL_TRIALS": "10",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "3",
        "SLURM_SUBMIT_DIR": str(scripts),
    }.items():
        monkeypatch.setenv(name, value)
    return scripts


def sbatch(job: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm does."""
    spooled = job.parent.parent / "slurm_script"
    shutil.copy(job / "run-optuna-multinode_Turpan.sh", spooled)
    limits = 'ulimit -S -c "$(ulimit -H -c)" && exec bash "$0"'
    command = ["bash", "-c", limits, str(spooled)]
    return subprocess.run(
        command, cwd=job, env={**os.environ, **env}, capture_output=True, text=True
    )


def record(job: Path, suffix: str = "") -> str:
    """Return what a stand-in has noted."""
    path = job.parent.parent / f"record{suffix}"
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("export", ["", "NONE", "FOO=1"])
def test_tasks_have_the_settings_of_the_batch_script(job: Path, export: str) -> None:
    """Whatever --export of sbatch and the site's TaskProlog make of the environment."""
    result = sbatch(job, SLURM_EXPORT_ENV=export)
    assert result.returncode == 0, result.stderr
    assert len(record(job).splitlines()) == 10
    assert {line.split(" : ")[1] for line in record(job).splitlines()} == {"mine 10 endless"}
    assert "singularity exec --nv --bind /tmpdir,/work" in record(job, ".container")
    assert set(record(job, ".cores").split()) == {"0"}  # nobody leaves one, large as its memory


def test_a_task_without_the_settings_of_its_job_runs_nothing(job: Path) -> None:
    result = sbatch(job, PROLOG="1")
    assert "has not got the settings of its job, and runs nothing" in result.stderr
    assert result.returncode == 2
    assert "my.py" not in record(job)


def test_successor_is_submitted_with_what_the_job_has(job: Path) -> None:
    given = {"SLURM_NTASKS_PER_NODE": "2", "SLURM_MEM_PER_NODE": "2048"}
    result = sbatch(job, CHAIN_JOBS="2", SLURM_TRES_PER_TASK="cpu=4,gres/gpu=1", **given)
    assert result.returncode == 0, result.stderr
    assert record(job, ".sbatch")[1:-1].split("><") == [
        *("--export=ALL", "--time=10:00", "--nodes=2", "--partition=small", "--gres=gpu:2"),
        *("--account=mine", "--qos=long", "--job-name=a b", "--gpus-per-task=1", "--ntasks=3"),
        *("--ntasks-per-node=2", "--mem=2048", f"{job}/my job.sh", "1", "mine", "unset"),
    ]
    assert result.stdout.endswith("sbatch my\\ job.sh\nSubmitted batch job 4712\n")


@pytest.mark.parametrize(
    "env",
    [{"AFTER": "0 10 0"}, {"SLURM_ARRAY_JOB_ID": "4700"}, {"WORKER": "1"}, {"CHAIN_JOBS": "0"}],
)
def test_no_successor(job: Path, env: dict[str, str]) -> None:
    """Without one epoch of progress, in an array, after a failure, or where none is wanted."""
    result = sbatch(job, **{"CHAIN_JOBS": "2", **env})
    assert record(job, ".sbatch") == ""
    assert ("No successor is submitted" in result.stdout) == ("CHAIN_JOBS" not in env)
    assert "trials are left" in result.stdout


def test_an_epoch_is_progress_enough(job: Path) -> None:
    assert "Submitted" in sbatch(job, CHAIN_JOBS="2", AFTER="0 10 1").stdout


def test_this_machines_python_where_no_container_is_named(job: Path) -> None:
    result = sbatch(job, CONTAINER="")
    assert result.returncode == 0, result.stderr
    assert record(job, ".container") == ""
    assert "my.py : mine 10 endless\n" in record(job)
    result = sbatch(job, CONTAINER="", NO_OPTUNA="1")
    assert f"bin/python3 -m pip install -r {job}/requirements-container.txt" in result.stderr


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"BINDS": "/missing"}, "/missing doesn't exist\nerror: Python does not start (status 255"),
        ({"NO_OPTUNA": "1"}, "pip install --user -c image.txt -r requirements-container.txt"),
        ({"CLEAN": "1"}, "the container hides the environment"),
        ({"SAMPLER": "bayes"}, "choose one of: tpe, random"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_made(
    job: Path, env: dict[str, str], says: str
) -> None:
    result = sbatch(job, **env)
    assert (result.returncode, says in result.stderr) == (2, True), result.stderr
    assert "init_optuna_db" not in record(job)


def test_a_job_ends_when_slurm_says_so_or_never(job: Path) -> None:
    assert sbatch(job).returncode == 0  # squeue says NONE
    assert "my.py : mine 10 endless\n" in record(job)
    assert sbatch(job, ENDS="2030-01-01T00:00:00\n2031-01-01T00:00:00", TZ="UTC").returncode == 0
    assert "my.py : mine 10 1893456000\n" in record(job)


def test_why_a_job_failed_is_said_where_no_full_disk_hides_it(job: Path) -> None:
    result = sbatch(job, WORKER="75")
    assert "a disk, a file server or the study could not be used" in result.stderr
    assert record(job, ".scontrol").startswith("update JobId=4711 Comment=a worker ended with")


def test_each_step_waits_for_a_disk_that_is_full_or_away(job: Path) -> None:
    result = sbatch(job, AWAY="once")
    assert result.returncode == 0, result.stderr
    lines = [line.split(" : ")[0] for line in record(job).splitlines()]
    count = "-m hpo.job.count"
    assert [line for line in lines if "py" in line or line == count] == [
        "-I hpo/job/hidden.py",
        *(["init_optuna_db.py"] * 2 + [count] * 2 + ["check_cluster.py"] * 2),
        *(["-u my.py"] + [count] + ["check_best_model.py --report"] * 2),
    ]
    assert "A disk or a file server is full or away: trying again in 1 s" in result.stderr
    assert "trials are left" in result.stdout


def test_a_disk_that_stays_away_ends_the_job_and_slurm_knows_why(job: Path) -> None:
    """But not before the job's end is near, or minutes are over."""
    result = sbatch(job, AWAY="always", SLURM_JOB_END_TIME=str(int(time.time()) + 22))
    assert result.returncode == 75
    assert "check_cluster.py" not in record(job)
    assert "Comment=init_optuna_db.py ended with status 75: a disk, a file server" in record(
        job, ".scontrol"
    )


def test_a_full_disk_of_the_logs_ends_no_job(job: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            ["bash", str(job / "run-optuna-multinode_Turpan.sh")],
            cwd=job, env={**os.environ, "AWAY": "once"}, stdout=full, stderr=full, check=False,
        )  # fmt: skip
    assert done.returncode == 0
    assert record(job).count("my.py :") == 1
    assert "check_best_model.py --report" in record(job)


ENDED = """
import os, sys
from hpo.settings import run_script
def main():
    print("a line", flush=True)
    if sys.argv[1:]:
        raise OSError(int(sys.argv[1]), os.strerror(int(sys.argv[1])), "x.db")
    return 0
run_script(main)
"""


@pytest.mark.parametrize(("number", "status"), [(errno.EIO, 75), (errno.ENOENT, 1), (0, 0)])
def test_what_a_script_says_of_a_disk_and_to_a_full_one(number: int, status: int) -> None:
    """A disk that is away is one line; a mistake of ours has its traceback; a full log is none."""
    words = [str(number)] if number else []
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "SLURM_JOB_ID": "1"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", ENDED, *words],
            env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)
    assert ("error: [Errno 5] Input/output error: 'x.db'" in done.stderr) == (status == 75)


INTERRUPTED = """
import signal, sys, time
from hpo import drain
drain.REPORT_SECONDS = drain.HARD_SECONDS = 0.5
limit = drain.Drain(time.time() + 1)
try:
    with limit.interruptible():
        if sys.argv[1:]:  # a call that does not let Python react
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        limit.watch_the_end()
        time.sleep(600)
except drain.Drained:
    sys.exit(5)
"""


SWALLOWED = """
import os, signal, sys
from hpo import drain
limit = drain.Drain(float("inf"))
try:
    with limit.interruptible():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:  # as a destructor does, and many a script
            os.kill(os.getpid(), signal.SIGTERM)  # the second of scancel
        print("cleaned up", flush=True)
        drain.AGAIN_SECONDS = 0.0
        os.kill(os.getpid(), signal.SIGTERM)
        print("never", flush=True)
except drain.Drained:
    sys.exit(5)
"""


DEAF_ONCE = """
import signal, sys, time
count = 0
def handle(number, frame):
    global count
    count += 1
    if count == 2:
        sys.exit(7)
signal.signal(signal.SIGTERM, handle)
open(sys.argv[0] + ".ready", "w").close()
time.sleep(600)
"""


def test_a_signal_that_python_has_not_noticed_is_sent_again(tmp_path: Path) -> None:
    """One that has reached another thread than the main one, which sleeps on."""
    script = tmp_path / "deaf.py"
    script.write_text(DEAF_ONCE)
    command = ["bash", "hpo/job/keep_running.sh", str(script), sys.executable]
    keeper = subprocess.Popen(command, cwd=SCRIPTS, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    while not Path(f"{script}.ready").exists():
        assert keeper.poll() is None
        time.sleep(0.05)
    keeper.terminate()
    assert keeper.wait(timeout=600) == 7


def test_a_signal_that_a_trial_has_swallowed_can_be_sent_again() -> None:
    command = [sys.executable, "-c", SWALLOWED]
    done = subprocess.run(command, cwd=SCRIPTS, timeout=6000, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (5, "cleaned up\n"), done.stderr


@pytest.mark.parametrize(("words", "status"), [([], 5), (["deaf"], drain.INTERRUPTED)])
def test_an_epoch_that_would_outlast_the_job_is_interrupted(words: list[str], status: int) -> None:
    command = [sys.executable, "-c", INTERRUPTED, *words]
    assert subprocess.run(command, cwd=SCRIPTS, timeout=6000).returncode == status


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("10", 600),
        ("10:30", 630),
        ("01:00:00", 3600),
        ("2-3", 183_600),
        ("1-02:03", 93_780),
        ("1-02:03:04", 93_784),
        ("UNLIMITED", math.inf),
        ("0", math.inf),
    ],
)
def test_all_forms_of_time(text: str, seconds: float) -> None:
    assert estimate.seconds_of(text) == seconds


def test_a_time_that_is_none() -> None:
    with pytest.raises(UserError, match="--time=1h is no time"):
        estimate.seconds_of("1h")


def test_header_and_bill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "#SBATCH -p gpu\n##SBATCH --nodes=9\n#SBATCH --nodes 2\n#SBATCH --exclusive\n"
    options = estimate.header(f"{text}#SBATCH -c 10 # x\n#SBATCH --ntasks-per-node=4\n")
    assert options["partition"] == "gpu"
    assert estimate.tasks_of(options) == (2, 8)
    monkeypatch.setattr(estimate, "TURPAN", tmp_path / "none")
    assert "80.0 core-hours, 8.0 GPU-hours, 2.0 node-hours" in estimate.cost(options, 2, 8, 3600)
    monkeypatch.setattr(estimate, "TURPAN", tmp_path)
    assert "160.0 core-hours (160 cores)" in estimate.cost(options, 2, 8, 3600)
    assert "(80 cores)" in estimate.cost({**options, "partition": "shared"}, 1, 8, 3600)
