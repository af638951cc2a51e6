"""The report: every picture drawn in a real browser, no error in its console; its limits."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import optuna
import pytest

from common import Run
from fake_study import fill
from hpo.settings import Settings, UserError
from hpo.show.report import write_report
from hpo.show.timeline import bars
from hpo.study.opening import create_or_open_study

ONE = ["history", "importances", "parallel", "slice", "contour", "intermediate", "timeline", "edf"]
TWO = [
    "pareto",
    *(f"{kind}-{name}" for kind in ("history", "importances", "parallel", "slice", "edf")
      for name in ("loss", "parameters")),
    "timeline",
]  # fmt: skip


@pytest.fixture
def study() -> optuna.Study:
    """Return the test's study, empty."""
    return create_or_open_study(Settings.from_env())


def two_objectives() -> optuna.Study:
    """Return a study of two objectives, in memory."""
    study = optuna.create_study(directions=["minimize", "minimize"])
    study.set_user_attr("objectives", ["loss", "parameters"])
    return study


def open_in_browser(page: Path, profile: Path) -> tuple[str, list[str]]:
    """Return the page as Chromium has built it, and what its console said."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        assert not os.environ.get("CI"), "CI has to install chromium: see .ci/run"
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    command = [
        browser, "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--dump-dom",
        "--use-angle=swiftshader", "--enable-unsafe-swiftshader",  # WebGL without a GPU
        "--enable-logging=stderr", "--v=0", "--virtual-time-budget=20000",
        "--window-size=1280,1000", f"--user-data-dir={profile}", f"file://{page}",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def drawn(dom: str) -> list[str]:
    """Return the pictures in which plotly has drawn axes or traces, in their order."""
    parts = re.split(r'<div id="plot-', dom)[1:]
    mark = re.compile(r'class="(?:trace |bars|contour|gl-canvas|points|cartesianlayer"><g)')
    return [part.split('"')[0] for part in parts if "main-svg" in part and mark.search(part)]


@pytest.mark.parametrize(("objectives", "names"), [(1, ONE), (2, TWO)])
def test_every_picture_is_drawn_in_a_browser(
    objectives: int, names: list[str], study: optuna.Study, tmp_path: Path
) -> None:
    if objectives == 2:
        study = two_objectives()
    fill(study, 60)
    page = write_report(study, Settings.from_env(), tmp_path / "report")
    assert "not drawn" not in page.read_text()
    dom, console = open_in_browser(page, tmp_path / "profile")
    assert console == []
    assert drawn(dom) == names
    pngs = [path.name for path in page.parent.glob("*.png") if path.read_bytes()[1:4] == b"PNG"]
    assert sorted(pngs) == sorted(f"{name}.png" for name in names)
    assert sorted(os.listdir(page.parent)) == sorted([*pngs, "report.html"])  # nothing left over


def test_the_browser_test_sees_a_page_that_is_broken(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text('<div id="plot-history"></div><script>Plotly.newPlot("x")</script>')
    dom, console = open_in_browser(page, tmp_path / "profile")
    assert drawn(dom) == []
    assert "Plotly is not defined" in console[0]


def test_500_trials_fit_10_mb(study: optuna.Study, run: Run, tmp_path: Path) -> None:
    fill(study, 500)
    result = run("check_best_model.py", "--report", str(tmp_path / "r"))
    assert result.returncode == 0, result.stderr
    page = tmp_path / "r" / "report.html"
    assert f"report          {page}" in result.stdout
    assert page.stat().st_size < 10e6
    text = page.read_text()
    assert "src=" not in re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.S)
    for fact in ("<td>all</td><td>500</td>", "<td>complete</td><td>298</td>", "(trial 257)"):
        assert fact in text


def test_values_of_the_user_cannot_break_the_page(study: optuna.Study, tmp_path: Path) -> None:
    for number, name in enumerate(("<b>", "</script>", "&amp;") * 3):
        trial = study.ask()
        trial.suggest_categorical("kind", ["<b>", "</script>", "&amp;"])
        trial.suggest_float("x", 0, 1)
        trial.set_user_attr("worker", name)
        study.tell(trial, number)
    study.set_user_attr("py_script", "<img src=x>.py")
    text = write_report(study, Settings.from_env(), tmp_path / "r").read_text()
    assert "&lt;img src=x&gt;.py" in text
    assert "<img" not in text.split("</script>", 1)[1]
    assert text.count("</script>") == text.count("<script")


def test_study_with_one_trial_says_what_it_cannot_draw(study: optuna.Study, tmp_path: Path) -> None:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)
    text = write_report(study, Settings.from_env(), tmp_path / "r").read_text()
    contour = text.split('id="contour"')[1]
    assert "not drawn: the study has too few trials" in contour.split("<h2")[0]
    assert 'id="plot-history"' in text


def test_empty_study_is_one_line_and_status_2(
    study: optuna.Study, run: Run, tmp_path: Path
) -> None:
    result = run("check_best_model.py", "--report", str(tmp_path / "r"))
    assert result.returncode == 2
    assert result.stderr == (
        "check_best_model.py: error: study 'mnist_hpo' has no complete trial yet: nothing to draw\n"
    )
    assert not (tmp_path / "r").exists()


def test_folder_that_is_a_file(study: optuna.Study, tmp_path: Path) -> None:
    fill(study, 3)
    (tmp_path / "r").write_text("mine")
    with pytest.raises(UserError, match="cannot be written to"):
        write_report(study, Settings.from_env(), tmp_path / "r")
    assert (tmp_path / "r").read_text() == "mine"


@pytest.mark.parametrize("image", ["", "/images/pytorch.sif"])
def test_missing_package_gives_the_command(
    image: str, study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(study, 3)
    version = importlib.metadata.version

    def all_but_one(name: str) -> str:
        if name == "plotly":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("importlib.metadata.version", all_but_one)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("APPTAINER_CONTAINER", image)
    with pytest.raises(UserError, match="needs plotly, which this Python has not") as caught:
        write_report(study, Settings.from_env(), tmp_path / "r")
    user = f"{image} pip install --user -c image.txt plotly==7.1.0"
    assert (user if image else "-m pip install plotly==7.1.0") in str(caught.value).splitlines()[-1]
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("named", "lines"),
    [
        (True, [f"worker {rank} on n{rank // 2}" for rank in range(12)]),
        (False, [f"line {rank}" for rank in range(1, 13)]),
    ],
)
def test_timeline_has_one_line_per_worker(
    named: bool, lines: list[str], study: optuna.Study
) -> None:
    fill(study, 60, workers=12, named=named)
    found = bars(study, datetime.now())
    assert list(dict.fromkeys(bar.worker for bar in found)) == lines
    for line in lines:
        mine = [bar for bar in found if bar.worker == line]
        assert all(a.end <= b.start for a, b in itertools.pairwise(mine))


def test_plotting_packages_are_imported_for_a_report_alone(run: Run) -> None:
    code = "import check_best_model, sys; print(*sys.modules)"
    folder = Path(__file__).parent.parent / "code_and_slurm-scripts"
    out = subprocess.check_output([sys.executable, "-c", code], cwd=folder, text=True).split()
    assert not {"plotly", "matplotlib", "scipy", "torch"} & set(out)
