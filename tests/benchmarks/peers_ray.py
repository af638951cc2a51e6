"""The trials of `peers.py` through Ray Tune: python peers_ray.py FOLDER LR LR …

Runs in the environment that peers.py makes.  The training function is the bundle's own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from peers import CONFIG

SCRIPTS = str(Path(__file__).resolve().parents[2] / "code_and_slurm-scripts")


def train(config: dict[str, Any]) -> None:
    """Train one configuration, in the process that Ray has made for it."""
    sys.path.insert(0, SCRIPTS)
    import torch
    from ray import tune  # type: ignore[import-not-found]

    import optuna_mnist

    torch.set_num_threads(1)
    tune.report({"loss": optuna_mnist.train_model(config)})


def main() -> None:
    """Run all trials, two at a time, and print how many have a result."""
    import ray
    from ray import tune

    rates = [float(text) for text in sys.argv[2:]]
    gpus = 0.5 if os.environ.get("CUDA_VISIBLE_DEVICES") else 0
    ray.init(num_cpus=2, include_dashboard=False)
    tuner = tune.Tuner(
        tune.with_resources(train, {"cpu": 1, "gpu": gpus}),
        param_space={**CONFIG, "num_classes": 10, "lr": tune.grid_search(rates)},
        tune_config=tune.TuneConfig(metric="loss", mode="min", max_concurrent_trials=2),
        run_config=tune.RunConfig(storage_path=sys.argv[1], verbose=0),
    )
    results = tuner.fit()
    print(f"{len(results) - results.num_errors} trials have a result")


if __name__ == "__main__":
    main()
