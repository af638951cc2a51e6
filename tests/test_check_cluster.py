"""The preflight with several tasks on this one host; for several, see tests/cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import check_cluster
from check_cluster import BAD, OK, REMARK
from common import SCRIPTS, Run
from fake_cuda import FakeCuda
from hpo import gpu
from hpo.job.meeting import Facts, Meeting
from hpo.settings import forget


def start(rank: int, tasks: int, **env: str) -> subprocess.Popen[str]:
    """Start one task of a job."""
    names = {"SLURM_PROCID": str(rank), "SLURM_NTASKS": str(tasks), "SLURM_JOB_ID": "5"}
    return subprocess.Popen(
        [sys.executable, str(SCRIPTS / "check_cluster.py")],
        env={**os.environ, **names, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_tasks_meet_and_task_0_prints_the_table(own_study: Path) -> None:
    tasks = [start(rank, 4) for rank in range(4)]
    output = [task.communicate(timeout=600)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, output
    assert output[1:] == ["", "", ""]
    for line in ("✓ folder    4 tasks on 1 hosts", "100 of 100 increments", "✓ data", "✓ packages"):
        assert line in output[0]
    assert list(own_study.parent.iterdir()) == []  # nothing is left behind


def test_by_hand_without_slurm(run: Run) -> None:
    result = run("check_cluster.py")
    assert result.returncode == 0, result.stdout
    assert "one host only" in result.stdout


def facts(**changes: object) -> Facts:
    """Return what a task on host a sees, changed."""
    packages = {"optuna": "5.0.0", "torch": "2.3.0", "torchvision": "0.18.0"}
    plain = {"host": "a", "folder": 1, "packages": packages, "free": 10**12, "data": ""}
    gpus = {"gpus": ["A100"], "uuids": ["a-0"], "trouble": "", "cpu_torch": False}
    return {**plain, **gpus, **changes}


def test_gpus() -> None:
    assert check_cluster.gpus({0: facts(), 1: facts(uuids=["a-1"])}).mark == OK
    assert check_cluster.gpus({0: facts(), 1: facts(), 2: facts(host="b")}).found == (
        "tasks [0, 1] share one"
    )
    assert check_cluster.gpus({0: facts(), 1: facts(gpus=[], uuids=[])}).mark == BAD
    assert check_cluster.gpus({0: facts(gpus=[], uuids=[])}).mark == REMARK  # the CPU is wanted
    row = check_cluster.gpus({0: facts(uuids=[""]), 1: facts(uuids=[""])})
    assert (row.mark, "UUIDs are not known" in row.found) == (REMARK, True)
    row = check_cluster.gpus({0: facts(), 1: facts(host="b", trouble="CUDA error: Xid")})
    assert (row.mark, row.found) == (BAD, "tasks [1] cannot use theirs, on b: CUDA error: Xid")


@pytest.mark.parametrize("number", ["0", "1"])
def test_number_of_a_gpu_says_nothing(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Slurm confines devices, every task sees its own GPU as number 0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", number)
    FakeCuda(monkeypatch, "NVIDIA A100", uuid="aa-bb")
    first = facts(**check_cluster.gpu_facts())
    FakeCuda(monkeypatch, "NVIDIA A100", uuid="cc-dd")
    other = facts(**check_cluster.gpu_facts())
    assert check_cluster.gpus({0: first, 1: other}).mark == OK
    assert check_cluster.gpus({0: first, 1: first}).found == "tasks [0, 1] share one"


def test_gpu_that_cannot_start_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    FakeCuda(monkeypatch, "NVIDIA A100", uuid="aa-bb")
    for name in ("get_device_name", "get_device_properties"):

        def fail(index: int) -> None:
            raise RuntimeError("CUDA error: unknown error\nCompile with …")

        monkeypatch.setattr(torch.cuda, name, fail)
        assert check_cluster.gpu_facts()["trouble"] == "CUDA error: unknown error"


def test_gpu_that_slurm_has_promised_and_that_is_not_there_is_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert check_cluster.gpus({0: facts(**check_cluster.gpu_facts())}).mark == REMARK
    monkeypatch.setattr(gpu, "trouble", lambda index: "no NVIDIA driver")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    row = check_cluster.gpus({0: facts(**check_cluster.gpu_facts())})
    assert (row.mark, row.found) == (BAD, "tasks [0] cannot use theirs, on a: no NVIDIA driver")
    monkeypatch.setattr(torch.version, "cuda", None)  # the rehearsal's PyTorch
    row = check_cluster.gpus({0: facts(**check_cluster.gpu_facts())})
    assert (row.mark, "PyTorch is one without CUDA" in row.found) == (REMARK, True)


def test_packages() -> None:
    old = {"optuna": "4.9.0", "torch": "2.3.0", "torchvision": "0.18.0"}
    assert check_cluster.versions({0: facts()}).mark == OK
    assert check_cluster.versions({0: facts(), 1: facts(packages=old)}).mark == BAD
    row = check_cluster.versions({0: facts(packages=old)})
    assert (row.mark, "optuna==5.0.0" in row.cure) == (BAD, True)


def test_folder_data_and_disk() -> None:
    assert check_cluster.shared_folder({0: facts(), 1: facts(folder=2)}, 2).mark == BAD
    missing = check_cluster.shared_folder({0: facts()}, 2)
    assert (missing.mark, "tasks [1] have not come" in missing.found) == (BAD, True)
    row = check_cluster.data({0: facts(data="x.gz is damaged")})
    assert (row.mark, row.cure) == (BAD, "x.gz is damaged")
    assert check_cluster.disk({0: facts(), 1: facts(free=10**6)}).mark == BAD


def test_counter_that_loses_increments_is_found(tmp_path: Path) -> None:
    meeting = Meeting(tmp_path / "meeting", 0, 1)
    assert check_cluster.counter(meeting, {0: facts()}).mark == OK
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check_cluster, "increment", lambda path: 25)
        other = Meeting(tmp_path / "other", 0, 1)
        row = check_cluster.counter(other, {0: facts()})
        assert row.found == "0 of 25 increments by 1 tasks arrived; the nodes' file caches differ"


def test_counter_is_closed_by_who_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is counted: see the comment there."""
    opened: list[str] = []

    def look(path: Path) -> int:
        links = (os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())
        opened.extend(link for link in links if "counter.db" in link)
        return count(path)

    count = check_cluster.increment
    monkeypatch.setattr(check_cluster, "increment", look)
    meeting = Meeting(tmp_path / "meeting", 0, 1)
    assert check_cluster.counter(meeting, {0: facts()}).found.startswith("25 of 25 increments")
    assert opened == []


def test_slow_is_not_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer increments, a task that has not finished, and one that comes too late."""
    monkeypatch.setattr(check_cluster, "COUNT_SECONDS", 0.0)
    row = check_cluster.counter(Meeting(tmp_path / "slow", 0, 1), {0: facts()})
    assert (row.mark, row.found) == (
        OK,
        "1 of 1 increments by 1 tasks arrived; slow: no more in 0 s",
    )

    monkeypatch.setattr("hpo.job.meeting.PATIENCE", 0.1)
    both = {0: facts(), 1: facts(host="b")}
    for check in (check_cluster.locks, check_cluster.counter):
        row = check(Meeting(tmp_path / check.__name__, 0, 2), both)
        assert row.mark == BAD
        assert row.found == "not finished within 60 s by tasks [1] on b: slow, not broken"
        assert "served by one process" in row.cure


def test_a_task_that_comes_too_late_is_told_so(
    own_study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the folder is there as long as it may be at work in it."""
    monkeypatch.setattr(check_cluster, "ARRIVAL", 0.1)
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_USER": "ann", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert check_cluster.main() == 1
    said = capsys.readouterr()
    assert "tasks [1] have not come within 0 s" in said.out
    assert "sbatch --exclude=NODE" in said.out
    assert own_study.with_name(".check_cluster-7@ann").exists()
    monkeypatch.setenv("SLURM_PROCID", "1")
    forget()
    assert check_cluster.main() == 0
    said = capsys.readouterr()
    assert "task 1 on" in said.err
    assert "came after the others had waited" in said.err
    assert list(own_study.parent.iterdir()) == []


def test_a_task_that_sees_another_folder_says_so(
    own_study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check_cluster, "ARRIVAL", 0.1)
    for name, value in {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}.items():
        monkeypatch.setenv(name, value)
    assert check_cluster.main() == 0
    assert f"met only tasks [1] in {own_study.parent}" in capsys.readouterr().err
