"""A GPU is its UUID; one that was promised and is lost is no CPU.  With stand-ins for CUDA."""

from __future__ import annotations

import pytest

from fake_cuda import FakeCuda, FakeDriver
from hpo import gpu

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
