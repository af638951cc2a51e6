"""The search space: what is found of it, what is refused, and that every combination is tried."""

from __future__ import annotations

from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState

from hpo.script import Script
from hpo.search import pruners, samplers
from hpo.search.remembered import adopt_space, plan_of
from hpo.search.space import combinations, explore, value_at
from hpo.search.stopped import CompleteTPE
from hpo.settings import Settings, UserError
from hpo.study.opening import create_or_open_study


def branches(trial: Any) -> dict[str, Any]:
    """A branch in a branch, the second behind the last choice of the first."""
    found = {"a": trial.suggest_categorical("a", ["x", "y", "z"])}
    if found["a"] == "z":
        found["b"] = trial.suggest_int("b", 1, 3)
        if found["b"] == 2:
            found["c"] = trial.suggest_float("c", 0.0, 1.0)
    found["d"] = trial.suggest_float("d", 1e-3, 1.0, log=True)
    return found


def impossible(trial: Any) -> dict[str, Any]:
    """Six combinations, three of which are refused, the first among them."""
    a = trial.suggest_categorical("a", [1, 2, 3])
    b = trial.suggest_categorical("b", [1, 2])
    if a <= b:
        raise optuna.TrialPruned
    return {"a": a, "b": b}


def test_every_branch_is_found() -> None:
    assert set(explore(branches)) == {"a", "b", "c", "d"}


def test_a_space_may_refuse_combinations_and_look_at_the_study() -> None:
    assert set(explore(impossible)) == {"a", "b"}
    found = combinations(impossible, "grid")
    assert sorted((params["a"], params["b"]) for params in found) == [(2, 1), (3, 1), (3, 2)]

    def looks(trial: Any) -> dict[str, Any]:
        a = trial.suggest_int("a", 1, 3)
        if any(other.params.get("a") == a for other in trial.study.get_trials(deepcopy=False)):
            raise optuna.TrialPruned
        return {"a": a}

    assert set(explore(looks)) == {"a"}

    def refuses(trial: Any) -> None:
        trial.suggest_int("a", 1, 3)
        raise optuna.TrialPruned

    with pytest.raises(UserError, match="refuses every combination"):
        combinations(refuses, "grid")


@pytest.mark.filterwarnings("ignore:Choices for a categorical")
@pytest.mark.parametrize(
    "choice", [np.int64(16), np.float32(0.5), dict, [8, 8], {"a": 1}, ((8, 8), (8,)), len]
)
def test_choices_that_no_other_worker_could_read_are_refused(choice: Any) -> None:
    with pytest.raises(UserError, match="the choices of layers must be numbers, wor") as caught:
        explore(lambda trial: trial.suggest_categorical("layers", [choice, 1]))
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).endswith(".tolist()") == isinstance(choice, np.generic)


@pytest.mark.filterwarnings("ignore:Choices for a categorical")
def test_choices_may_be_tuples() -> None:
    space = explore(lambda trial: trial.suggest_categorical("layers", [(8,), (8, 8)]))
    assert space == {"layers": CategoricalDistribution([(8,), (8, 8)])}  # type: ignore[list-item]


def test_a_space_that_fails_is_one_line() -> None:
    with pytest.raises(UserError, match="search_space fails with the first values: KeyError: 'n"):
        explore(lambda trial: dict[str, int]()["no such"])


@pytest.mark.parametrize(
    ("second", "says"),
    [
        (lambda trial: trial.suggest_categorical("k", [3, 4]), "k is one of 1, 2, and elsewhere"),
        (lambda trial: trial.suggest_int("k", 1, 2), "k is one of 1, 2, and elsewhere from 1 to 2"),
    ],
)
def test_a_name_is_one_parameter_in_all_branches(second: Any, says: str) -> None:
    """Optuna would let every trial fail that comes to the other branch."""

    def search_space(trial: Any) -> None:
        if trial.suggest_categorical("o", ["adam", "sgd"]) == "sgd":
            second(trial)
        else:
            trial.suggest_categorical("k", [1, 2])

    with pytest.raises(UserError, match=says):
        explore(search_space)


def test_a_range_may_depend_on_another_parameter() -> None:
    space = explore(lambda trial: trial.suggest_int("k", 1, trial.suggest_int("n", 2, 4)))
    assert list(space) == ["n", "k"]


@pytest.mark.parametrize("low", [float("nan"), -float("inf"), -1e308])
def test_a_range_without_an_end_is_refused(low: float) -> None:
    with pytest.raises(UserError, match=r"search_space: x is from .*, which is no range"):
        explore(lambda trial: trial.suggest_float("x", low, 1e308))


def test_a_name_is_one_parameter_in_a_trial() -> None:
    with pytest.raises(UserError, match="search_space suggests x twice, as two different"):
        explore(lambda trial: [trial.suggest_float("x", 0, 1), trial.suggest_int("x", 0, 1)])


def test_a_set_has_no_order_that_two_workers_share() -> None:
    with pytest.raises(UserError, match=r"choices of o are a set, .* give a list"):
        explore(lambda trial: trial.suggest_categorical("o", {"adam", "sgd"}))
    assert explore(lambda trial: trial.suggest_categorical("n", {1, 2}))


def test_a_combination_that_fails_is_named() -> None:
    def search_space(trial: Any) -> None:
        if trial.suggest_int("a", 1, 4) > 2:
            raise ValueError("too big")

    with pytest.raises(UserError, match=r"fails with a=3: ValueError: too big \(test_space.*Prune"):
        combinations(search_space, "grid")


def script(search_space: Any) -> Script:
    """Return a script that offers this space."""
    return Script("my.py", {"search_space": search_space})


def adopt(search_space: Any, **env: str) -> optuna.Study:
    """Let the test's study adopt a space."""
    settings = Settings.from_env(**env)
    plan = plan_of(settings, script(search_space))
    study = create_or_open_study(settings)
    adopt_space(study, settings, plan)
    return study


def test_a_change_in_a_branch_is_refused_before_a_trial() -> None:
    def space(momenta: list[float]) -> Any:
        def search_space(trial: Any) -> None:
            if trial.suggest_categorical("o", ["adam", "sgd"]) == "sgd":
                trial.suggest_categorical("m", momenta)

        return search_space

    adopt(space([0.5, 0.9]))
    adopt(space([0.5, 0.9]))
    with pytest.raises(UserError, match=r"another search space .*different: m"):
        adopt(space([0.5, 0.9, 0.99]))


def test_a_range_that_optuna_can_extend_is_extended() -> None:
    study = adopt(lambda trial: trial.suggest_float("x", 0, 1))
    study.add_trial(
        optuna.create_trial(
            value=1.0, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)}
        )
    )
    study = adopt(lambda trial: trial.suggest_float("x", -1, 2))
    assert study.user_attrs["space"]["x"]["attributes"]["high"] == 2
    trial = study.ask()
    assert -1 <= trial.suggest_float("x", -1, 2) <= 2
    with pytest.raises(UserError, match="different: x"):
        adopt(lambda trial: trial.suggest_float("x", 1e-3, 2, log=True))


@pytest.mark.parametrize("log", [False, True])
def test_a_study_of_stock_optuna_is_adopted_if_its_trials_fit(log: bool) -> None:
    study = create_or_open_study(Settings.from_env())
    theirs: dict[str, Any] = {"x": FloatDistribution(0.1, 1, log=log)}
    study.add_trial(optuna.create_trial(value=1.0, params={"x": 0.5}, distributions=theirs))
    if not log:
        assert "space" in adopt(lambda trial: trial.suggest_float("x", 0, 1)).user_attrs
        return
    with pytest.raises(UserError, match="has trials with another search space"):
        adopt(lambda trial: trial.suggest_float("x", 0, 1))


@pytest.mark.parametrize(
    ("fix", "says"),
    [
        ("c=1", "c is no parameter of search_space (a, b)"),
        ("a=7", "a=7 is not in its range: one of 1, 2"),
        ("b=word", "b=word is not in its range"),
    ],
)
def test_fixed_parameters_are_checked(fix: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        plan_of(Settings.from_env(FIX=fix), script(impossible))
    assert says in str(caught.value)


@pytest.mark.parametrize(("fix", "says"), [("", "configurations (T"), ("b=1", "with FIX=b=1 (T")])
def test_a_space_that_takes_nothing_is_refused(fix: str, says: str) -> None:
    """As for a grid, instead of a study of pruned trials; one that takes little is no mistake."""
    settings = Settings.from_env(SAMPLER="tpe", FIX=fix)

    def refuses(trial: Any) -> None:
        a, b = (trial.suggest_categorical(name, [0, 1]) for name in "ab")
        if b or not a or not fix:
            raise optuna.TrialPruned

    plan_of(Settings.from_env(SAMPLER="tpe", FIX=""), script(impossible))
    with pytest.raises(UserError) as caught:
        plan_of(settings, script(refuses))
    assert str(caught.value).startswith("search_space refuses every one of 2000 configurations")
    assert says in str(caught.value)


def test_fixed_parameters_are_held_fast() -> None:
    settings = Settings.from_env(FIX="a=3", SAMPLER="tpe")
    study = optuna.create_study(sampler=samplers.make_sampler(settings, 1))
    for _ in range(15):
        trial = study.ask()
        impossible(trial)
        study.tell(trial, 1.0)
    assert {trial.params["a"] for trial in study.trials} == {3}
    assert {trial.params["b"] for trial in study.trials} == {1, 2}
    grid = plan_of(Settings.from_env(FIX="a=3", SAMPLER="grid"), script(impossible))
    assert sorted(params["b"] for params in grid.combinations) == [1, 2]


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"PRUNER": "median:n_warmup=5"}, "n_warmup is no option; there are: n_startup_trials, n"),
        ({"PRUNER": "percentile:percentile=700"}, "Percentile must be between 0 and 100"),
        ({"PRUNER": "halving:reduction_factor=1"}, "reduction_factor=1 is no whole number from 2"),
        ({"SAMPLER": "tpe:startup=3"}, "SAMPLER=tpe: startup is no option; there are: "),
        ({"SAMPLER": "tpe:seed=3"}, "seed is no option"),
        ({"SAMPLER": "tpe:gamma=3"}, "gamma is no option"),
        ({"SAMPLER": "tpe:count_pruned=yes"}, "count_pruned='yes' is not True or False"),
        ({"SAMPLER": "tpe:multivariate=1"}, "multivariate=1 is not True or False"),
        ({"SAMPLER": "tpe:weights=3"}, "weights is no option"),
        ({"SAMPLER": "tpe:n_ei_candidates=0"}, "SAMPLER=tpe cannot work with these options: Ind"),
        ({"SAMPLER": "tpe:n_startup_trials=99,n_ei_candidates=0"}, "cannot work with these opt"),
        ({"SAMPLER": "nsgaii:population_size=1"}, "SAMPLER=nsgaii: "),
        ({"SAMPLER": "gp:n_startup_trials=few"}, "n_startup_trials='few' is not a whole number"),
        ({"SAMPLER": "qmc:space=3"}, "space is no option; there are none"),
        ({"PRUNER": "hyperband:max_resource=0"}, "PRUNER=hyperband cannot work with these opt"),
        ({"PRUNER": "wilcoxon:p_threshold=True"}, "p_threshold=True is not a number"),
    ],
)
def test_options_are_checked_before_the_first_trial(env: dict[str, str], says: str) -> None:
    with pytest.raises(UserError) as caught:
        pruners.check_search(Settings.from_env(**env))
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "env",
    [
        {"SAMPLER": "tpe:multivariate=True,group=True,n_startup_trials=200", "FIX": "a=3"},
        {"SAMPLER": "tpe:prior_weight=1,multivariate=None"},
        {"SAMPLER": "cmaes:popsize=8,sigma0=0.1"},
        {"SAMPLER": "gp:n_startup_trials=0"},
        {"SAMPLER": "grid", "PRUNER": "hyperband:max_resource=auto"},
        {"PRUNER": "hyperband:max_resource=9"},
    ],
)
def test_options_that_optuna_takes_are_taken(
    env: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    pruners.check_search(Settings.from_env(**env))
    assert capfd.readouterr() == ("", "")


def test_options_reach_optuna() -> None:
    settings = Settings.from_env(PRUNER="median:n_startup_trials=1,n_warmup_steps=0")
    study = optuna.create_study(pruner=pruners.make_pruner(settings))
    for value in (0.1, 0.9):
        trial = study.ask()
        for step in range(3):
            trial.report(value, step)
            if trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                break
        else:
            study.tell(trial, value)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]


# ---- grid and brute force ------------------------------------------------------------------


def run_grid(study: optuna.Study, found: list[dict[str, Any]]) -> list[FrozenTrial]:
    """Run trials until the grid is done."""
    while samplers.assign(found, study.get_trials())[1]:
        trial = study.ask()
        impossible(trial)
        study.tell(trial, 1.0)
    return study.trials


@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("how", ["enqueued", "enqueued in part", "imported", "imported elsewhere"])
def test_every_combination_is_tried_once_whatever_else_is_in_the_study(when: int, how: str) -> None:
    found = combinations(impossible, "grid")
    study = optuna.create_study(sampler=samplers.Combinations(found))
    for _ in range(when):
        trial = study.ask()
        impossible(trial)
        study.tell(trial, 1.0)
    last = found[-1]
    space: dict[str, Any] = {
        "a": CategoricalDistribution([1, 2, 3]),
        "b": CategoricalDistribution([1, 2]),
    }
    if how == "enqueued":
        study.enqueue_trial(last)
    elif how == "enqueued in part":
        study.enqueue_trial({"a": last["a"]})
    elif how == "imported":
        study.add_trial(optuna.create_trial(value=1.0, params=last, distributions=space))
    else:
        params = {"a": 1, "b": 2}  # which search_space refuses
        study.add_trial(optuna.create_trial(value=1.0, params=params, distributions=space))
    tried = [(t.params["a"], t.params["b"]) for t in run_grid(study, found)]
    wanted = {(params["a"], params["b"]) for params in found}
    assert wanted <= set(tried)
    extra = {"imported elsewhere": 1, "enqueued in part": 1}.get(how, 0)
    assert len(wanted) <= len(tried) <= len(wanted) + extra


# ---- others --------------------------------------------------------------------------------


def test_number_of_reports_follows_from_what_was_seen() -> None:
    def trial(n: int, state: TrialState = TrialState.COMPLETE, reports: int = 0) -> FrozenTrial:
        return optuna.create_trial(
            state=state,
            value=1.0 if state == TrialState.COMPLETE else None,
            params={"n_epochs": n, "epochs": 9},
            distributions={"n_epochs": IntDistribution(1, 9), "epochs": IntDistribution(1, 9)},
            intermediate_values={100 * step: 1.0 for step in range(reports or n)},
        )

    running = trial(4, TrialState.RUNNING, 1)
    count = pruners.number_of_reports
    assert count(running, [trial(3), trial(5)]) == 4
    assert count(running, [trial(3, reports=7), trial(5, reports=7)]) == 7
    assert count(running, [trial(3, reports=7), trial(5, reports=6)]) is None
    assert count(running, []) == 9  # of `epochs`, while nothing else is known
    running.params["n_epochs"] = 4.0  # of suggest_float
    assert count(running, [trial(3), trial(5)]) == 4


@pytest.mark.parametrize("kind", [IntDistribution(1, 4), FloatDistribution(1, 4, step=1)])
def test_first_trials_are_pruned_but_not_after_what_may_be_their_last_report(
    kind: BaseDistribution,
) -> None:
    """Before a trial is complete; halving begins with the first report, and others still train."""
    study = optuna.create_study(
        pruner=pruners.make_pruner(Settings.from_env()), sampler=optuna.samplers.RandomSampler(1)
    )
    rounds: dict[str, Any] = {"rounds": kind}
    for number in (4.0, 4.0, 1.0, 4.0):
        study.enqueue_trial({"rounds": kind.to_external_repr(number)})
    best, hopeless, short, worse = (study.ask(rounds) for _ in range(4))
    for trial, value in ((best, 0.1), (hopeless, 0.9), (short, 0.9), (worse, 0.9)):
        trial.report(value, 0)
    assert not best.should_prune()
    assert not hopeless.should_prune()  # for all that is known, one report is all there will be
    best.report(0.1, 1)
    assert not short.should_prune()  # its last, if `rounds` means what it seems to
    assert worse.should_prune()


@pytest.mark.parametrize("direction", ["minimize", "maximize"])
def test_halving_decides_as_optunas_whatever_the_numbers_of_the_steps(direction: Any) -> None:
    stopped: list[list[int]] = []
    optunas = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    ours = pruners.make_pruner(Settings.from_env())
    for pruner, steps in ((optunas, range(1, 11)), (ours, range(0, 1000, 100))):
        values = np.random.default_rng(1).random((40, 10))
        study = optuna.create_study(pruner=pruner, direction=direction)
        study.tell(study.ask(), 0.5)  # without a report: then none is known to be the last
        stopped.append([])
        for curve in values:
            trial = study.ask()
            stopped[-1].append(0)
            for value, step in zip(curve, steps, strict=True):
                trial.report(value, step)
                if trial.should_prune():
                    stopped[-1][-1] = len(study.get_trials()[-1].intermediate_values)
                    break
            study.tell(trial, curve[-1] if not stopped[-1][-1] else None,
                       None if not stopped[-1][-1] else TrialState.PRUNED)  # fmt: skip
    assert stopped[0] == stopped[1]
    assert {0, 1, 3} <= set(stopped[1]) <= {0, 1, 3, 9}


def test_halving_compares_an_interrupted_trial_at_the_same_report() -> None:
    """It was not asked after its first report, since it was interrupted then."""
    study = optuna.create_study(pruner=pruners.make_pruner(Settings.from_env()))
    first, interrupted, last = study.ask(), study.ask(), study.ask()
    for step in range(4):
        first.report(0.5 - step / 10, step)
    interrupted.report(0.9, 0)
    interrupted.report(0.05, 1)
    assert not interrupted.should_prune()
    last.report(0.45, 0)
    assert not last.should_prune()  # the best at this step: 0.2 and 0.05 were at other ones


# ---- tpe -----------------------------------------------------------------------------------


def tpe(**env: str) -> optuna.samplers.BaseSampler:
    return samplers.make_sampler(
        Settings.from_env(**{"SAMPLER": "tpe", "PRUNER": "none", **env}), 1
    )


def finished(complete: int, pruned: int) -> optuna.Study:
    """Return a study with so many trials in one dimension; the higher, the worse."""
    study = optuna.create_study()
    space: dict[str, Any] = {"x": FloatDistribution(0, 1)}
    for n in range(complete + pruned):
        state = TrialState.COMPLETE if n < complete else TrialState.PRUNED
        value = n / (complete + pruned)
        study.add_trial(
            optuna.create_trial(
                state=state,
                value=value if state == TrialState.COMPLETE else None,
                params={"x": value},
                distributions=space,
                intermediate_values={0: value},
            )
        )
    return study


@pytest.mark.parametrize(
    ("complete", "pruned", "good"), [(20, 0, 2), (20, 180, 2), (0, 20, 1), (21, 9, 3), (300, 0, 25)]
)
def test_tpe_takes_a_tenth_of_the_complete_trials_as_good(
    complete: int, pruned: int, good: int
) -> None:
    study, sampler = finished(complete, pruned), tpe()
    study.sampler = sampler
    study.ask({"x": FloatDistribution(0, 1)})
    assert isinstance(sampler, CompleteTPE)
    assert sampler.good(complete + pruned) == good


def suggestions(study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> list[float]:
    study.sampler = sampler
    return [float(study.ask({"x": FloatDistribution(0, 1)}).params["x"]) for _ in range(5)]


def test_tpe_is_optunas_own_if_nothing_is_pruned_or_pruned_trials_shall_count() -> None:
    def optunas() -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(seed=1)

    stock = suggestions(finished(40, 0), optunas())
    assert suggestions(finished(40, 0), tpe()) == stock
    stock = suggestions(finished(10, 90), optunas())
    assert suggestions(finished(10, 90), tpe()) != stock
    assert suggestions(finished(10, 90), tpe(SAMPLER="tpe:count_pruned=True")) == stock
    constrained = finished(10, 90)
    constrained.add_trial(
        optuna.create_trial(
            value=0.5, params={"x": 0.5}, distributions={"x": FloatDistribution(0, 1)},
            system_attrs={"constraints:c": 1.0},
        )
    )  # fmt: skip
    again = optuna.create_study()
    again.add_trials(constrained.get_trials())
    assert again.get_trials()[-1].constraints == {"c": 1.0}
    assert suggestions(constrained, tpe()) == suggestions(again, optunas())


def test_tpe_of_several_objectives_is_optunas_own() -> None:
    two = {"OBJECTIVES": "loss,parameters", "DIRECTION": "minimize"}
    found = []
    for sampler in (tpe(**two), optuna.samplers.TPESampler(seed=1)):
        study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
        for _ in range(20):
            x = (trial := study.ask({"x": FloatDistribution(0, 1)})).params["x"]
            study.tell(trial, (x, 1 - x))
        found.append([trial.params["x"] for trial in study.get_trials()])
    assert found[0] == found[1]


def test_gamma_is_an_argument_of_optuna_until_6() -> None:
    """With Optuna 6 CompleteTPE has to reach γ in another way."""
    assert int(optuna.__version__.split(".")[0]) < 6
    with pytest.warns(FutureWarning, match="gamma.*removed in v6"):
        optuna.samplers.TPESampler(gamma=lambda finished: 1)


def test_value_at() -> None:
    choices = CategoricalDistribution([1, 2, 3, 4])
    assert [value_at(choices, p) for p in (0.0, 0.5, 1.0)] == [1, 3, 4]
    assert value_at(IntDistribution(1, 1024, log=True), 0.5) == 32
    assert value_at(FloatDistribution(1e-4, 1e-2, log=True), 0.5) == pytest.approx(1e-3)


def test_ranges_of_very_many_values_take_no_memory() -> None:
    def search_space(trial: Any) -> dict[str, Any]:
        return {
            "seed": trial.suggest_int("seed", 0, 2**62),
            "rate": trial.suggest_float("rate", 0, 1, step=1e-12),
        }

    space = explore(search_space)
    assert value_at(space["seed"], 0.5) == 2**61
    assert value_at(space["rate"], 0.5) == pytest.approx(0.5)
    with pytest.raises(UserError, match="more than 100000 combinations"):
        combinations(search_space, "grid")


def test_points_of_qmc_are_spread_and_the_same_for_every_worker() -> None:
    settings = Settings.from_env(SAMPLER="qmc", SEED="3")
    space: dict[str, Any] = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
    found = []
    for _ in range(2):
        study = optuna.create_study(sampler=samplers.make_sampler(settings, None, space=space))
        trials = [study.ask(space).params for _ in range(16)]
        found.append([(params["x"], params["y"]) for params in trials])
    assert found[0] == found[1]
    for axis in (0, 1):  # one point in each sixteenth
        assert sorted(int(16 * point[axis]) for point in found[0]) == list(range(16))
