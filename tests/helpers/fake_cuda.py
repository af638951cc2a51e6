"""Stands for torch.cuda and NVIDIA's driver on a machine without a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
import torch

from hpo import gpu


class FakeCuda:
    """One GPU that computes, with a name and, from torch 2.4 on, a UUID."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, uuid: str = "") -> None:
        self.properties = SimpleNamespace(name=name, **({"uuid": uuid} if uuid else {}))
        patch.setattr(torch.version, "cuda", "12.1")
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "get_device_name", lambda index=0: name)
        patch.setattr(torch.cuda, "get_device_properties", lambda index: self.properties)
        patch.setattr(gpu, "trouble", lambda index=0: "")


class FakeDriver:
    """Stands for libcuda.so.1: the functions that hpo/gpu.py calls."""

    def __init__(self, patch: pytest.MonkeyPatch, uuid: str, fails: bool = False) -> None:
        self.uuid, self.fails = UUID(uuid), fails
        patch.setattr(ctypes, "CDLL", self.load)
        self.cuInit: Callable[[int], bool] = lambda flags: self.fails

    def load(self, name: str) -> FakeDriver:
        """Return the library; there is no other."""
        assert name == "libcuda.so.1"
        return self

    def cuDeviceGet(self, device: Any, index: int) -> int:
        """Give the device of a number."""
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetUuid_v2(self, raw: Any, device: ctypes.c_int) -> int:
        """Give its UUID, 16 bytes."""
        assert device.value == 40
        raw._obj[:] = self.uuid.bytes
        return 0
