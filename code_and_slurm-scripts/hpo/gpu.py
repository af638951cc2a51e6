"""A GPU as Slurm, the launcher and the driver give it: which one it is, promised, or lost.

    python -m hpo.gpu      the GPUs that run-optuna-local.sh may use, one in each line

A GPU is its UUID.  Its number says nothing: where Slurm confines devices (ConstrainDevices=yes, the
usual setting) every task sees its own GPU as number 0.

Nothing here imports torch before it is needed.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from hpo.words import logger

# Exit statuses of a worker (hpo/worker.py), which hpo/job/keep_running.sh then starts again.
# CUDA of this process fails from now on (a device assert, an Xid): only a new one helps.
BROKEN = 70
NO_CAPTURE = 71  # the same after a failed capture; the new process shall not capture
NO_CUDA_GRAPHS = "NO_CUDA_GRAPHS"  # =1: training captures nothing; set by hpo/job/keep_running.sh
FAULTS = 3  # of the GPU under one trial, after which the trial itself is to blame
NO_GPU = ("", "-1", "NoDevFiles")  # CUDA_VISIBLE_DEVICES of those who want the CPU

log = logger("hpo.gpu")


class Unusable(BaseException):
    """This process cannot use its GPU: the trial goes back to the queue, and the worker ends.

    Not an `Exception`, so that no `except Exception` in an objective can swallow it.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message, status)
        self.status = status  # exit status of the worker

    def __str__(self) -> str:
        return str(self.args[0])


checked = False  # whether `check` has had its say
ending: Unusable | None = None  # why this process must take no further trial

# ---------- Which one ----------


def uuids() -> list[str]:
    """Return the UUID of each GPU that PyTorch sees, a slice's own for MIG; "" where unknown."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        own = str(getattr(properties, "uuid", ""))  # torch 2.4 or newer; for MIG, the whole GPU's
        own = "" if "MIG" in properties.name else own
        found.append(re.sub("^(GPU|MIG)-", "", own or _driver_uuid(index) or _listed(index)))
    return found


def _driver_uuid(index: int) -> str:
    """Ask the driver, without which there is no CUDA; one older than 470 does not know slices."""
    device, raw = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = (
            driver.cuInit(0)
            or driver.cuDeviceGet(ctypes.byref(device), index)
            or driver.cuDeviceGetUuid_v2(ctypes.byref(raw), device)
        )
    except (OSError, AttributeError):
        return ""
    return "" if failed else str(UUID(bytes=bytes(raw)))


def _listed(index: int) -> str:
    """Return an entry of CUDA_VISIBLE_DEVICES if it is a UUID; a bare number is no identity."""
    entries = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    entry = entries[index].strip() if index < len(entries) else ""
    return entry if entry.startswith(("GPU-", "MIG-")) else ""


def keep_own() -> None:
    """Put back the GPU that this process was given, where a script names another one.

    `os.environ["CUDA_VISIBLE_DEVICES"] = "0"` stands in many scripts: all workers would share that
    GPU, or it is somebody else's.  A choice among those given, or the CPU, is the script's affair.
    """
    given = _entries(_given("CUDA_VISIBLE_DEVICES"))
    mine = _entries(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if given and mine and not set(mine) <= set(given):
        text = ",".join(given)
        log.warning("the script names GPU %s; this worker has %s", ",".join(mine), text)
        os.environ["CUDA_VISIBLE_DEVICES"] = text


def _given(name: str) -> str:
    """Return a variable of the environment that this process was started with; "" without it."""
    with suppress(OSError):  # no Linux
        for entry in Path("/proc/self/environ").read_bytes().split(b"\0"):
            if entry.startswith(f"{name}=".encode()):
                return os.fsdecode(entry[len(name) + 1 :])
    return ""


def _entries(visible: str) -> list[str]:
    """Return the GPUs of a CUDA_VISIBLE_DEVICES; CUDA, too, reads up to the first that is none."""
    entries = [entry.strip() for entry in visible.split(",")]
    end = next((i for i, entry in enumerate(entries) if entry in NO_GPU), len(entries))
    return entries[:end]


# ---------- Promised, or lost ----------


def promised() -> str:
    """Return what promises a GPU to this process, as NAME=value; "" where nothing does."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        wants_cpu = visible.split(",")[0].strip() in NO_GPU
        return "" if wants_cpu else f"CUDA_VISIBLE_DEVICES={visible}"
    for name, none in (
        ("SLURM_STEP_GPUS", ""),
        ("SLURM_JOB_GPUS", ""),
        ("SLURM_GPUS_ON_NODE", "0"),
    ):
        if os.environ.get(name, none) not in ("", none):
            return f"{name}={os.environ[name]}"
    return ""


def has_cuda() -> bool:
    """Whether this PyTorch is built for GPUs; that of pip for an Arm machine is not."""
    import torch

    return bool(torch.version.cuda or torch.version.hip)


def trouble(index: int = 0) -> str:
    """Compute something on a GPU; return in one line why that fails, "" if it does not."""
    import torch

    try:
        torch.zeros(1, device=f"cuda:{index}").add_(1).item()
    except (RuntimeError, AssertionError) as error:  # the latter: torch without CUDA
        return str(error).splitlines()[0]
    return ""


def check(start: bool = False) -> None:
    """Once PyTorch is there: name the device in the log; a lost GPU is the worker's `ending`.

    Args:
        start: whether this process computes on its GPU itself; then that is tried.
    """
    global checked
    if checked or "torch" not in sys.modules:
        return
    checked = True
    import torch

    promise = promised()
    if promise and not has_cuda():
        log.warning("%s, but this PyTorch is one without CUDA: training on the CPU", promise)
    elif promise and (start or not torch.cuda.is_available()) and (why := trouble()):
        # Under MPS that may end: with the clients of a server that has met a fault.
        give_up(f"{promise}, but that GPU cannot be used: {why}", BROKEN if is_shared() else 1)
        return
    if not torch.cuda.is_available():
        log.info("device: the CPU, %d threads", torch.get_num_threads())
        return
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    each = [f"{name} ({uuid or 'UUID unknown'})" for name, uuid in zip(names, uuids(), strict=True)]
    log.info("device: %s", ", ".join(each))


def give_up(why: str, status: int) -> Unusable:
    """Let the worker end after this trial, with this status; return what ends the trial, too."""
    global ending
    ending = ending or Unusable(why, status)
    return ending


# ---------- An error that stays ----------


def is_shared() -> bool:
    """Whether workers share the GPU through MPS, where one's fault ends all (hpo/job/mps.sh)."""
    return bool(os.environ.get("CUDA_MPS_PIPE_DIRECTORY"))


def healthy() -> bool:
    """Whether CUDA of this process still works, or is not in use; gives unused memory back.

    After a device assert or an Xid every call fails, for as long as the process lives.
    """
    torch: Any = sys.modules.get("torch")
    try:
        # Nothing reserved: this process may have no context, which it need not get here.
        if torch and torch.cuda.is_initialized() and torch.cuda.memory_reserved():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        give_up(f"CUDA of this process has failed for good: {why}", BROKEN)
        return False
    return True


def is_to_blame(trial: Any) -> bool:
    """Whether a trial under which CUDA has failed for good is FAIL, or goes back to the queue.

    Under MPS a fault of one worker reaches all workers on its GPU, and none is told whose it was:
    so a trial is to blame that this has happened to FAULTS times.
    """
    if not is_shared():
        return True
    faults = int(trial.user_attrs.get("gpu_faults", 0)) + 1
    trial.set_user_attr("gpu_faults", faults)
    return faults >= FAULTS


# ---------- On a machine without Slurm ----------


def usable() -> list[str]:
    """Return the GPUs of this machine that a study may use, as CUDA_VISIBLE_DEVICES names them.

    Those of a preset CUDA_VISIBLE_DEVICES: the others belong to somebody else.  Otherwise all that
    nvidia-smi lists, the slices (MIG) of a GPU instead of the GPU.
    """
    preset = os.environ.get("CUDA_VISIBLE_DEVICES")
    if preset is not None:
        return _entries(preset)
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except FileNotFoundError:
        return []
    if listed.returncode:
        said = (listed.stdout + listed.stderr).strip() or f"status {listed.returncode}"
        print(f"nvidia-smi fails, so no GPU is used: {said.splitlines()[0]}", file=sys.stderr)
        return []
    found: list[tuple[str, list[str]]] = []  # a GPU and its slices
    for line in listed.stdout.splitlines():
        match = re.match(r"(\s*)(?:GPU|MIG).*\(UUID: (.+)\)", line)
        if match and match[1] and found:
            found[-1][1].append(match[2])
        elif match:
            found.append((match[2], []))
    return [name for gpu, slices in found for name in slices or [gpu]]


if __name__ == "__main__":
    for each in usable():
        print(each)
