"""The simulator of tests/benchmarks/search.py, its statistics, and the table that it rests on."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
import search
import search_finals
import search_peers
from search_problems import NAMES, TABLE
from search_simulator import FLOOR, simulate


class Bowl:
    """The lowest is at 0.3 on each of two axes; a value halves with each of five epochs."""

    name, full, best, typical = "bowl", 5, 0.0, 1.0

    def __init__(self) -> None:
        self.trained: list[dict[str, Any]] = []

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        config = {name: trial.suggest_float(name, 0, 1) for name in "ab"}
        self.trained.append(config)
        return config

    def curve(self, config: Mapping[str, Any], rng: np.random.Generator) -> list[float]:
        return [self.truth(config) + 0.5**epoch for epoch in range(self.full)]

    def truth(self, config: Mapping[str, Any]) -> float:
        return float(sum((value - 0.3) ** 2 for value in config.values()))

    def known(self) -> list[dict[str, Any]]:
        return [{"a": 0.3, "b": 0.3}]


def test_study_costs_its_budget_and_finds_the_best_of_what_it_has_trained() -> None:
    bowl = Bowl()
    found = simulate(bowl, search.RANDOM, 4, 20, seed=1)
    assert len(found) == 20
    # 20 full trainings of 5 epochs; the other three workers have one in hand.
    assert len(bowl.trained) in range(20, 20 + 4 + 1)
    assert found == sorted(found, reverse=True)
    regrets = [math.log(bowl.truth(config)) for config in bowl.trained]
    assert min(regrets) <= found[-1] <= sorted(regrets)[4]
    assert found[0] == math.log(bowl.typical)  # four begin, and none is complete yet
    assert simulate(Bowl(), search.RANDOM, 4, 20, seed=1) == found
    assert simulate(Bowl(), search.RANDOM, 4, 20, seed=2) != found


def test_pruned_trials_leave_their_epochs_to_others() -> None:
    trained = {}
    for name in ("old", "new"):
        bowl = Bowl()
        simulate(bowl, search.METHODS[name], 4, 20, seed=1)
        trained[name] = bowl.trained
        assert len({tuple(config.values()) for config in bowl.trained}) == len(bowl.trained)
    # Two epochs of five at least: the first rung is at step 1.
    assert 24 < len(trained["old"]) < 50 + 4
    assert 24 < len(trained["new"]) < 50 + 4


def test_a_peer_decides_what_is_trained_and_for_how_long() -> None:
    class Peer:
        """Trains the first to its end and all others once."""

        def __init__(self) -> None:
            self.reports: Counter[int] = Counter()

        def ask(self, number: int) -> search_peers.Job:
            config = {"a": 0.3, "b": 0.3} if number else {"b": 0.0, "a": 0.0}
            return search_peers.Job(number, config, until=1 if number else 5, token=None)

        def goes_on(self, job: search_peers.Job, value: float) -> bool:
            self.reports[job.number] += 1
            return job.reported < job.until

    space: dict[str, Any] = dict.fromkeys("ab", optuna.distributions.FloatDistribution(0, 1))
    peer = Peer()
    done = search_peers.trained_to_the_end(peer, Bowl(), space, workers=2, budget=4, seed=1)
    assert [(trial.number, trial.config) for trial in done] == [(0, {"a": 0.0, "b": 0.0})]
    assert list(done[0].config) == ["a", "b"]  # in the order of the space
    assert peer.reports.total() == 4 * Bowl.full
    assert set(peer.reports.values()) == {1, 5}
    assert len(peer.reports) == 1 + 15


def test_study_begins_with_what_is_known() -> None:
    assert simulate(Bowl(), {**search.RANDOM, "KNOWN": "1"}, 1, 5, seed=1) == [math.log(FLOOR)] * 5
    assert simulate(Bowl(), search.RANDOM, 1, 5, seed=1)[0] > math.log(FLOOR)


def test_speed_up_is_the_ratio_of_what_both_need_for_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search, "RESAMPLINGS", 100)
    budgets = np.arange(1.0, 101)
    slow = np.array([[-np.log(budgets)] * 10])
    fast = np.array([[-np.log(2 * budgets)] * 10])
    assert search.speed_up(fast, slow) == 2
    assert search.speed_up(slow, fast) == 0.5
    assert search.speed_up(slow, slow) == 1
    assert search.interval(fast, slow) == (2, 2)
    assert search.difference(fast, slow)[0] == pytest.approx(-math.log(2))
    rng = np.random.default_rng(0)
    noisy = fast + rng.normal(0, 1, (1, 10, 1))
    low, high = search.interval(noisy, slow)
    assert low < 2 < high
    assert search.difference(noisy, slow)[1] == pytest.approx(1 / math.sqrt(10), rel=0.5)
    lines = search.shown("title", {"random": slow, "old": slow, "new": fast}).splitlines()
    assert lines[-1].endswith("  2.0 (2.0 … 2.0)    2.0 (2.0 … 2.0)")
    # After half the budget it is where the other is after all of it.
    assert lines[-1].split()[:8] == ["new", "0.005", "-0.69", "±", "0.00", "+0.00", "±", "0.00"]


def test_final_runs_see_through_a_lucky_one_and_are_paid_for() -> None:
    class Luck(Bowl):
        def curve(self, config: Mapping[str, Any], rng: np.random.Generator) -> list[float]:
            lucky = rng.random() < 0.05
            return [self.truth(config) - 0.3 * lucky] * self.full

    finals = {**search.RANDOM, "FINAL_SEEDS": "5"}  # they cost 20 of the trainings
    found = {
        name: np.array([simulate(Luck(), method, 1, 60, seed) for seed in range(10)])
        for name, method in (("one run", search.RANDOM), ("finals", finals))
    }
    assert not found["finals"][:, :20].any()  # nothing is left for a search: no better than typical
    assert found["finals"][:, -1].mean() < found["one run"][:, 39].mean() - 0.5  # the same search


def test_final_runs_that_tell_nothing_new_cost_what_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_finals, "TRAININGS", (20, 30))
    monkeypatch.setattr(search, "problem_of", lambda name: Bowl())  # without noise
    found = np.array([search_finals.run((4, seed)) for seed in range(3)])
    for seed in range(3):
        alone = simulate(Bowl(), search.NEW, 4, 30, seed)
        assert found[seed, :, 0].tolist() == [alone[9] - alone[19], alone[19] - alone[29]]
    trials = found[..., 1]
    assert (trials[..., 0] < trials[..., 1]).all()
    assert trials[..., 1].min() > 30  # most trials are pruned
    mean = found[:, 0, 0].mean()
    assert search_finals.row(4, found).split()[:3] == ["4", f"{mean:+.2f}", "±"]


def test_the_table_of_curves_is_whole() -> None:
    with TABLE.open() as table:
        rows = list(csv.DictReader(table))
    curves = Counter(row["configuration"] for row in rows)
    assert len(curves) >= 300
    assert sum(number == 3 for number in curves.values()) >= 10
    assert len({(row["configuration"], row["seed"]) for row in rows}) == len(rows)
    for row in rows:
        assert all(0 < float(row[f"loss{epoch}"]) < 10 for epoch in range(1, 6))
        assert {name for name in NAMES if float(row[name]) <= 0} == set()
