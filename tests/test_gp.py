"""SAMPLER=gp learns from stopped trials, where their values are of the same kind."""

from __future__ import annotations

import math
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from hpo.search import samplers
from hpo.search.stopped import with_stopped
from hpo.settings import Settings

COMPLETE, PRUNED = TrialState.COMPLETE, TrialState.PRUNED
RANGE: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
AIM = 0.3


def ended(state: TrialState, x: float, reports: list[float], value: float | None) -> FrozenTrial:
    """Return a trial that has ended."""
    steps = dict(enumerate(reports))
    params: dict[str, Any] = {"x": x}
    return create_trial(
        state=state, params=params, distributions=RANGE, intermediate_values=steps, value=value
    )


def loss(x: float) -> float:
    """Return the loss after the last epoch."""
    return (x - AIM) ** 2


def suggested(direction: Any, reported_once: bool) -> list[float]:
    """Return five suggestions after sixteen stopped trials and one complete one, which is bad."""
    sign = 1.0 if direction == "minimize" else -1.0
    sampler = samplers.make_sampler(Settings.from_env(SAMPLER="gp", DIRECTION=direction), 1)
    study = optuna.create_study(direction=direction, sampler=sampler)
    for x in (n / 15 for n in range(16)):
        study.add_trial(ended(PRUNED, x, [sign * (1 + loss(x))], None))
    value = sign * (1 + loss(0.9))
    study.add_trial(ended(COMPLETE, 0.9, [value], value if reported_once else 7.0))
    found = []
    for _ in range(5):
        trial = study.ask()
        found.append(trial.suggest_float("x", 0, 1))
        study.tell(trial, sign * (1 + loss(found[-1])))
    return found


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_it_finds_the_place_that_stopped_trials_point_to(direction: str) -> None:
    assert all(abs(x - AIM) < 0.1 for x in suggested(direction, reported_once=True))


def test_values_of_another_kind_are_left_out() -> None:
    """The complete trial returns what it has never reported: stopped trials say nothing then."""
    assert not all(abs(x - AIM) < 0.1 for x in suggested("minimize", reported_once=False))
    trials = [ended(PRUNED, 0.1, [1.0], None), ended(COMPLETE, 0.2, [1.0, 0.8], 0.9)]
    assert with_stopped(trials, 1.0) == trials
    trials[1] = ended(COMPLETE, 0.2, [1.0, 0.8], 1.0)  # the best of its reports
    assert with_stopped(trials, -1.0) != trials


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_stopped_trial_gains_what_complete_ones_have_gained_since(sign: float) -> None:
    """And one that has diverged is as bad as the worst that has not, or 20 times the median."""
    whole = [[1.0, 0.4], [1.2, 0.8], [0.9, 0.5]]
    trials = [ended(COMPLETE, 0.1, [sign * v for v in row], sign * row[1]) for row in whole]
    stopped = [[0.7], [1.0, 0.9], [1.0, 0.9, 1.0], [math.inf], [math.nan], []]
    trials += [ended(PRUNED, 0.2, [sign * v for v in row], None) for row in stopped]
    found = [trial.value for trial in with_stopped(trials, sign)]
    assert found[:3] == [sign * row[1] for row in whole]
    assert found[3:] == [pytest.approx(sign * v) for v in (0.3, 0.9, 1, 1, 1)] + [None]
    assert [trial.state for trial in trials[3:]] == [PRUNED] * 6  # the study's own are as they were
    far = with_stopped([*trials, ended(PRUNED, 0.2, [sign * 1e30], None)], sign)[-1]
    assert far.value == pytest.approx(sign * (0.3 + 20 * (0.8 - 0.3)))


def test_where_half_of_all_are_best_the_others_still_differ() -> None:
    trials = [ended(COMPLETE, 0.1, [0.0], 0.0) for _ in range(5)]
    trials += [ended(PRUNED, 0.2, [value], None) for value in (1.0, 2.0, math.nan)]
    assert [t.value for t in with_stopped(trials, 1.0)][5:] == [1.0, 2.0, 2.0]


def test_with_constraints_it_is_as_in_optuna() -> None:
    study = optuna.create_study()
    for bound in (-1.0, 1.0):
        trial = study.ask(RANGE)
        trial.report(1.0, 0)
        trial.set_constraint("bound", bound)
        study.tell(trial, 1.0)
    study.add_trial(ended(PRUNED, 0.1, [2.0], None))
    assert with_stopped(study.trials, 1.0)[2].state == PRUNED


def test_without_a_complete_trial_the_last_report_counts() -> None:
    none = [ended(PRUNED, 0.1, [math.nan], None)]
    assert [trial.value for trial in with_stopped(none, 1.0)] == [math.inf]
    trials = [ended(PRUNED, 0.1, [2.0, 1.5], None), ended(PRUNED, 0.1, [math.nan], None)]
    assert [trial.value for trial in with_stopped(trials, 1.0)] == [1.5, 1.5]


def test_trials_that_report_nothing_change_nothing() -> None:
    trials = [ended(COMPLETE, 0.2, [], 0.9), ended(PRUNED, 0.1, [], None)]
    assert with_stopped(trials, 1.0) == trials


def test_diverged_trials_do_not_end_the_search() -> None:
    """All that is known has diverged, then a part of it."""
    sampler = samplers.make_sampler(Settings.from_env(SAMPLER="gp"), 1)
    study = optuna.create_study(sampler=sampler)
    for n in range(12):
        study.add_trial(ended(PRUNED, n / 11, [math.nan], None))
    for _ in range(2):
        trial = study.ask()
        assert 0 <= trial.suggest_float("x", 0, 1) <= 1
        study.tell(trial, state=TrialState.FAIL)
        study.add_trial(ended(COMPLETE, AIM, [1.0], 1.0))
