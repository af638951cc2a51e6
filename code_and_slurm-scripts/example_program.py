"""The program that optuna_command.py optimises, until you name your own there.

    python example_program.py --lr 0.1 --degree 5 --epochs 20

It fits a polynomial to a noisy sine, with nothing but Python, and knows nothing of Optuna.  What
makes it a good program for a study: it prints its metric after each epoch, and with --folder it
goes on where it was stopped.
"""

import argparse
import json
import math
import os
import random
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--degree", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to go on after an interruption")
    options = parser.parse_args()

    points = noisy_sine(16_000)
    training, validation = points[:15_000], points[15_000:]
    done, weights = 0, [0.0] * (options.degree + 1)
    saved = options.folder and options.folder / "weights.json"
    if saved and saved.exists():
        done, weights, loss = json.loads(saved.read_text())
        tell(done, loss)  # again: it may have been ended right after it was saved
    for epoch in range(done + 1, options.epochs + 1):
        random.Random(f"{options.seed} {epoch}").shuffle(training := sorted(training))
        for x, y in training:
            error = predict(weights, x) - y
            weights = [w - options.lr * error * x**power for power, w in enumerate(weights)]
        loss = sum((predict(weights, x) - y) ** 2 for x, y in validation) / len(validation)
        if saved:  # before the metric is printed: whoever reads that may end the program
            new = saved.with_suffix(".new")
            new.write_text(json.dumps([epoch, weights, loss]))
            os.replace(new, saved)  # never half written
        tell(epoch, loss)


def tell(epoch: int, loss: float) -> None:
    """Print the metric, at once."""
    print(f"epoch {epoch}: validation loss {loss}", flush=True)


def noisy_sine(number: int) -> list[tuple[float, float]]:
    """Return points (x, sin(3x) + noise), −1 ≤ x ≤ 1."""
    draw = random.Random(0)
    xs = [draw.uniform(-1, 1) for _ in range(number)]
    return [(x, math.sin(3 * x) + draw.gauss(0, 0.1)) for x in xs]


def predict(weights: list[float], x: float) -> float:
    """Return the value of the polynomial with these coefficients at x."""
    return sum(weight * x**power for power, weight in enumerate(weights))


if __name__ == "__main__":
    main()
