"""Names that several tests use."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from hpo.settings import VARIABLES

BUNDLE = Path(__file__).resolve().parent.parent.parent
HELPERS = BUNDLE / "tests" / "helpers"
SCRIPTS = BUNDLE / "code_and_slurm-scripts"
# Every environment variable that changes what the bundle does.
SETTINGS = (
    *(variable.name for variable in VARIABLES),
    *("WORKER_RANK", "WORKER_TOKEN", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"),
    *("CONTAINER", "BINDS", "CHAIN_JOBS", "DRAIN_FILE", "SLURM_JOB_END_TIME", "ALIVE_JOBS"),
    *("NO_CUDA_GRAPHS", "SLURM_JOB_USER", "JOB_SETTINGS"),
    *("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE", "CUDA_MPS_PIPE_DIRECTORY"),
)
# The smallest net of the search space, for tests that train: 0.2 s an epoch on 1 000 images.
SMALL = {
    "lr": 1e-3,
    "batch_size": 64,
    "conv1_channels": 8,
    "conv2_channels": 16,
    "kernel1": 3,
    "kernel2": 3,
    "fc_dim": 64,
    "epochs": 3,
}
# A transformer for tests: 0.1 s an epoch on the 200 pairs of the fixture tiny_pairs.
TINY_T5 = {
    "d_model": 32,
    "num_layers": 1,
    "num_heads": 2,
    "lr": 5e-3,
    "dropout": 0.0,
    "warmup": 0.1,
    "d_kv": 16,
    "epochs": 3,
    "batch_size": 32,
    "micro_batch": 32,
}

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]
LIMIT = 600.0  # seconds: only a test that fails waits so long, however busy the machine is


def wait_for(condition: Callable[[], Any]) -> None:
    """Wait for what must happen."""
    end = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
