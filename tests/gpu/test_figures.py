"""On a GPU: the figures that README waits for.  The 500 trials run with the newest torch alone."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import optuna_mnist
import optuna_t5
from common import SMALL
from hpo.settings import forget
from hpo.train import mnist
from hpo.train.training import Trainer, fused_adam, pick_device

Run = Callable[..., str]
Row = Callable[[str], None]
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0}
LARGE = {"conv1_channels": 64, "conv2_channels": 128, "kernel1": 7, "kernel2": 7, "fc_dim": 512}


def seconds(step: Callable[[], object]) -> float:
    """Return how long a call takes, the GPU's work included."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def test_images_per_second(python: Run, row: Row) -> None:
    """Ours against the guide's loop, against eager, and a step against a bare replay."""
    said = python("../tests/benchmarks/training.py", "--rounds", "1", "--configurations", "4")
    print(said)
    for line in re.findall(r"ours against .*", said):
        row(line)
    columns = [line.split() for line in said.splitlines() if re.match(r" *\d+ +\d+ +\d+ +\d", line)]
    row(f"µs per step {[c[-3] for c in columns]}, × a bare replay {[c[-2] for c in columns]}")


@pytest.mark.parametrize("net", ["small", "large"])
def test_bf16_against_tf32_in_the_recorded_step(net: str, row: Row) -> None:
    config = {**SMALL, **(LARGE if net == "large" else {}), "num_classes": 10}
    data, _ = mnist.load_training(pick_device(), 50_000)
    taken = {}
    for bf16 in (False, True, False, True):
        model = optuna_mnist.CNN(config)
        model = model.to(pick_device(), memory_format=torch.channels_last)  # type: ignore[call-overload]
        trainer = Trainer(model, fused_adam(model, 1e-3), data, 128)
        trainer.bf16 = bf16
        trainer.train_epoch()
        taken[bf16] = seconds(trainer.train_epoch) / trainer.steps * 1e6
    row(f"TF32 {taken[False]:.0f} µs per step, bf16 {taken[True]:.0f}")


@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_trials_per_hour(workers: int, python: Run, row: Row) -> None:
    trials = "500" if workers == 1 and sys.version_info >= (3, 11) else "60"
    study = "../tests/benchmarks/study.py"
    said = python(study, "--trials", trials, WORKERS_PER_GPU=str(workers))
    row(said.splitlines()[-1])


def test_check_against_a_measured_trial(
    python: Run, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time within 2 ×, memory within 20 %: of a trial with the values that --check names."""
    said = python("optuna_mnist.py", "--check")
    print(said)
    time_said = re.search(r"about +([\d.]+) (s|min|h) per trial of \d+ epochs.*\n +(.*)", said)
    memory_said = re.search(r"^memory +about +([\d.]+) GB", said, re.MULTILINE)
    assert time_said, said
    assert memory_said, said
    values = dict(each.split("=") for each in time_said[3].split())
    config = {name: float(v) if name == "lr" else int(v) for name, v in values.items()}
    monkeypatch.delenv("TRAIN_IMAGES")
    forget()
    optuna_mnist.train_model({**config, "num_classes": 10})  # CUDA starts, cuDNN is loaded
    measured = seconds(lambda: optuna_mnist.train_model({**config, "num_classes": 10}))
    expected = float(time_said[1]) * UNITS[time_said[2]]
    free, total = torch.cuda.mem_get_info()
    row(f"time: said {expected:.2f} s, measured {measured:.2f} s")
    row(f"memory: said {memory_said[1]} GB, now in use {(total - free) / 1e9:.2f} GB")
    assert measured / 2 < expected < measured * 2


def test_largest_t5_takes_a_step(
    tiny_pairs: object, row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SMALL")
    config: dict[str, Any] = {
        **{"d_model": 1024, "num_layers": 24, "num_heads": 16, "d_kv": 64, "dropout": 0.1},
        **{"lr": 1e-5, "warmup": 0.1, "epochs": 1, "batch_size": 256, "micro_batch": 64},
    }
    model = optuna_t5.build_model(config).to(pick_device())
    optimizer = fused_adam(model, config["lr"])
    digits = range(10_000, 10_000 + 3 * config["batch_size"])
    training = [(str(n).encode(), b"x" * 61) for n in digits]  # 61: the longest
    torch.cuda.reset_peak_memory_stats()
    taken = seconds(lambda: optuna_t5.train_epoch(model, optimizer, training, config, 0, 0))
    row(f"{taken / 3:.2f} s per step, {torch.cuda.max_memory_reserved() / 1e9:.1f} GB reserved")
