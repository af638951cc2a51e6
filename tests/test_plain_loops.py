"""tests/plain_loops: ordinary scripts of several frameworks and their studies, 14 lines apart."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

import pytest

from common import SCRIPTS
from hpo import packages
from hpo import script as user_script
from hpo.settings import Settings, UserError
from hpo.study.opening import open_study
from plain import LOOPS, changed, check_page, run_plain

FRAMEWORKS = ("xgboost", "lightgbm", "lightning", "keras", "folds")  # in the order of the page
OF_EACH = pytest.mark.parametrize("framework", FRAMEWORKS)


def both(framework: str) -> tuple[Path, Path]:
    """Return the plain script and its study."""
    return LOOPS / f"train_{framework}.py", LOOPS / f"study_{framework}.py"


@OF_EACH
def test_fewer_than_fifteen_lines_are_changed(framework: str) -> None:
    assert 0 < changed(*both(framework)) < 15


@OF_EACH
def test_its_page_shows_the_difference(framework: str) -> None:
    parts = re.split(r"^\d\. .*$", (LOOPS / "README.txt").read_text(), flags=re.MULTILINE)
    check_page(parts[1 + FRAMEWORKS.index(framework)], *both(framework))


def without(package: str, module: str, site: Path) -> Path:
    """Make a folder in which Python finds all that is installed here but this package."""
    site.mkdir()
    hidden = {module, module.lower(), metadata.distribution(package).metadata["Name"].lower()}
    for folder in map(Path, dict.fromkeys(map(sysconfig.get_path, ("purelib", "platlib")))):
        for path in folder.iterdir():
            name = path.name.split("-")[0].replace("_", "-").lower()
            if name not in hidden and not (site / path.name).exists():
                (site / path.name).symlink_to(path)
    return site


@pytest.mark.parametrize(
    ("script", "module", "package"),
    [
        (LOOPS / "study_xgboost.py", "xgboost", "xgboost-cpu"),
        (LOOPS / "study_lightgbm.py", "lightgbm", "lightgbm"),
        (LOOPS / "study_lightning.py", "lightning", "lightning"),
        (LOOPS / "study_keras.py", "keras", "keras"),
        (LOOPS / "study_folds.py", "sklearn", "scikit-learn"),
        (SCRIPTS / "optuna_llm.py", "transformers", "transformers"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_missing_framework_is_one_line_by_hand(
    script: Path, module: str, package: str, own_study: Path, tmp_path: Path
) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip(module)
    site = without(package, module, tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-S", str(script)],  # -S: no other folder of packages
        env={**os.environ, "PYTHONPATH": f"{SCRIPTS}:{site}", "SMALL": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 2, done.stderr
    says, command = done.stderr.splitlines()
    wanted = package.removesuffix("-cpu") + (">=2.6" if module == "lightning" else "")
    name = os.path.relpath(script, SCRIPTS)
    assert says == f"{script.name}: error: {name} needs {wanted}, which this Python has not; once:"
    assert re.fullmatch(rf"    \S+ -m pip install '?{wanted}(==\S+|')?", command)
    assert not own_study.exists()


def test_without_needs_it_is_what_the_loop_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.py"
    path.write_text("def objective(trial):\n    from hpo.loops.xgboost import StudyCallback\n")
    monkeypatch.setattr(packages, "missing", list)
    with pytest.raises(UserError, match=r"needs xgboost,"):
        user_script.check_needs(os.path.relpath(path, SCRIPTS))


def test_study_of_its_own(tmp_path: Path) -> None:
    """One of them as it is started by hand; test_boosting.py and others run the rest."""
    if not os.environ.get("CI"):
        pytest.importorskip("xgboost")
    done = subprocess.run(
        [sys.executable, str(LOOPS / "study_xgboost.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS), "TOTAL_TRIALS": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [trial] = open_study(Settings.from_env()).trials
    assert trial.value is not None
    assert trial.value < 2.3  # better than guessing


def test_script_and_study_with_folds(capsys: pytest.CaptureFixture[str]) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("sklearn")
    trial = run_plain("folds")
    assert len(trial.intermediate_values) == 5
    assert 0.9 < float(capsys.readouterr().out.split()[-1]) < 1
