"""A GPU is its UUID; one that was promised and is lost is no CPU.  With stand-ins for CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import SCRIPTS, Run
from fake_cuda import FakeCuda, FakeDriver
from hpo import gpu
from hpo.settings import Settings
from hpo.study.opening import open_study

UUID = "0123abcd-0000-1111-2222-333344445555"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test see a process that has not looked at its GPU yet."""
    monkeypatch.setattr(gpu, "checked", False)
    monkeypatch.setattr(gpu, "ending", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("name", "own", "visible", "expected"),
    [
        ("A100", "aa-bb", "0", "aa-bb"),  # torch 2.4 and newer
        ("A100", "", "0", UUID),  # torch 2.3: the driver
        ("A100 MIG 3g.40gb", "aa-bb", "0", UUID),  # not that of the whole GPU
    ],
)
def test_uuid(
    name: str, own: str, visible: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    FakeCuda(monkeypatch, name, own)
    FakeDriver(monkeypatch, UUID)
    assert gpu.uuids() == [expected]


@pytest.mark.parametrize(
    ("visible", "expected"),
    [("MIG-aa-bb", "aa-bb"), ("GPU-aa-bb", "aa-bb"), ("0", ""), ("", "")],
)
def test_uuid_where_the_driver_does_not_say(
    visible: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    FakeCuda(monkeypatch, "A100")
    FakeDriver(monkeypatch, UUID, fails=True)
    assert gpu.uuids() == [expected]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("CUDA_VISIBLE_DEVICES", "0,1", True),
        ("CUDA_VISIBLE_DEVICES", "GPU-aa", True),
        ("CUDA_VISIBLE_DEVICES", "", False),
        ("CUDA_VISIBLE_DEVICES", "-1", False),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles", False),
        ("SLURM_STEP_GPUS", "0", True),
        ("SLURM_JOB_GPUS", "0,1", True),
        ("SLURM_GPUS_ON_NODE", "2", True),
        ("SLURM_GPUS_ON_NODE", "0", False),
    ],
)
def test_promised(name: str, value: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.promised() == ""
    monkeypatch.setenv(name, value)
    assert gpu.promised() == (f"{name}={value}" if expected else "")


# ---------- Workers, with a module that stands for torch ----------

SCRIPT = """
import os, sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from hpo import gpu
from hpo.settings import run_script
from hpo.worker import run_worker

ASSERT = "CUDA error: device-side assert triggered"
marker = Path(os.environ["MARKER"])  # there, once CUDA has failed

class Cuda:
    broken = False
    is_available = is_initialized = lambda self: True
    device_count = memory_reserved = lambda self: 1
    get_device_name = lambda self, index: "Fake A100"
    get_device_properties = lambda self, index: SimpleNamespace(name="Fake A100", uuid="aa-bb")
    empty_cache = lambda self: None
    def synchronize(self):
        if self.broken:
            raise RuntimeError(ASSERT)

torch = sys.modules["torch"] = ModuleType("torch")
torch.cuda, torch.version = Cuda(), SimpleNamespace(cuda="12.1", hip=None)

def search_space(trial):
    return {"x": trial.suggest_float("x", -1, 1)}

def objective(trial):
    x = search_space(trial)["x"]
    fails = os.environ["FAILS"] if trial.number == 1 else ""
    if fails == "capture" and "NO_CUDA_GRAPHS" not in os.environ:
        raise gpu.give_up("a capture has failed", gpu.NO_CAPTURE)
    if fails == "always" or (fails == "once" and not marker.exists()):
        marker.touch()
        torch.cuda.broken = True
        raise RuntimeError(ASSERT)
    return x ** 2

if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a script whose trial 1 meets what FAILS says."""
    path = tmp_path / "my.py"
    path.write_text(SCRIPT)
    settings = {"PYTHONPATH": str(SCRIPTS), "MARKER": str(tmp_path / "marker"), "SAMPLER": "random"}
    for name, value in {**settings, "TOTAL_TRIALS": "4"}.items():
        monkeypatch.setenv(name, value)
    return path


def keep_running(script: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a worker as the jobs do, until it is not started again."""
    return subprocess.run(
        ["bash", str(SCRIPTS / "hpo" / "job" / "keep_running.sh"), str(script), sys.executable],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


def states() -> list[str]:
    """Return the states of the study's trials."""
    return [trial.state.name for trial in open_study(Settings.from_env()).get_trials()]


def test_error_that_stays_costs_its_trial_and_a_start(script: Path) -> None:
    result = keep_running(script, FAILS="once")
    assert result.returncode == 0, result.stdout
    assert states() == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    failed = open_study(Settings.from_env()).get_trials()[1]
    assert failed.user_attrs["fail_reason"].endswith("CUDA error: device-side assert triggered")
    assert "CUDA of this process has failed for good" in result.stdout
    assert "starting it again (1 of 3)" in result.stdout
    assert result.stdout.count("device: Fake A100 (aa-bb)") == 2  # once by each process


@pytest.mark.parametrize(("fails", "state"), [("once", "COMPLETE"), ("always", "FAIL")])
def test_fault_under_mps_may_be_anothers(fails: str, state: str, script: Path) -> None:
    result = keep_running(script, FAILS=fails, CUDA_MPS_PIPE_DIRECTORY="/tmp/mps")
    assert result.returncode == 0, result.stdout
    assert states() == ["COMPLETE", state, "COMPLETE", "COMPLETE"]
    assert result.stdout.count("trial 1 back to the queue") == (1 if fails == "once" else 2)


def test_failed_capture_is_no_failed_trial_and_happens_once(script: Path) -> None:
    result = keep_running(script, FAILS="capture")
    assert result.returncode == 0, result.stdout
    assert states() == ["COMPLETE"] * 4
    assert result.stdout.count("a capture has failed") == 1
    assert "trial 1 back to the queue" in result.stdout


def test_lost_gpu_is_no_cpu(run: Run) -> None:
    result = run("optuna_mnist.py", TOTAL_TRIALS="1", CUDA_VISIBLE_DEVICES="99")
    assert result.returncode == 1, result.stdout
    assert "CUDA_VISIBLE_DEVICES=99, but that GPU cannot be used: " in result.stdout
    assert states() == []
    result = run("optuna_mnist.py", TOTAL_TRIALS="1", CUDA_VISIBLE_DEVICES="-1", PRUNER="none")
    assert result.returncode == 0, result.stdout
    assert result.stdout.count("device: the CPU") == 1


@pytest.mark.parametrize(
    ("given", "named", "used"),
    [("2", "0", "2"), ("2, 3", "0,3", "2,3"), ("2,3", "3", "3"), ("2", "", ""), (None, "0", "0")],
)
def test_a_script_that_names_another_gpu_has_its_own(
    given: str | None, named: str, used: str, run: Run, tmp_path: Path
) -> None:
    env = {"CUDA_VISIBLE_DEVICES": given} if given else {}
    name, script = "os.environ['CUDA_VISIBLE_DEVICES']", tmp_path / "my.py"
    script.write_text(f"import os; {name} = '{named}'; import hpo.worker; print({name})")
    result = run(script, PYTHONPATH=str(SCRIPTS), **env)
    assert result.stdout == f"{used}\n"
    assert ("this worker has" in result.stderr) == (used != named)


# ---------- On a machine without Slurm ----------

LISTED = """GPU 0: NVIDIA A100 (UUID: GPU-aa)
GPU 1: NVIDIA A100 (UUID: GPU-bb)
  MIG 3g.40gb     Device  0: (UUID: MIG-11)
  MIG 3g.40gb     Device  1: (UUID: MIG-22)
"""


@pytest.mark.parametrize(
    ("preset", "status", "expected"),
    [
        (None, 0, ["GPU-aa", "MIG-11", "MIG-22"]),
        (None, 9, []),
        ("2,3", 0, ["2", "3"]),
        ("GPU-bb, MIG-11", 9, ["GPU-bb", "MIG-11"]),
        ("1,-1,0", 0, ["1"]),
        ("", 0, []),
        ("-1", 0, []),
    ],
)
def test_gpus_that_a_study_on_this_machine_may_use(
    preset: str | None,
    status: int,
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = tmp_path / "nvidia-smi"
    says = "No driver" if status else LISTED
    tool.write_text(f"#!/bin/bash\ncat <<'END'\n{says}\nEND\nexit {status}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    if preset is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", preset)
    assert gpu.usable() == expected
    said = "nvidia-smi fails, so no GPU is used: No driver\n"
    assert capsys.readouterr().err == (said if preset is None and status else "")
