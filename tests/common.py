"""Names that several tests use."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

BUNDLE = Path(__file__).resolve().parent.parent
SCRIPTS = BUNDLE / "code_and_slurm-scripts"
# Every environment variable that changes what the bundle does.
SETTINGS = (
    *("STUDY_DB", "STUDY_NAME", "TOTAL_TRIALS", "PY_SCRIPT", "DIRECTION", "SAMPLER", "PRUNER"),
    *("SEED", "TRAIN_IMAGES", "WORKER_RANK", "SLURM_PROCID", "SLURM_JOB_ID", "CONTAINER"),
    *("WORKERS_PER_GPU", "DRAIN_FILE"),
    *("KEEP_BEST", "OBJECTIVES", "LEASE_GRACE", "SLURM_JOB_END_TIME", "ALIVE_JOBS"),
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

Run: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]
