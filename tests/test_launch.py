"""The launch scripts: run-optuna-local.sh, and the sbatch script with stand-ins for srun and
apptainer (tests/cluster runs it on a real Slurm with a real Apptainer).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from common import BUNDLE, LIMIT, wait_for

APPTAINER = """#!/bin/bash
# Stands for apptainer: checks the options, then runs the command without a container.
[[ "$1 $2 $3 $4" == "exec --nv --bind /tmpdir,/work" ]] || exit 99
shift 5
[[ $1 == python ]] && shift && exec "$REAL_PYTHON" "$@"
exec "$@"
"""
SRUN = """#!/bin/bash
# Stands for srun: one process per task, each with its rank and its log, and without a GPU.
echo "srun $*" >>"$RECORD"
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks=* ]] && tasks=${1#*=}
    [[ $1 == --output=* ]] && output=${1#*=}
    shift
done
for ((rank = 0; rank < tasks; rank++)); do
    log=${output//%j/$SLURM_JOB_ID}
    log=${log//%t/$rank}
    SLURM_PROCID=$rank CUDA_VISIBLE_DEVICES=-1 "$@" >>"${log:-$RECORD.out}" 2>&1 &
    pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
[[ -n $output ]] || cat "$RECORD.out"
exit ${status:-0}
"""
SQUEUE = r"""#!/bin/bash
# Stands for squeue: this job is the user's only one.
[[ $* == *--format=%A ]] && echo "$SLURM_JOB_ID"
[[ $* == *--format=%A\|%o* ]] && echo "4711|$SLURM_SUBMIT_DIR/my-job.sh|10:00|2|small|"
[[ $* == *--format=%e* ]] && date --date="${JOB_ENDS_IN:-600} seconds" +%Y-%m-%dT%H:%M:%S
exit 0
"""
SBATCH = """#!/bin/bash
# Stands for sbatch: notes what was submitted.
echo "sbatch $* CHAIN_JOBS=$CHAIN_JOBS TOTAL_TRIALS=$TOTAL_TRIALS" >>"$RECORD"
"""


@pytest.fixture
def job(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the scripts' folder of a copy, in the environment that sbatch would give a job."""
    tools = bundle.parent / "bin"
    tools.mkdir()
    for name, text in (
        ("apptainer", APPTAINER),
        ("srun", SRUN),
        ("squeue", SQUEUE),
        ("sbatch", SBATCH),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    image = bundle.parent / "image.sif"
    image.touch()
    monkeypatch.delenv("STUDY_DB")
    for name, value in {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "REAL_PYTHON": sys.executable,
        "RECORD": str(bundle.parent / "srun.log"),
        "CONTAINER": str(image),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "turpancomp[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_NTASKS": "4",
        "SLURM_CPUS_PER_TASK": "40",
        "SLURM_SUBMIT_DIR": str(bundle / "code_and_slurm-scripts"),
    }.items():
        monkeypatch.setenv(name, value)
    return bundle / "code_and_slurm-scripts"


@pytest.fixture
def without_torch(job: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the job run a script that is imported in a second; return its path."""
    script = job / "my.py"
    script.write_text(SCRIPT.replace("time.sleep(0.1)", "time.sleep(1)"))
    (job / "killed").touch()  # so that no worker dies
    monkeypatch.setenv("PY_SCRIPT", "my.py")
    return script


def sbatch(job: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script as Slurm does: a copy of it, from the folder of the submission."""
    spooled = job.parent.parent / "slurm_script"
    shutil.copy(job / "run-optuna-multinode_Turpan.sh", spooled)
    return subprocess.run(
        ["bash", str(spooled)],
        cwd=job,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def test_four_workers_run_the_study_and_the_log_ends_with_the_best_model(job: Path) -> None:
    result = sbatch(job, TOTAL_TRIALS="5", PRUNER="none")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 workers on 2 nodes (turpancomp[1-2])" in result.stdout
    assert "test accuracy" in result.stdout
    logs = sorted(path.name for path in (job.parent / "logs").glob("4711*"))
    assert logs == [f"4711.{rank}.out" for rank in range(4)]
    for rank in range(4):
        assert f"worker {rank} on" in (job.parent / "logs" / f"4711.{rank}.out").read_text()
    trials = optuna.load_study(
        study_name="mnist_hpo", storage=f"sqlite:///{job}/study.db"
    ).get_trials()
    assert len(trials) == 5
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    call = (job.parent.parent / "srun.log").read_text()
    assert "--export=ALL --ntasks=4 --cpus-per-task=40 --kill-on-bad-exit=0 --wait=0" in call


def test_submitted_from_the_folder_above(job: Path, without_torch: Path) -> None:
    result = sbatch(job, SLURM_SUBMIT_DIR=str(job.parent), TOTAL_TRIALS="1", SLURM_NTASKS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (job / "study.db").exists()


def test_status_of_srun_is_kept_and_the_report_printed(job: Path) -> None:
    (job.parent.parent / "bin" / "srun").write_text(
        "#!/bin/bash\n[[ $* == *check_cluster.py* ]] || exit 7\n"
    )
    result = sbatch(job)
    assert result.returncode == 7
    assert "A worker ended with status 7" in result.stderr
    assert "no trial is complete yet" in result.stdout


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"SLURM_JOB_ID": ""}, "this is a batch script: sbatch"),
        ({"SLURM_SUBMIT_DIR": "/tmp"}, "submitted from /tmp, which is not the bundle"),
        ({"CONTAINER": "/work/none.sif"}, "the image CONTAINER=/work/none.sif does not exist"),
        ({"PY_SCRIPT": "other.py"}, "PY_SCRIPT=other.py is not in"),
        ({"REAL_PYTHON": "/bin/false"}, "Python does not start (status 1"),
    ],
)
def test_mistakes_end_the_job_at_once(job: Path, env: dict[str, str], says: str) -> None:
    result = sbatch(job, **env)
    assert result.returncode == 2
    assert says in result.stderr
    assert not (job / "study.db").exists()


def test_wrong_setting_ends_the_job_before_the_workers(job: Path) -> None:
    result = sbatch(job, SAMPLER="bayes")
    assert result.returncode == 2
    assert "choose one of: tpe, random" in result.stderr
    assert not (job.parent.parent / "srun.log").exists()


def test_preflight_comes_before_the_workers_and_can_stop_the_job(
    job: Path, without_torch: Path
) -> None:
    result = sbatch(job, TOTAL_TRIALS="1", PRUNER="none")
    assert "✓ SQLite    100 of 100 increments by 4 tasks arrived" in result.stdout
    assert "The study is complete." in result.stdout
    assert not list(job.glob(".check_cluster*"))
    (job.parent.parent / "bin" / "srun").write_text(
        "#!/bin/bash\necho called >>$RECORD.late\nexit 1\n"
    )
    result = sbatch(job, TOTAL_TRIALS="2")
    assert result.returncode == 2
    assert "no trial was started" in result.stderr
    assert (job.parent.parent / "srun.log.late").read_text() == "called\n"


def test_job_out_of_time_says_how_to_go_on_and_submits_its_successor(
    job: Path, without_torch: Path
) -> None:
    result = sbatch(job, TOTAL_TRIALS="400", JOB_ENDS_IN="125", SLURM_NTASKS="2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "trials are left; this job finished" in result.stdout
    assert " TOTAL_TRIALS=400 PY_SCRIPT=my.py TRAIN_IMAGES=200 sbatch my-job.sh" in result.stdout
    assert "sbatch my-job.sh" in result.stdout
    record = job.parent.parent / "srun.log"
    assert "sbatch" not in record.read_text()  # nobody is billed by surprise
    drained_after_a_trial(job, TOTAL_TRIALS="400", SLURM_NTASKS="2", CHAIN_JOBS="2")
    options = "--export=ALL --time=10:00 --nodes=2 --partition=small --ntasks=2 --cpus-per-task=40"
    assert f"sbatch {options} {job}/my-job.sh CHAIN_JOBS=1 TOTAL_TRIALS=400" in record.read_text()


def drained_after_a_trial(job: Path, **env: str) -> str:
    """Run a job that Slurm tells to end as soon as a trial is complete; return what it prints."""
    spooled = job.parent.parent / "slurm_script"
    shutil.copy(job / "run-optuna-multinode_Turpan.sh", spooled)
    log = job.parent / "logs" / "4711.0.out"
    log.unlink(missing_ok=True)
    shell = subprocess.Popen(
        ["bash", str(spooled)],
        cwd=job,
        env={**os.environ, "JOB_ENDS_IN": "6000", **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: log.exists() and "complete" in log.read_text())
    shell.send_signal(signal.SIGUSR1)  # to the batch shell alone, as --signal=B:USR1@90 does
    output, _ = shell.communicate(timeout=LIMIT)
    assert shell.returncode == 0, output
    assert "no further trial" in log.read_text()
    return output


def test_signal_from_slurm_drains_the_workers(job: Path, without_torch: Path) -> None:
    output = drained_after_a_trial(job, TOTAL_TRIALS="400", SLURM_NTASKS="1")
    assert "trials are left; this job finished" in output
    assert not list(job.glob(".drain*"))


def test_no_successor_without_progress_or_after_the_last_trial(
    job: Path, without_torch: Path
) -> None:
    result = sbatch(job, CHAIN_JOBS="2", JOB_ENDS_IN="60", SLURM_NTASKS="1")
    assert "No successor is submitted" in result.stdout
    result = sbatch(job, CHAIN_JOBS="2", TOTAL_TRIALS="1", SLURM_NTASKS="1", PRUNER="none")
    assert "The study is complete." in result.stdout
    assert "sbatch" not in (job.parent.parent / "srun.log").read_text()


def test_estimate_needs_no_job(job: Path) -> None:
    script = job / "run-optuna-multinode_Turpan.sh"
    env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    env["TOTAL_TRIAL"] = "7"  # of no effect
    result = subprocess.run(
        ["bash", str(script), "--estimate"], env=env, capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode == 0, result.stderr
    assert "500 trials left" in result.stdout
    assert "2 (small), 4 tasks, 4 workers" in result.stdout
    assert "assumed: none finished" in result.stdout
    assert "asked for    about" in result.stdout  # of Turpan's bill: tests/test_job.py
    assert result.stdout.endswith("is TOTAL_TRIALS meant?\n")
    assert not (job / "study.db").exists()


@pytest.mark.parametrize("name", ["optuna.py", "random.py", "types.py", "numpy/__init__.py"])
def test_a_file_that_hides_a_module_is_named(name: str, job: Path) -> None:
    (job / name).parent.mkdir(exist_ok=True)
    (job / name).write_text("x = 1\n")
    result = sbatch(job)
    assert result.returncode == 2
    hidden = name.split("/")[0]
    says = f"error: {hidden} in {job} hides the module of that name: rename it"
    assert result.stderr.splitlines() == [says]


def test_a_workstation_names_it_too(local: Path) -> None:
    (local / "random.py").write_text("x = 1\n")
    script = ["bash", str(local / "run-optuna-local.sh")]
    result = subprocess.run(script, capture_output=True, text=True, timeout=LIMIT)
    says = f"error: random.py in {local} hides the module of that name: rename it\n"
    assert (result.returncode, result.stdout, result.stderr) == (2, "", says)


def test_a_file_with_the_name_of_a_module_that_nobody_needs_is_no_error(job: Path) -> None:
    for name in ("chess.py", "turtle.py", "test.py", "hpo.py"):
        (job / name).write_text("x = 1\n")
    program = [sys.executable, "-I", "hpo/job/hidden.py"]
    assert subprocess.run(program, cwd=job, capture_output=True).stdout == b""


def test_dead_worker_is_started_again_three_times(tmp_path: Path) -> None:
    worker = tmp_path / "worker.sh"
    worker.write_text(f"echo x >>{tmp_path}/starts; kill -9 $$")
    keeper = BUNDLE / "code_and_slurm-scripts" / "hpo" / "job" / "keep_running.sh"
    result = subprocess.run(["bash", str(keeper), str(worker), "bash"], capture_output=True)
    assert result.returncode == 137
    assert (tmp_path / "starts").read_text() == "x\n" * 4
    for status in (0, 1, 2, 74):  # 74: interrupted, since its job ends
        worker.write_text(f"echo x >>{tmp_path}/{status}; exit {status}")
        ended = subprocess.run(["bash", str(keeper), str(worker), "bash"]).returncode
        assert ended == (0 if status == 74 else status)
        assert (tmp_path / str(status)).read_text() == "x\n"


def test_a_worker_whose_file_server_is_away_is_waited_for(tmp_path: Path) -> None:
    """Its script cannot be read, and it ends with Python's status 2: no mistake, for once."""
    worker = tmp_path / "worker.sh"
    worker.write_text(f"""
        echo x >>{tmp_path}/starts
        [[ ! -e {tmp_path}/was_away ]] || exit 0
        touch {tmp_path}/was_away
        mv {worker} {worker}.away
        (until grep waiting {tmp_path}/said; do sleep 0.1; done
        mv {worker}.away {worker}) >/dev/null 2>&1 &
        exit 2
    """)
    keeper = BUNDLE / "code_and_slurm-scripts" / "hpo" / "job" / "keep_running.sh"
    with (tmp_path / "said").open("w") as said:
        result = subprocess.run(["bash", str(keeper), str(worker), "bash"], stderr=said)
    assert result.returncode == 0
    assert "waiting for the file server" in (tmp_path / "said").read_text()
    assert (tmp_path / "starts").read_text() == "x\nx\n"


def states(scripts: Path) -> list[str]:
    """Return the states of the trials of a local study."""
    storage = f"sqlite:///{scripts}/study.db"
    study = optuna.load_study(study_name="mnist_hpo", storage=storage)
    return [trial.state.name for trial in study.get_trials()]


def test_local_study_runs_and_goes_on_with_more_trials(local: Path) -> None:
    script = str(local / "run-optuna-local.sh")
    for total, command in (("2", [script]), ("4", ["sh", script])):
        result = subprocess.run(
            command,
            env={**os.environ, "TOTAL_TRIALS": total, "PRUNER": "none"},
            cwd="/",
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        assert f"{total} trials: {total} complete" in result.stdout.replace(f"{total} of ", "")
        assert "best_params" in result.stdout
        assert "test accuracy" in result.stdout
        more = f"PRUNER=none TRAIN_IMAGES=200 TOTAL_TRIALS={2 * int(total)}"  # all that was given
        assert f"{more} bash run-optuna-local.sh" in result.stdout
    assert len(states(local)) == 4


SCRIPT = """
import os, signal, time
from pathlib import Path
from hpo.settings import run_script
from hpo.worker import run_worker

def search_space(trial):
    return {"x": trial.suggest_float("x", -1, 1)}

def objective(trial):
    trial.set_user_attr("gpu", os.environ["CUDA_VISIBLE_DEVICES"])
    if trial.number == 0 and not Path("killed").exists():
        Path("killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return search_space(trial)["x"]

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""


def test_local_study_uses_the_preset_gpus_alone_and_starts_a_dead_worker_again(
    local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have a trial before one ends, also where one starts late.
    meet = """    Path(f"on {os.environ['CUDA_VISIBLE_DEVICES']}").touch()
    while len(list(Path().glob("on *"))) < 2:
        time.sleep(0.1)
"""
    (local / "my.py").write_text(SCRIPT.replace("    time.sleep(0.1)\n", meet))
    tool = local / "nvidia-smi"
    tool.write_text("#!/bin/bash\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(local), prepend=os.pathsep)
    result = subprocess.run(
        ["bash", str(local / "run-optuna-local.sh")],
        env={
            **os.environ,
            "PY_SCRIPT": "my.py",
            "TOTAL_TRIALS": "5",
            "CUDA_VISIBLE_DEVICES": "2,GPU-aa",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0, result.stdout
    study = optuna.load_study(study_name="mnist_hpo", storage=f"sqlite:///{local}/study.db")
    assert {trial.user_attrs["gpu"] for trial in study.trials} == {"2", "GPU-aa"}
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5
    logs = "".join(path.read_text() for path in (local.parent / "logs").glob("local.*.out"))
    assert "the worker died with status 137: starting it again (1 of 3)" in logs


SLOW = """
import time
from hpo.settings import run_script
from hpo.worker import run_worker

def objective(trial):
    time.sleep(600)

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""


def is_there(group: int) -> bool:
    """Whether a process group has processes; one that has just ended is there for a moment."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_ends_all_workers_and_returns_their_trials(local: Path, number: int) -> None:
    """And so does a terminal that is closed: who follows it could not end them any more."""
    (local / "slow.py").write_text(SLOW)
    launcher = subprocess.Popen(
        ["bash", str(local / "run-optuna-local.sh")],
        env={**os.environ, "TOTAL_TRIALS": "50", "PY_SCRIPT": "slow.py"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell, it is ignored, and bash keeps it so.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) and None,
    )
    wait_for(lambda: (local / "study.db").exists() and "RUNNING" in states(local))
    os.killpg(launcher.pid, number)  # what a terminal does with Ctrl-C, and when it is closed
    output, _ = launcher.communicate(timeout=LIMIT)
    assert launcher.returncode == 130, output
    assert "The same command goes on with the study" in output
    wait_for(lambda: not is_there(launcher.pid))
    assert "RUNNING" not in states(local)
    assert "WAITING" in states(local)


def test_installation_is_mended_and_needs_a_network(tmp_path: Path) -> None:
    """A folder without pip, and one whose Python is gone; then no index of packages."""
    no_network = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/simple"}
    (tmp_path / "empty").mkdir()
    (tmp_path / "gone" / "bin").mkdir(parents=True)
    (tmp_path / "gone" / "bin" / "python").symlink_to("/no/such/python")
    source = f"source {BUNDLE}/code_and_slurm-scripts/hpo/job/venv.sh; cd {tmp_path}; "
    mended = f"for each in empty gone; do make_pip $each {sys.executable} && has_pip $each; done"
    for command, status, said in (
        (mended, 0, ""),
        ("find_packages gone/bin/python", 2, "the first time this needs a network"),
    ):
        done = subprocess.run(
            ["bash", "-c", source + command],
            env={**os.environ, **no_network, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == status, done.stderr
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == bool(said)


def test_ctrl_c_while_pip_is_made_shows_no_traceback(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\necho Traceback >&2\nkill -INT $$\n")
    python.chmod(0o755)
    source = f"source {BUNDLE}/code_and_slurm-scripts/hpo/job/venv.sh; cd {tmp_path}; "
    command = ["bash", "-c", f"{source} make_pip new {python}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130
    assert done.stdout + done.stderr == ""


SERVER = """#!/bin/bash
# Stands for the container with the server: dies at first, then serves until SIGTERM.
echo "$*" >>"$RECORD"
[[ $(wc -l <"$RECORD") -gt 1 ]] || exit 3
trap 'echo stopped >>"$RECORD"; exit 0' TERM
touch study.db.server
while true; do sleep 0.1; done
"""
SERVE = """
set -euo pipefail
scripts=$PWD logs=$PWD/../logs tasks=4 WORKERS_PER_GPU=2 STUDY_DB=sqlite:///$PWD/study.db
source hpo/job/job.sh
run_python=("$SERVER")
on_every_gpu() { :; }
serve_study
run_workers
[[ ! -e study.db.server ]] && echo "status $status"
run_python=(false)
serve_study
"""


def test_the_server_knows_the_nodes_and_its_death_is_one_line(job: Path) -> None:
    tools = job.parent.parent / "bin"
    for name, text in (("server", SERVER), ("scontrol", "#!/bin/bash\nprintf 'n1\\nn2\\n'\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", SERVE],
        cwd=job,
        env={**os.environ, "SERVER": str(tools / "server"), "PY_SCRIPT": "my.py"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    call = "-m hpo.study.serving.server 8 n1 n2\n"
    assert Path(os.environ["RECORD"]).read_text() == f"{call}{call}stopped\n"
    died = "the study's server died with status"
    lines = [line for line in done.stdout.splitlines() if "serves the study" not in line]
    assert lines[:2] == [f"{died} 3: starting it again (1 of 3)", "status 0"]
    assert lines[2:5] == [f"{died} 1: starting it again ({number} of 3)" for number in (1, 2, 3)]
    assert lines[5].startswith("the study's server died 4 times in a row (status 1): giving up;")
    assert done.stderr.startswith("error: the server has not started: tail ")
    assert done.returncode == 2


def test_a_job_with_a_postgresql_of_its_own(job: Path, programs: Path) -> None:
    """Its copy of the study stays, and nothing else of it (test_own_server.py goes on from one)."""
    scontrol = job.parent.parent / "bin" / "scontrol"
    scontrol.write_text("#!/bin/bash\nhostname\n")
    scontrol.chmod(0o755)
    (job / "my.py").write_text(SCRIPT)
    env = {"STUDY_DB": "postgresql:job", "PY_SCRIPT": "my.py", "SLURM_NTASKS": "2"}
    result = sbatch(job, **env, TOTAL_TRIALS="2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "for this job; 0 trials from the last copy" in result.stdout
    assert "The study is complete." in result.stdout
    copy = f"sqlite:///{job}/postgresql-job.mnist_hpo.backup"
    trials = optuna.load_study(study_name="mnist_hpo", storage=copy).get_trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 2
    assert not (job / "postgresql-job.server").exists()
    assert list(programs.iterdir()) == []
