"""WORKERS_PER_GPU: ranks, statuses and signals of the workers of one Slurm task, MPS or not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import LIMIT, SCRIPTS, wait_for

MPS = SCRIPTS / "hpo" / "job" / "mps.sh"
CONTROL = """#!/bin/bash
# Stands for NVIDIA's daemon.
if [[ ${1:-} == -d ]]; then echo start >>"$RECORD"; exit; fi
read -r order && echo "$order" >>"$RECORD"
[[ $order == get_server_list ]] && cat "$TMPDIR/servers"
[[ $order == get_server_status* ]] && echo "${STATE:-ACTIVE}"
exit 0
"""


@pytest.fixture
def task(tmp_path: Path) -> dict[str, str]:
    """Return the environment of the second task of a job, with a daemon that records its orders."""
    tool = tmp_path / "nvidia-cuda-mps-control"
    tool.write_text(CONTROL)
    tool.chmod(0o755)
    (tmp_path / "servers").write_text("77\n")
    return {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RECORD": str(tmp_path / "record"),
        "TMPDIR": str(tmp_path),
        "SLURM_PROCID": "1",
        "WORKERS_PER_GPU": "3",
    }


def test_every_worker_has_its_rank_and_finds_the_daemon(
    task: dict[str, str], tmp_path: Path
) -> None:
    command = 'echo "$WORKER_RANK $APPTAINER_BIND" >"$TMPDIR/worker.$WORKER_RANK"'
    subprocess.run(["bash", str(MPS), "bash", "-c", command], env=task, check=True, timeout=LIMIT)
    lines = [path.read_text().split() for path in sorted(tmp_path.glob("worker.*"))]
    assert [rank for rank, _ in lines] == ["3", "4", "5"]
    assert len({folder for _, folder in lines}) == 1
    assert Path(task["RECORD"]).read_text().splitlines() == [
        "start",
        f"start_server -uid {os.getuid()}",
        "get_server_list",
        "get_server_status 77",
        "quit",
    ]
    assert not list(tmp_path.glob("mps-*"))


@pytest.mark.parametrize("why", ["no daemon", "the daemon does not serve"])
def test_without_mps_the_workers_run_plainly(
    why: str, task: dict[str, str], tmp_path: Path
) -> None:
    if why == "no daemon":
        (tmp_path / "nvidia-cuda-mps-control").write_text("#!/bin/bash\nexit 1\n")
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/bash\n[[ $1 == *compute_mode* ]] && echo Exclusive_Process\n")
    tool.chmod(0o755)
    command = 'echo "rank $WORKER_RANK ${CUDA_MPS_PIPE_DIRECTORY:-none}"'
    result = subprocess.run(
        ["bash", str(MPS), "bash", "-c", command],
        env={**task, "STATE": "FAULT"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.returncode == 0
    said = result.stdout.splitlines()
    assert "without NVIDIA MPS" in said[0]
    assert "exclusive compute mode: without MPS only one worker can use it" in said[1]
    assert sorted(said[2:]) == ["rank 3 none", "rank 4 none", "rank 5 none"]
    assert not list(tmp_path.glob("mps-*"))


def test_sigterm_while_mps_starts_begins_no_worker(task: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "servers").write_text("")  # none yet: the task waits for one
    command = ["bash", str(MPS), "touch", str(tmp_path / "worker")]
    process = subprocess.Popen(command, env=task)
    record = tmp_path / "record"
    wait_for(lambda: record.exists() and "get_server_list" in record.read_text())
    process.terminate()
    (tmp_path / "servers").write_text("77")
    assert process.wait(timeout=LIMIT) == 0
    assert not (tmp_path / "worker").exists()
    assert Path(task["RECORD"]).read_text().splitlines()[-1] == "quit"


def test_gpu_is_named_by_its_uuid_where_nvidia_smi_knows_it(
    task: dict[str, str], tmp_path: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    for answer, expected in (("echo GPU-aa-bb", "GPU-aa-bb"), ("echo failed; exit 9", "0")):
        tool.write_text(f"#!/bin/bash\n{answer}\n")
        tool.chmod(0o755)
        result = subprocess.run(
            ["bash", str(MPS), "bash", "-c", 'echo "$CUDA_VISIBLE_DEVICES"'],
            env={**task, "CUDA_VISIBLE_DEVICES": "0"},
            stdout=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
        )
        assert result.stdout.splitlines()[1:] == [expected] * 3


def test_status_of_a_failed_worker_is_kept(task: dict[str, str]) -> None:
    result = subprocess.run(
        ["bash", str(MPS), "bash", "-c", "exit $((WORKER_RANK == 4 ? 7 : 0))"],
        env=task,
        timeout=LIMIT,
    )
    assert result.returncode == 7


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_signal_reaches_every_worker_and_the_task_waits(
    number: signal.Signals, task: dict[str, str], tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys, time; from pathlib import Path\n"
        "me = Path(os.environ['TMPDIR']) / ('worker.' + os.environ['WORKER_RANK'])\n"
        f"signal.signal({int(number)}, lambda *_: (time.sleep(0.5), me.write_text('end'),"
        " os._exit(0)))\n"
        "me.write_text('ready')\n"
        "while True: time.sleep(0.1)\n"
    )
    process = subprocess.Popen(["bash", str(MPS), sys.executable, "-c", code], env=task)
    files = [tmp_path / f"worker.{rank}" for rank in (3, 4, 5)]
    wait_for(lambda: all(path.exists() and path.read_text() for path in files))
    process.send_signal(number)
    assert process.wait(timeout=LIMIT) == 0
    assert [path.read_text() for path in files] == ["end"] * 3
