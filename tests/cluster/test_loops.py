"""Loops of a framework on the rehearsal cluster: interrupted on one node, gone on with on another.

The studies of tests/plain_loops, and optuna_llm.py, by the sbatch script unmodified: to the values,
and the curves, of trials that nobody has interrupted, to the last bit.

    pytest tests/cluster/test_loops.py                     scikit-learn's folds alone
    CLUSTER_LOOPS=all pytest tests/cluster/test_loops.py   the others, too: about 90 s each
"""

from __future__ import annotations

import os
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from cluster import test_bundle
from cluster.rehearsal import Cluster
from cluster.test_bundle import FINISHED, QUICK, Bundle, typed
from common import BUNDLE
from plain import LOOPS

bundle = test_bundle.bundle  # the fixture, which asks for this module's with_optuna
REQUIREMENTS = "requirements-container.txt"


class Loop(NamedTuple):
    """One of them."""

    script: str
    packages: tuple[str, ...] = ()  # what pip installs besides
    insert: tuple[str, str] = ("", "")  # a line, and the one that it comes before
    settings: tuple[tuple[str, str], ...] = ()


# Without these LightGBM looks each time which of two ways is faster.
REPEATABLE = '"deterministic": True, "force_row_wise": True, "num_threads": 1,'
ALL = {
    "folds": Loop("study_folds.py", settings=(("DIRECTION", "maximize"),)),
    "xgboost": Loop("study_xgboost.py", ("xgboost-cpu",)),
    "lightgbm": Loop("study_lightgbm.py", ("lightgbm",), (REPEATABLE, '"bagging_fraction"')),
    "keras": Loop("study_keras.py", ("keras",)),
    "lightning": Loop("study_lightning.py", ("lightning",)),
    "huggingface": Loop("optuna_llm.py", settings=(("SMALL", "1"),)),
}
ASKED = list(ALL) if os.environ.get("CLUSTER_LOOPS") == "all" else ["folds"]

# A trial notes where it reports; on the first node its second report has no end.
WATCHED = """
import os, time
import optuna

report, seen = optuna.Trial.report, []

def noted(trial, value, step):
    report(trial, value, step)
    seen.append(step)
    with open("reports.txt", "a") as file:
        file.write(f"{trial.number} {step} {os.uname().nodename}\\n")
    while os.path.exists("hold") and len(seen) == 2:
        time.sleep(0.05)

optuna.Trial.report = noted
"""
PARAMETERS = """
import json, optuna
study = optuna.load_study(study_name="mnist_hpo", storage="sqlite:///study.db")
print(json.dumps([trial.params for trial in study.trials]))
"""
CURVES = """
SELECT number, step, intermediate_value FROM trials
JOIN trial_intermediate_values USING (trial_id) ORDER BY number, step
"""
VALUES = "SELECT number, value FROM trials JOIN trial_values USING (trial_id) ORDER BY number"


@pytest.fixture(scope="module")
def with_optuna(cluster: Cluster) -> Cluster:
    """Install what these scripts need, in the versions of the other tests; some may be there."""
    there = cluster.shared / cluster.work.lstrip("/")
    shutil.copy(BUNDLE / "code_and_slurm-scripts" / REQUIREMENTS, there / REQUIREMENTS)
    shutil.copytree(BUNDLE / "code_and_slurm-scripts" / "hpo", there / "hpo", dirs_exist_ok=True)
    pins = dict(re.findall(r'"(([\w-]+)==[\w.]+)', (BUNDLE / "pyproject.toml").read_text()))
    names = ["scikit-learn", *(name for each in ASKED for name in ALL[each].packages)]
    wanted = [next(pin for pin, name in pins.items() if name == asked) for asked in names]
    command = f"""in_image python -s -m hpo.packages > image.txt
        in_image pip install --user -c image.txt -r {REQUIREMENTS} {" ".join(wanted)}"""
    options = ["--online", "--cd", cluster.work]
    cluster.run("login", *typed(command), options=options, timeout=900)
    return cluster


@pytest.mark.parametrize("name", ASKED)
def test_loop_goes_on_on_another_node(name: str, bundle: Bundle) -> None:
    """Two trials are stopped in their second step; a job on another node goes on with both."""
    start, loop, cluster = time.monotonic(), ALL[name], bundle.cluster
    scripts = cluster.shared / bundle.scripts.lstrip("/")
    make_script(loop, scripts, bundle)
    settings = {"PY_SCRIPT": loop.script, "PRUNER": "none", "TOTAL_TRIALS": "2"}
    settings.update(loop.settings)
    (scripts / "hold").touch()
    first = bundle.submit("--nodes=1", **settings)

    def both_have_reported() -> str:
        assert cluster.job(first)["JobState"] in ("PENDING", "RUNNING"), bundle.log(first)
        return "yes" * (len(reports(scripts)) == 4)

    cluster.wait(both_have_reported, 600, "two trials' second reports")
    cluster.run("login", "scancel", str(first))
    assert cluster.wait_end(first, 600) == "CANCELLED"
    logs = "\n".join(bundle.log(first, worker) for worker in bundle.workers(first))
    assert not {state for _, state in bundle.trials()} & set(FINISHED), logs
    (scripts / "hold").unlink()
    begun = reports(scripts)

    second = bundle.submit("--nodes=1", "--exclude=n1", **settings)
    bundle.finish(second, timeout=600)
    bundle.done(f"{name}: scancel, gone on on another node", [first, second], start, total=2)
    curves, values = bundle.asked(CURVES), bundle.asked(VALUES)
    steps = sorted((number, step) for number, step, _ in curves)
    went_on = reports(scripts)[len(begun) :]
    assert {host for _, _, host in begun} == {"n1"}
    assert {host for _, _, host in went_on} == {"n2"}
    # What the first node has saved, one step, was not trained again.
    first_steps = [min(step for step in steps if step[0] == number) for number in (0, 1)]
    assert sorted((n, step) for n, step, _ in went_on) == [s for s in steps if s not in first_steps]
    assert len(steps) >= 2 * 4

    in_image = ("apptainer", "exec", "--bind", "/tmpdir,/work", cluster.image, "python", "-u")
    options = ("--cd", bundle.scripts)
    shown = cluster.run("login", *in_image, "-", options=options, stdin=PARAMETERS).stdout
    (scripts / "good.json").write_text(shown)
    again = {**QUICK, **settings, "KNOWN_GOOD": "good.json", "STUDY_DB": "sqlite:///again.db"}
    command = ("env", *(f"{key}={value}" for key, value in again.items()), *in_image, loop.script)
    cluster.run("login", *command, options=options, timeout=600)
    assert bundle.asked(CURVES, "again.db") == curves
    assert bundle.asked(VALUES, "again.db") == values
    assert len(values) == 2
    print(name, values)


def make_script(loop: Loop, scripts: Path, bundle: Bundle) -> None:
    """Put the study where a user does, and let it be watched."""
    if not (scripts / loop.script).exists():
        shutil.copy(LOOPS / loop.script, scripts)
    (scripts / "watched.py").write_text(WATCHED)
    path = scripts / loop.script
    path.write_text(re.sub(r"^(?=NEEDS = )", "import watched\n", path.read_text(), flags=re.M))
    assert "\nimport watched\n" in path.read_text()
    if loop.insert[0]:
        bundle.insert(*loop.insert, script=loop.script)


def reports(scripts: Path) -> list[tuple[int, int, str]]:
    """Return trial, step and host of each report so far."""
    path = scripts / "reports.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split() for line in lines]
    return [(int(number), int(step), host) for number, step, host in found]
