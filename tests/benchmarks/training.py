"""How fast a machine trains: 12 configurations that span the search space, three ways to train.

    python tests/benchmarks/training.py               about ten minutes on two cores
    python tests/benchmarks/training.py --rounds 1    a first look

You should see the machine, one line per configuration, and a summary.  The columns:

    guide, eager, ours   images per second of the machine (training_arms.py says what they are)
    /guide, /eager       median over the rounds of ours against the other in the same round
    /core                ours against the guide's loop in one process per core
    %f32, %bf16          of the machine's own matrix product in that precision, measured beside it;
                         where ours takes bf16, the first may be over 100
    data                 gather and normalise, % of our step
    µs/step              of ours; on a GPU also against replaying the bare graph, and what the
                         capture costs, % of a trial of three epochs

On a CPU each way has all cores, in its own manner: the guide's loop and eager as one process with
a thread per core, which is what PyTorch does by itself; ours as one process per core with one
thread each, as the launch scripts start them (the trials of a study need not wait for each other).
Processes that run at once are timed together.  A round runs the ways one after the other for each
configuration.  "Noise" is ours against ours, measured twice in the same round: the band of chance.
Nothing else may run on the machine: threads that share one trial wait for the slowest.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "code_and_slurm-scripts")]

from hpo.train import mnist  # noqa: E402

NAMES = ("batch_size", "conv1_channels", "conv2_channels", "kernel1", "kernel2", "fc_dim")
PANEL = (
    (16, 8, 16, 3, 3, 64),
    (128, 8, 16, 3, 3, 64),
    (16, 16, 32, 5, 3, 128),
    (64, 16, 32, 3, 5, 128),
    (128, 32, 32, 5, 5, 256),
    (32, 32, 64, 3, 3, 256),
    (16, 32, 64, 5, 5, 128),
    (64, 64, 64, 7, 3, 512),
    (128, 16, 128, 3, 7, 64),
    (16, 64, 128, 3, 3, 512),
    (64, 64, 128, 5, 5, 256),
    (128, 64, 128, 7, 7, 512),
)
ARMS = ("guide", "core", "eager", "ours", "again")  # again: ours, for the noise
PER_CORE = ("core", "ours", "again")  # one process per core with one thread each
GOAL_FLOP = 2e10  # of one measured epoch on a CPU: a third of a second or more


class Arm:
    """One process, or one per core, that trains in one way, on request."""

    def __init__(self, way: str, on_gpu: bool) -> None:
        script = Path(__file__).with_name("training_arms.py")
        cores = len(os.sched_getaffinity(0))
        alone = on_gpu or way not in PER_CORE
        way = {"core": "guide", "again": "ours"}.get(way, way)
        self._processes = [
            subprocess.Popen(
                [sys.executable, str(script), way, str(cores if alone else 1)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(1 if alone else cores)
        ]

    def run(self, **request: Any) -> list[dict[str, float]]:
        """Train two epochs; return each process's seconds, and what else was asked for."""
        for process in self._processes:
            print(json.dumps(request), file=process.stdin, flush=True)
        return [json.loads(process.stdout.readline()) for process in self._processes]  # type: ignore[union-attr]

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.communicate()


def flop(config: dict[str, Any]) -> float:
    """Return the floating-point operations of training on one image."""
    conv1, conv2, fc_dim = config["conv1_channels"], config["conv2_channels"], config["fc_dim"]
    first: float = 28 * 28 * conv1 * config["kernel1"] ** 2
    rest: float = (
        14 * 14 * conv2 * conv1 * config["kernel2"] ** 2 + conv2 * 49 * fc_dim + fc_dim * 10
    )
    return 2.0 * (2 * first + 3 * rest)  # forward, weights' and inputs' gradient; images need none


def images_per_epoch(config: dict[str, Any], on_gpu: bool) -> int:
    """Return how many images to train on: all on a GPU, enough to measure on a CPU."""
    if on_gpu:
        return 50_000
    size = int(config["batch_size"])
    steps = max(4, round(GOAL_FLOP / flop(config) / size))
    return max(128, min(4000 // size, steps) * size)


def machine() -> tuple[str, bool]:
    """Return the machine in words, and whether it has a GPU."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}", True
    names = [n for n in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in n]
    name = names[0].split(":")[1].strip() if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}", False


def measure(config: dict[str, Any], rounds: int, arms: dict[str, Arm], on_gpu: bool) -> Any:
    """Return the rounds of one configuration: for each arm, images/s; then the parts of ours."""
    images = images_per_epoch(config, on_gpu)
    seen = images - images % config["batch_size"]  # the rest fills no batch
    results = []
    for number in range(rounds):
        # The order changes, so that no way always runs after the same other one.
        order = list(ARMS[number % len(ARMS) :] + ARMS[: number % len(ARMS)])
        answers = {
            name: arms[name].run(config=config, images=images, parts=name == "ours")
            for name in order
        }
        speed = {name: sum(seen / answer["epoch"] for answer in answers[name]) for name in ARMS}
        ours = answers["ours"][0]
        step = ours["epoch"] / (seen / config["batch_size"])
        speed |= {"step": step, "data": ours["data"] / step}
        for peak in ("peak f32", "peak bf16"):
            speed[peak] = seen / ours["epoch"] * flop(config) / ours[peak]
        speed["capture"] = (ours["first"] - ours["epoch"]) / (ours["first"] + 2 * ours["epoch"])
        speed["replay"] = step / ours.get("replay", math.nan)
        results.append(speed)
    return results


def median_ratio(results: list[dict[str, float]], other: str) -> float:
    """Return the median over the rounds of ours against `other` in the same round."""
    return statistics.median(row["ours"] / row[other] for row in results)


def print_row(config: tuple[int, ...], results: list[dict[str, float]], on_gpu: bool) -> None:
    """Print the medians of one configuration."""
    median = {key: statistics.median(row[key] for row in results) for key in results[0]}
    text = " ".join(f"{value:4}" for value in config)
    text += " ".join(f"{median[name]:9.0f}" for name in ("guide", "eager", "ours"))
    text += "".join(f" {median_ratio(results, name):7.2f}" for name in ("guide", "core", "eager"))
    text += f" {100 * median['peak f32']:6.0f} {100 * median['peak bf16']:6.0f}"
    text += f" {100 * median['data']:6.2f} {1e6 * median['step']:9.0f}"
    if on_gpu:
        text += f" {median['replay']:8.3f} {100 * median['capture']:8.2f}"
    print(text, flush=True)


def print_summary(table: list[list[dict[str, float]]]) -> None:
    """Print the geometric means and the band of chance."""
    others = {"guide": "the guide", "core": "the guide, a process per core", "eager": "eager"}
    for other, words in others.items():
        ratios = [median_ratio(results, other) for results in table]
        mean = statistics.geometric_mean(ratios)
        print(f"ours against {words}: {mean:.2f} × (geometric mean), least {min(ratios):.2f} ×")
    noise = [median_ratio(results, "again") for results in table]
    print(
        f"noise, ours against ours: {statistics.geometric_mean(noise):.2f} ×, "
        f"from {min(noise):.2f} × to {max(noise):.2f} ×"
    )


def main() -> None:
    """Measure the panel and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--configurations", type=int, default=len(PANEL), help="of the panel")
    options = parser.parse_args()
    mnist.prepare()  # in a fresh clone the images are packed
    name, on_gpu = machine()
    print(f"{name}; {options.rounds} rounds; load {os.getloadavg()[0]:.1f}")
    columns = "guide     eager      ours  /guide   /core  /eager   %f32  %bf16"
    print(f"bs   c1   c2   k1   k2   fc     {columns}", end="")
    print("  data%   µs/step" + ("  /replay  capture%" if on_gpu else ""))
    arms = {name: Arm(name, on_gpu) for name in ARMS}
    table = []
    for row in PANEL[: options.configurations]:
        config = {**dict(zip(NAMES, row, strict=True)), "lr": 1e-3}
        table.append(measure(config, options.rounds, arms, on_gpu))
        print_row(row, table[-1], on_gpu)
    print_summary(table)
    for arm in arms.values():
        arm.close()


if __name__ == "__main__":
    main()
