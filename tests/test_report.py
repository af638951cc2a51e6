"""The report: every picture drawn in a real browser, no error in its console; its limits."""

from __future__ import annotations

import csv
import importlib.metadata
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import optuna.visualization  # now: until then a stand-in, in which a test could change nothing
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState

from common import Run
from fake_study import fill
from hpo.settings import Settings, UserError
from hpo.show import facts, page, report
from hpo.show.compare import compare
from hpo.show.figures.chart import log_marks, wrapped
from hpo.show.figures.distribution import shares
from hpo.show.figures.pictures import limits, pictures_of
from hpo.show.figures.sample import thinned
from hpo.show.figures.timeline import SLOTS, bars, busy
from hpo.show.report import write_report
from hpo.show.trial_table import for_page, log_name, write_csv
from hpo.study.opening import create_or_open_study
from hpo.study.trials import best_trials, complete

KINDS = ["history", "slice", "parallel", "importances", "contour", "edf"]
ONE = ["history", "intermediate", *KINDS[1:], "timeline", "utilisation"]
TWO = [
    "pareto",
    *(
        f"{kind}-{name}"
        for name in ("1-loss", "2-parameters")
        for kind in KINDS
        if kind != "contour"
    ),
    "timeline",
    "utilisation",
]
TABLES = ["report.html", "trials-curves.csv", "trials.csv"]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw every picture, however slow the machine is."""
    monkeypatch.setattr(report, "SECONDS", float("inf"))


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
    fill(study, 60 if objectives == 1 else 24)
    page = write_report(study, Settings.from_env(), tmp_path / "report")
    assert "not drawn" not in page.read_text()
    dom, console = open_in_browser(page, tmp_path / "profile")
    assert console == []
    assert drawn(dom) == names
    made = [f"{name}.{kind}" for name in names for kind in ("png", "pdf")]
    assert sorted(os.listdir(page.parent)) == sorted([*made, *TABLES])  # nothing left over
    for name in names:
        assert (page.parent / f"{name}.png").read_bytes()[1:4] == b"PNG"
        assert (page.parent / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    rows = re.search(r'<tbody id="rows">(.*?)</tbody>', dom, re.S)  # of the page's own script
    assert rows
    best = best_trials(study)[0]
    assert re.findall(r"<tr><td>(\d+)</td><td>(\w+)<", rows[1])[0] == (str(best.number), "COMPLETE")
    assert rows[1].count("<tr>") == min(50, len(study.trials))


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
    for fact in ("<td>500 of 500</td>", "<td>complete</td><td>298</td>", "(trial 257)"):
        assert fact in text


def test_nothing_of_the_user_can_break_the_page(tmp_path: Path) -> None:
    """Markup, broken formulas, lists among the choices, numbers that no axis holds, any object."""
    study = optuna.create_study()
    choices: list[Any] = ["<b>", "</script>", "&amp;", [1, 2], [3], None, "$\\sqrt"]
    for number in range(21):
        trial = study.ask()
        trial.suggest_categorical("$\\frac{", choices)
        trial.suggest_float("x$_{", 0, 1)
        trial.set_user_attr("worker", f"<b>{number % 3}")
        trial.set_user_attr("object", {(1, 2): object()})
        trial.report([1e308, -1e308, float("nan"), 0.5][number % 4], 0)
        study.tell(trial, [1e308, -1e308, float("inf"), *range(12)][number % 15])
    study.set_user_attr("py_script", "<img src=x>.py")
    study.set_user_attr("objectives", ["$\\frac{ loss"])
    text = write_report(study, Settings.from_env(), tmp_path / "r").read_text()
    assert "&lt;img src=x&gt;.py" in text
    assert "<img" not in text.split("</script>", 1)[1]
    assert text.count("</script>") == text.count("<script")
    assert "<td>6 with values that are infinite or beyond ±1e+100</td>" in text
    assert "not drawn: " not in text
    assert len(list((tmp_path / "r").glob("*.pdf"))) == len(ONE)


def test_study_with_one_trial_says_what_it_cannot_draw(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)

    def broken(*arguments: Any, **options: Any) -> None:
        raise OverflowError("any error")

    monkeypatch.setattr(optuna.visualization, "plot_slice", broken)
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "contour.png").touch()  # of an earlier report
    text = write_report(study, Settings.from_env(), tmp_path / "r").read_text()
    parts = {part.split('"')[0]: part for part in text.split('<h2 id="')[1:]}
    assert "not drawn: 1 complete trials would say nothing: it takes 10" in parts["contour"]
    assert "not drawn: OverflowError: any error" in parts["slice"]
    assert 'id="plot-history"' in parts["history"]
    assert not (tmp_path / "r" / "contour.png").exists()


def test_pictures_that_there_is_no_time_for_are_left_out(
    study: optuna.Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job has little time left for its report; the tables and the rest of the page stay."""
    monkeypatch.setattr(report, "SECONDS", 0.0)
    fill(study, 12)
    text = write_report(study, Settings.from_env(), tmp_path / "r").read_text()
    assert text.count("not drawn: the pictures before it took 0 s") == len(ONE)
    assert 'id="plot-' not in text
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == TABLES


def test_page_of_a_study_without_a_result(study: optuna.Study, run: Run, tmp_path: Path) -> None:
    for _ in range(2):
        trial = study.ask()
        trial.set_user_attr("fail_reason", "no such file")
        study.tell(trial, state=TrialState.FAIL)
    result = run("check_best_model.py", "--report", str(tmp_path / "r"))
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "r" / "report.html").read_text()
    assert "not drawn: no trial is complete yet" in text
    assert "<td>2 ×</td><td>no such file</td>" in text


def test_ten_thousand_trials_are_thinned() -> None:
    study = optuna.create_study()
    fill(study, 2000)
    trials = complete(study)
    few = thinned(trials, 100, study.directions)
    assert 90 <= len(few) <= 110
    assert best_trials(study)[0] in few
    numbers = [trial.number for trial in few]
    assert numbers == sorted(numbers)
    assert numbers[0] == trials[0].number
    assert numbers[-1] >= trials[-50].number
    text, number = for_page(study.trials, Settings.from_env(), ["value"], [1999, 7])
    assert [row[0] for row in json.loads(text)["rows"]][:3] == [1999, 7, 0]
    assert number == 2000


def test_page_says_what_of_ten_thousand_trials_is_drawn() -> None:
    study = optuna.create_study()
    fill(study, 3000)
    study.add_trials([optuna.create_trial(value=50.0) for _ in range(10)])
    number = len(complete(study))
    pictures = {picture.name: picture for picture in pictures_of(study, ["loss"])}
    for name in ("history", "slice", "parallel"):
        assert re.search(rf"Drawn are \d+ of {number} trials", pictures[name].says), name
        assert "  10 trials are worse than " in pictures[name].says
    assert re.search(rf"between \d+ of {number} complete trials", pictures["importances"].says)
    assert re.search(rf"; from \d+ of {number} trials", pictures["contour"].says)
    assert "Drawn are the latest 1000 of 3010 trials" in pictures["timeline"].says
    # The distribution is that of all, not of those that are drawn elsewhere.
    assert f"The share of {number} complete trials" in pictures["edf"].says
    values = [trial.values[0] for trial in complete(study)]
    line = pictures["edf"].draw(optuna.visualization).data[0]
    for x, y in list(zip(line.x, line.y, strict=True))[1:-1]:
        assert y == pytest.approx(sum(value <= x for value in values) / number, abs=0.01)
    # One bad value does not take all colours.
    assert max(pictures["parallel"].draw(optuna.visualization).data[-1].marker.color) < 1


def test_shares_of_a_maximised_value() -> None:
    assert shares([3.0, 1.0], StudyDirection.MINIMIZE) == ([1.0, 1.0, 3.0], [0.0, 0.5, 1.0])
    assert shares([3.0, 1.0], StudyDirection.MAXIMIZE) == ([1.0, 1.0, 3.0], [1.0, 0.5, 0.0])
    x, y = shares([float(value) for value in range(10_000)], StudyDirection.MINIMIZE)
    assert len(x) == len(y) <= 1001
    assert (x[-1], y[-1]) == (9999.0, 1.0)


def test_names_and_marks_fit_small_axes() -> None:
    assert wrapped("learning_rate_of_the_encoder", "|") == "learning_rate_of_|the_encoder"
    assert wrapped("lr", "|") == "lr"
    assert log_marks(2e-6, 0.2) == [1e-5, 1e-3, 0.1]
    assert log_marks(2e-4, 5e-3) == [3e-4, 3e-3]
    assert log_marks(1.5, 6.0) == [2.0, 5.0]
    assert log_marks(2.2, 2.8) == []
    assert page.pairs({"conv1_channels": "a/b_c"}) == (
        '<table class="facts"><tr><td>conv1_<wbr>channels</td><td>a/<wbr>b_<wbr>c</td></tr></table>'
    )


def test_page_fits_a_sheet_of_paper(study: optuna.Study, tmp_path: Path) -> None:
    """What is wider than the sheet is drawn smaller as a whole: nothing lies beyond its edge."""
    fill(study, 4)
    path = write_report(study, Settings.from_env(), tmp_path / "r")
    path.write_text(path.read_text().replace("</body>", "<script>onbeforeprint()</script></body>"))
    dom, console = open_in_browser(path, tmp_path / "profile")
    assert console == []
    boxes = re.findall(r'class="panels" style="min-width: (\d+)px; zoom: ([\d.]+);', dom)
    assert len(boxes) == dom.count('class="panels"') == len(drawn(dom))
    assert all(max(int(width), 850) * float(zoom) == pytest.approx(680) for width, zoom in boxes)


def test_axis_leaves_out_a_few_very_bad_values() -> None:
    values = [*(0.1 * index for index in range(20)), 1000.0]
    low, high = limits(values, StudyDirection.MINIMIZE) or (0.0, 0.0)
    assert low < 0 < 1.9 < high < 10
    low, high = limits([-value for value in values], StudyDirection.MAXIMIZE) or (0.0, 0.0)
    assert -10 < low < -1.9 < 0 < high
    assert limits(values[:20], StudyDirection.MINIMIZE) is None  # all of them fit


def test_hours_and_what_pruning_has_saved() -> None:
    study = optuna.create_study()
    start = datetime(2026, 3, 1, 12)
    for worker, begin, epochs in ((0, 0, 4), (0, 4, 4), (1, 2, 1)):  # in hours
        pruned = epochs == 1
        trial = optuna.create_trial(
            state=TrialState.PRUNED if pruned else TrialState.COMPLETE,
            value=None if pruned else 1.0,
            intermediate_values=dict.fromkeys(range(epochs), 1.0),
            user_attrs={"worker": f"worker {worker} on n1, job 7.1"},
        )
        trial.datetime_start = start + timedelta(hours=begin)
        trial.datetime_complete = trial.datetime_start + timedelta(hours=epochs)
        study.add_trial(trial)
    found = facts.times(study)
    assert found["worker hours"].startswith("9.00 h")
    assert found["running"] == "8.0 h, with at most 2 trials at once"
    assert found["utilisation"] == "56 % of 2 workers"
    assert found["saved by pruning"] == "about 3.00 h: 1 pruned trials did 1 of 4 epochs"
    assert [log_name(trial, Settings.from_env()) for trial in study.trials][1:] == [
        "7.0.out",
        "7.1.out",
    ]
    when, numbers = busy(bars(study, datetime.now()))
    assert (when[0], when[-1]) == (start, start + timedelta(hours=8))
    assert sum(numbers) / SLOTS == pytest.approx(9 / 8)


def test_settings_show_no_password(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLER", "tpe:n_startup_trials=20")
    study.set_user_attr("sampler", "tpe")
    study.set_user_attr("total_trials", 42)
    url = "postgresql+psycopg2://me:se@cret@host/db"
    rows = facts.settings_of(study, replace(Settings.from_env(), study_db=url))
    assert rows["STUDY_DB"] == "postgresql+psycopg2://me:***@host/db"
    assert (rows["SAMPLER"], rows["TOTAL_TRIALS"]) == ("tpe:n_startup_trials=20", "42")
    assert rows["TRAIN_IMAGES"] == "200"
    assert rows["versions"].startswith("Python 3.")


def test_csv_has_every_trial_and_every_report(study: optuna.Study, tmp_path: Path) -> None:
    fill(study, 24)
    trial = study.ask()
    trial.set_user_attr("size", {"a": [1]})
    study.tell(trial, 0.1 + 0.2)
    paths = write_csv(study, Settings.from_env(), ["loss"], tmp_path / "all.csv")
    trials, curves = ([*csv.DictReader(path.open(encoding="utf-8-sig"))] for path in paths)
    assert [path.name for path in paths] == ["all.csv", "all-curves.csv"]
    assert len(trials) == 25
    assert trials[11]["fail_reason"] == "out of memory (MemoryError)"
    assert float(trials[24]["loss"]) == 0.1 + 0.2  # all digits
    assert trials[24]["user_attrs_size"] == '{"a": [1]}'
    assert trials[0]["params_batch_size"] == str(study.trials[0].params["batch_size"])
    assert trials[0]["log"] == "local.0.out"
    reports = [(t.number, s, v) for t in study.trials for s, v in t.intermediate_values.items()]
    assert [(int(r["number"]), int(r["step"]), float(r["value"])) for r in curves] == reports
    with pytest.raises(UserError, match="cannot be written"):
        write_csv(study, Settings.from_env(), ["loss"], tmp_path / "all.csv" / "x.csv")


def test_csv_replaces_an_older_one_alone(study: optuna.Study, tmp_path: Path) -> None:
    def write(path: Path) -> None:
        write_csv(study, Settings.from_env(), ["loss"], path)

    write(tmp_path / "all.csv")
    study.add_trial(optuna.create_trial(value=0.5))
    write(tmp_path / "all.csv")
    assert "0.5" in (tmp_path / "all.csv").read_text()
    (tmp_path / "link.csv").symlink_to("all.csv")
    study.add_trial(optuna.create_trial(value=0.75))
    write(tmp_path / "link.csv")
    assert (tmp_path / "link.csv").is_symlink()
    assert "0.75" in (tmp_path / "all.csv").read_text()
    (tmp_path / "all.csv").write_text('"number";"state"\n')  # saved by a spreadsheet
    write(tmp_path / "all.csv")
    (tmp_path / "my.py").write_text("number = 3\n")
    (tmp_path / "new-curves.csv").write_bytes(b"\n\xff\xfe")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in (tmp_path / "my.py", tmp_path / "new.csv", tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="is there already, and is no table of trials"):
            write(path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_csv_keeps_any_text_and_runs_nothing(study: optuna.Study, tmp_path: Path) -> None:
    texts = {
        "plain": 'a, "b"\nc; d',
        "français": "é Ω 中",
        "formula": "=cmd|' /C calc'!A0",
        "at": "@SUM(1)",
        "minus": -1.5,
        "=name": "+1",
    }
    trial = study.ask()
    for name, text in texts.items():
        trial.set_user_attr(name, text)
    study.tell(trial, -2.0)
    path, _ = write_csv(study, Settings.from_env(), ["loss"], tmp_path / "all.csv")
    (row,) = csv.DictReader(path.open(encoding="utf-8-sig", newline=""))
    assert float(row["loss"]) == -2.0  # numbers stay numbers
    found = {name: row[f"user_attrs_{name}"] for name in texts}
    changed = {"formula": "'=cmd|' /C calc'!A0", "at": "'@SUM(1)", "minus": "-1.5", "=name": "'+1"}
    assert found == texts | changed


def test_two_studies_side_by_side(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    other = create_or_open_study(Settings.from_env(STUDY_NAME="other", TRAIN_IMAGES="2000"))
    create_or_open_study(Settings.from_env(STUDY_NAME="up", DIRECTION="maximize"))
    fill(study, 24)
    fill(other, 12)
    settings = Settings.from_env(STUDY_NAME="other")
    text = compare(["mnist_hpo", "other"], settings).read_text()
    assert '<tr class="different"><td>TRAIN_IMAGES</td><td>200</td><td>2000</td></tr>' in text
    assert "<tr><td>finished</td><td>24 of 500</td><td>12 of 500</td></tr>" in text
    assert "not drawn" not in text
    for names, why in ((["other"], "takes 2"), (["other", "up"], "maximize"), (["x", "up"], "'x'")):
        with pytest.raises(UserError, match=why):
            compare(names, settings)


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
