"""--export of what a framework has written: it loads with the framework alone."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from common import Run
from hpo import checkpoint
from hpo.settings import Settings
from hpo.study.opening import create_or_open_study
from plain import run_study

FILES = ["load_model.py", "metrics.json", "requirements.txt", "versions.json"]
ROW = "[[0.5] * 64]"
PREDICT = {
    "keras": f"model.predict(numpy.array({ROW}), verbose=0)",
    "xgboost": f"model.predict(__import__('xgboost').DMatrix(numpy.array({ROW})))",
    "lightgbm": f"model.predict(numpy.array({ROW}))",
}


@pytest.mark.parametrize(
    ("framework", "name", "package", "said"),
    [
        ("keras", "model.keras", "keras", "keras: {} parameters"),
        ("xgboost", "model.ubj", "xgboost-cpu", "xgboost: 40 rounds"),
        ("lightgbm", "model.txt", "lightgbm", "lightgbm: 400 trees"),
    ],
)
def test_it_loads_with_the_framework_alone(
    framework: str,
    name: str,
    package: str,
    said: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("sklearn")
        pytest.importorskip(framework)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    trial = run_study(framework)
    result = run("check_best_model.py", "--export", str(tmp_path / "best"))
    assert result.returncode == 0, result.stderr
    units = trial.params.get("units", 0)
    assert f"in another folder: {said.format(units * 75 + 10)}\n" in result.stdout
    folder = (tmp_path / "best").rename(tmp_path / "moved")
    assert sorted(os.listdir(folder)) == sorted([*FILES, name])
    own = checkpoint.folder_path(Settings.from_env(), 0) / name
    assert (folder / name).read_bytes() == own.read_bytes()
    wanted = (folder / "requirements.txt").read_text().splitlines()
    assert wanted[0] == f"{package}=={metadata.version(package)}"
    assert not any(line.startswith("optuna") for line in wanted)
    code = f"""
import sys, numpy
from load_model import model
print({PREDICT[framework]}.argmax(), {{"hpo", "optuna"}} & set(sys.modules))"""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "KERAS_BACKEND")}
    command = [sys.executable, "-c", code]
    digit, others = subprocess.check_output(command, cwd=folder, env=env, text=True).split()[-2:]
    assert 0 <= int(digit) <= 9
    assert others == "set()"  # neither of the bundle


def test_file_that_does_not_load(run: Run, tmp_path: Path) -> None:
    if not os.environ.get("CI"):
        pytest.importorskip("lightgbm")
    study = create_or_open_study(Settings.from_env())
    trial = study.ask()
    path = checkpoint.folder(trial) / "model.txt"
    path.write_text("half a mod")
    study.tell(trial, 1.0)
    result = run("check_best_model.py", "--export", str(tmp_path / "best"))
    assert result.returncode == 1
    assert "it does not load in a fresh Python: lightgbm.basic.LightGBMError" in result.stderr
    assert result.stderr.endswith(f"; as it was written it is {path}\n")
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "best").exists()
    path.unlink()
    result = run("check_best_model.py", "--export", str(tmp_path / "best"))
    assert result.returncode == 2
    assert "the weights of trial 0 are not here" in result.stderr
