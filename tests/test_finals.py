"""FINAL_SEEDS: the last trials run the best again, exactly, and the search does not see them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

import check_best_model
import known_for_tests
from common import wait_for
from hpo.search.given import FinalsAreWhole, GivenFirst
from hpo.settings import Settings, UserError, forget
from hpo.show import facts
from hpo.show.figures.pictures import pictures_of
from hpo.show.results import chosen_trial
from hpo.study.opening import create_or_open_study, open_study
from hpo.study.trials import FINAL_OF, best_line, best_searched, count, is_final, limit, to_keep
from storage_helpers import kill, wait


def trials() -> list[FrozenTrial]:
    """Return the trials of the test's study."""
    forget()
    return open_study(Settings.from_env()).get_trials()


def test_a_storm_of_kills_in_the_search_and_in_the_final_runs(
    monkeypatch: pytest.MonkeyPatch, own_study: Path, tmp_path: Path
) -> None:
    other = known_for_tests.other_study(tmp_path / "old.db", [0.1, 5.0, -0.2, 0.3, 0.4, 0.6])
    for name, value in (
        *(("TOTAL_TRIALS", "40"), ("FINAL_SEEDS", "3"), ("LEASE_GRACE", "1")),
        ("FROM_STUDY", other),
        *(("SAMPLER", "random"), ("EPOCH", "0.05"), ("MAX_ATTEMPTS", "999")),
    ):
        monkeypatch.setenv(name, value)
    dice = random.Random(1)
    pids = [known_for_tests.start(rank) for rank in range(4)]

    def storm(kills: int) -> None:
        for _ in range(kills):
            time.sleep(dice.uniform(0, 0.15))
            victim = dice.randrange(4)
            if os.waitpid(pids[victim], os.WNOHANG) == (0, 0):
                kill(pids[victim])
            pids[victim] = known_for_tests.start(victim)

    wait_for(own_study.exists)
    storm(10)
    wait_for(lambda: any(map(is_final, trials())))
    storm(6)
    assert wait(pids) == [0] * 4
    found = trials()
    assert [trial.number for trial in found] == list(range(40))
    assert {trial.state for trial in found[:30]} <= {TrialState.COMPLETE, TrialState.PRUNED}
    assert {trial.state for trial in found[30:]} == {TrialState.COMPLETE}  # never pruned
    assert [is_final(trial) for trial in found] == [False] * 30 + [True] * 10
    known = [0.25, 0.5, 0.1, -0.2, 0.3, 0.4, 0.6]  # known_good's two, then FROM_STUDY's five
    assert [trial.params["x"] for trial in found[:7]] == known
    assert len({trial.params["x"] for trial in found[:30]}) == 30
    study = open_study(Settings.from_env())
    repeated = Counter(trial.user_attrs[FINAL_OF] for trial in found[30:])
    assert repeated == {trial.number: 2 for trial in best_searched(study, 5)}
    for trial in found[30:]:
        assert trial.params == found[trial.user_attrs[FINAL_OF]].params


def test_a_grid_is_whole_and_its_best_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPACE", "finite")
    monkeypatch.setenv("SAMPLER", "grid")
    monkeypatch.setenv("FINAL_SEEDS", "2")
    monkeypatch.setenv("TOTAL_TRIALS", "12")  # first no room for all, then more than enough
    assert wait([known_for_tests.start(rank) for rank in range(3)]) == [0, 0, 0]
    assert [is_final(trial) for trial in trials()] == [False] * 7 + [True] * 5
    monkeypatch.setenv("TOTAL_TRIALS", "100")
    assert wait([known_for_tests.start(rank) for rank in range(3)]) == [0, 0, 0]
    found = trials()
    assert [is_final(t) for t in found] == [False] * 7 + [True] * 5 + [False] * 5 + [True] * 5
    tried = [tuple(trial.params.values()) for trial in found if not is_final(trial)]
    assert len(tried) == len(set(tried)) == 12
    assert len({trial.user_attrs[FINAL_OF] for trial in found[17:]}) == 5
    monkeypatch.delenv("TOTAL_TRIALS")
    monkeypatch.delenv("FINAL_SEEDS")
    forget()
    settings = Settings.from_env()
    assert count(open_study(settings), settings).left == 0


def test_a_trial_that_is_enqueued_by_hand_is_no_final_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TOTAL_TRIALS", "10")
    monkeypatch.setenv("FINAL_SEEDS", "2")
    monkeypatch.setenv("SAMPLER", "random")
    monkeypatch.setenv("PRUNER", "none")
    assert wait([known_for_tests.start(0)]) == [0]
    stock = optuna.load_study(study_name="mnist_hpo", storage=os.environ["STUDY_DB"])
    stock.enqueue_trial({"x": 0.125})
    assert wait([known_for_tests.start(0)]) == [0]
    found = trials()
    assert [is_final(trial) for trial in found] == [False] * 5 + [True] * 5 + [False]
    assert (found[10].params["x"], found[10].state) == (0.125, TrialState.COMPLETE)


# ---------- What people see ----------

# Trial 0 is best by one run, and by its mean the fourth; 5 and 6 are worse than five others.
VALUES = [0.10, 0.20, 0.30, 0.40, 0.50, 0.60, 0.70]
AGAIN = {0: [0.50, 0.90], 1: [0.22, 0.24], 2: [0.28, 0.29], 3: [0.40, 0.40], 4: [0.40, 0.66]}


def add(study: optuna.Study, x: float, value: float, final_of: int | None = None) -> None:
    """Add a complete trial."""
    attributes = {} if final_of is None else {FINAL_OF: final_of}
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 10)}
    study.add_trial(
        optuna.create_trial(
            value=value, params={"x": x}, distributions=space, user_attrs=attributes,
            intermediate_values={0: value},
        )
    )  # fmt: skip


@pytest.fixture
def study() -> optuna.Study:
    """Return a study that has ended, with final runs."""
    made = create_or_open_study(Settings.from_env())
    for x, value in enumerate(VALUES):
        add(made, x, value)
    for number, again in AGAIN.items():
        assert chosen_trial(made, None).number == 0  # until all five have run
        add(made, number, again[0], number)
    for number, again in AGAIN.items():
        add(made, number, again[1], number)
    return made


def test_the_best_mean_is_the_best_model(
    study: optuna.Study, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings.from_env(TOTAL_TRIALS="17")
    assert chosen_trial(study, None).number == 8
    words = "0.22 ± 0.02 (mean of 3 seeds, trial 8); by one run 0.1 (trial 0)"
    assert best_line(study) == f"best {words}"
    assert facts.best(study, ["loss"], {}) == {"loss": words, "x": "1"}
    check_best_model.print_state(study, settings)
    printed = capsys.readouterr().out
    assert "17 of 17 trials: 17 complete" in printed
    assert "best_value  0.22 ± 0.02 (mean of trials 1, 8, 13)" in printed
    assert "single best 0.1 (trial 0; its mean is 0.5 ± 0.4)" in printed
    ranks = [line.split()[1] for line in printed.splitlines() if line.startswith("  trial ")]
    assert ranks == ["8", "9", "10", "7", "11"]
    assert to_keep(study, 3) == {8, 9, 10, 7, 11}


def test_the_search_and_the_pictures_leave_them_alone(study: optuna.Study) -> None:
    seen: list[list[int]] = []

    class Probe(BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: FrozenTrial) -> dict[str, Any]:
            seen.append([t.number for t in study.get_trials(deepcopy=False)])
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> float:
            seen.append([t.number for t in study._get_trials(deepcopy=False, use_cache=True)])
            return 3.0

    class ProbePruner(BasePruner):
        def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
            seen.append([t.number for t in study.get_trials(states=(TrialState.COMPLETE,))])
            return True

    study.sampler = GivenFirst(Probe(), [], finals=True)
    study.pruner = FinalsAreWhole(ProbePruner())
    trial = study.ask()
    assert trial.suggest_float("x", 0, 10) == 3.0
    trial.report(1.0, 0)
    assert trial.should_prune()
    assert [numbers[:7] for numbers in seen] == [list(range(7))] * 3
    assert [numbers[7:] for numbers in seen] == [[17], [17], []]
    study.tell(trial, 1.0)
    seen.clear()
    again = study.ask()
    again.set_user_attr(FINAL_OF, 2)
    again.report(9.0, 0)
    assert (again.suggest_float("x", 0, 10), again.should_prune(), seen) == (2.0, False, [])
    study.tell(again, 0.3)
    history = next(p for p in pictures_of(study, ["loss"]) if p.name == "history")
    drawn = history.draw(optuna.visualization)
    assert list(drawn.data[0].x) == [*range(7), 17]


def test_hyperband_and_tpe_work_beside_final_runs(study: optuna.Study) -> None:
    study.sampler = GivenFirst(optuna.samplers.TPESampler(n_startup_trials=1), [], finals=True)
    study.pruner = FinalsAreWhole(optuna.pruners.HyperbandPruner(max_resource=4))
    trial = study.ask()
    trial.suggest_float("x", 0, 10)
    trial.report(1.0, 0)
    trial.should_prune()
    again = study.ask()
    again.set_user_attr(FINAL_OF, 3)
    assert again.suggest_float("x", 0, 10) == 3.0


def test_when_the_final_runs_begin() -> None:
    made = optuna.create_study()
    for x in range(3):
        add(made, x, 0.0)
    assert [limit(made.trials, end, 10) for end in (2, 3, 4)] == [12, 13, 4]
    made.ask()
    assert [limit(made.trials, end, 10) for end in (3, 4)] == [13, 4]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"FINAL_SEEDS": "21"}, "FINAL_SEEDS=21 is out of range; give an integer from 0 to 20"),
        ({"FINAL_SEEDS": "x"}, "FINAL_SEEDS='x' is not an integer from 0 to 20"),
        ({"FINAL_SEEDS": "3", "TOTAL_TRIALS": "14"}, "takes 10 of TOTAL_TRIALS=14; give TOTAL_T"),
        ({"FINAL_SEEDS": "3", "OBJECTIVES": "loss,parameters"}, "for several give 0"),
    ],
)
def test_out_of_range(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError, match="FINAL_SEEDS") as caught:
        Settings.from_env(**env)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
