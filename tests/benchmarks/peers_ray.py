"""The trials of `peers.py` through Ray Tune: python peers_ray.py guide|ours FOLDER LR LR …

Runs in the environment that peers.py makes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from peers import CONFIG

HERE = Path(__file__).resolve().parent
SCRIPTS = HERE.parents[1] / "code_and_slurm-scripts"


def train_ours(config: dict[str, Any]) -> None:
    """Train one configuration with the bundle's loop, in the process that Ray has made for it."""
    sys.path.insert(0, str(SCRIPTS))
    import torch
    from ray import tune  # type: ignore[import-not-found]

    import optuna_mnist

    torch.set_num_threads(1)
    tune.report({"loss": optuna_mnist.train_model(config)})


def train_guide(config: dict[str, Any]) -> None:
    """Train one configuration with the guide's loop, and spare Ray the validation."""
    sys.path.insert(0, str(HERE))
    import torch
    from ray import tune
    from training_arms import guide

    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    epoch = guide(config, int(os.environ["TRAIN_IMAGES"]), device)
    losses = [epoch() for _ in range(config["epochs"])]
    tune.report({"loss": losses[-1]})


def main() -> None:
    """Run all trials, two at a time, and print how many have a result."""
    import ray
    from ray import tune

    loop, folder, *rates = sys.argv[1:]
    train = {"ours": train_ours, "guide": train_guide}[loop]
    gpus = 0.5 if os.environ.get("CUDA_VISIBLE_DEVICES") else 0
    ray.init(num_cpus=2, include_dashboard=False)
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1, "gpu": gpus}),
        param_space={**CONFIG, "num_classes": 10, "lr": tune.grid_search([*map(float, rates)])},
        tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=folder, verbose=0),
    )
    results = tuner.fit()
    print(f"{len(results) - results.num_errors} trials have a result")


if __name__ == "__main__":
    main()
