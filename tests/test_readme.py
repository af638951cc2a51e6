"""The documents: both languages alike, and every command, file, setting and message is real."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from common import BUNDLE, SCRIPTS
from hpo import settings

MANUALS = ("README.txt", "LISEZMOI.txt")
SITES = ("code_and_slurm-scripts/OTHER_SITE.txt", "code_and_slurm-scripts/AUTRE_SITE.txt")
PAGES = ("code_and_slurm-scripts/OWN_MODEL.txt", "code_and_slurm-scripts/MON_MODELE.txt")
SYMPTOMS = ("code_and_slurm-scripts/SYMPTOMS.txt", "code_and_slurm-scripts/SYMPTOMES.txt")
BASES = ("code_and_slurm-scripts/DATABASES.txt", "code_and_slurm-scripts/BASES.txt")
ENGLISH_ONLY = (
    "tests/benchmarks/README.txt",
    "tests/plain_training/README.txt",
    "tests/plain_loops/README.txt",
)
TEXTS = {
    name: (BUNDLE / name).read_text()
    for name in (*MANUALS, *PAGES, *SITES, *BASES, *SYMPTOMS, *ENGLISH_ONLY)
}
CODE = "".join(path.read_text() for path in sorted(SCRIPTS.rglob("*.[ps][yh]")))
BATCH = (SCRIPTS / "run-optuna-multinode_Turpan.sh").read_text()
# A line to type: settings, a program, its arguments; "  # …" says something about it.
COMMAND = re.compile(
    r"^    ((?:[A-Z_]+=\S+ )*(?:bash|sbatch|srun|in_image|tar|cd|cp|mv|rm|git|ssh|squeue|"
    r"\S*\.venv\S*/bin/\S+|IMAGE=|in_image\(\)).*?)(?:  +# .*)?$",
    re.M,
)
MADE_BY_A_RUN = {
    "gpu-figures.txt",
    "image.txt",
    "model.txt",
    "my_model.py",
    "study.db",
    "report.html",
    "load_model.py",
    "pairs.tsv",
}


def commands(name: str) -> list[str]:
    """Return the lines of a document that are commands to copy."""
    return COMMAND.findall(TEXTS[name])


@pytest.mark.parametrize(("english", "french"), [MANUALS, PAGES, SITES, BASES])
def test_both_languages_have_the_same_commands_and_chapters(english: str, french: str) -> None:
    assert commands(english) == commands(french)
    assert len(commands(english)) >= (2 if english in (*SITES, *BASES) else 6)
    chapters = re.findall(r"^(\d+)\. [A-Z]", TEXTS[english], re.M)
    assert chapters == [str(number) for number in range(1, len(chapters) + 1)]
    assert len(chapters) >= (6 if english in BASES else 8)
    assert chapters == re.findall(r"^(\d+)\. [A-ZÀÉ]", TEXTS[french], re.M)


@pytest.mark.parametrize("name", TEXTS)
def test_a_document_fits_a_terminal(name: str) -> None:
    assert max(map(len, TEXTS[name].splitlines())) <= 80
    if name in MANUALS:
        assert len(TEXTS[name].splitlines()) <= 200


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    named = set(re.findall(r"[\w/.-]*\w\.(?:py|sh|toml|txt)\b", TEXTS[name]))
    folders = (BUNDLE, SCRIPTS, BUNDLE / "tests", (BUNDLE / name).parent)
    missing = {
        path
        for path in named
        if Path(path).name not in MADE_BY_A_RUN
        and not any((folder / path).exists() for folder in folders)
    }
    assert not missing


@pytest.mark.parametrize("name", TEXTS)
def test_scripts_that_are_called_know_their_options(name: str) -> None:
    """`python check_best_model.py --report` is an option of check_best_model.py, and so on."""
    called = re.findall(r"(?:python3?|bash) (\S+\.(?:py|sh))((?: --?[a-z]+)*)", TEXTS[name])
    for script, options in called:
        path = BUNDLE / script if (BUNDLE / script).exists() else SCRIPTS / Path(script).name
        if path.name == "my_model.py":  # a copy of the example, whose option is the worker's
            path = SCRIPTS / "hpo" / "worker.py"
        for option in options.split():
            assert option in path.read_text(), f"{script} {option}"


@pytest.mark.parametrize("name", MANUALS)
def test_settings_and_their_defaults_are_those_of_the_code(name: str) -> None:
    chapter = TEXTS[name].split("\n6. ")[1].split("\n7. ")[0]
    rows = dict(re.findall(r"^    ([A-Z_]+) +\S.*?  +(\S.*)$", chapter, re.M))
    config = dict(re.findall(r'^([A-Z_]+)="\$\{\1:?-(.*?)\}"', BATCH, re.M))
    assert list(rows)[: len(config)] == list(config)
    for variable, default in config.items():
        shown = Path(default).name if variable == "CONTAINER" else default
        assert shown.startswith(rows[variable].split()[0].removesuffix("…")), variable
    for variable, default in settings.DEFAULTS.items():
        if variable in rows and default:
            assert rows[variable].split()[0] == default, variable
    local = (SCRIPTS / "run-optuna-local.sh").read_text()
    for variable in ("TOTAL_TRIALS", "SEED"):
        default = re.search(rf"{variable}:?-(\d+)", local)
        assert default
        assert re.search(rf"\(local ?: {default[1]}\)$", rows[variable])


def test_the_table_of_all_settings_has_those_of_the_readme() -> None:
    """But for those that the batch script alone reads."""
    command = [sys.executable, "-m", "hpo.settings"]
    table = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, check=True).stdout
    chapter = TEXTS["README.txt"].split("\n6. ")[1].split("\n7. ")[0]
    rows = set(re.findall(r"^    ([A-Z_]+) {2}", chapter, re.M))
    assert len(rows) >= 10
    for variable in rows - {"CONTAINER", "BINDS", "CHAIN_JOBS"}:
        assert re.search(rf"^ *{variable}\b", table, re.M), variable


@pytest.mark.parametrize("name", PAGES)
def test_every_sampler_and_pruner_is_explained(name: str) -> None:
    for choice in (*settings.SAMPLERS, *settings.PRUNERS):
        assert re.search(rf"^(?: +|[A-Z]+=){choice} {{2}}", TEXTS[name], re.M), choice


@pytest.mark.parametrize("name", SYMPTOMS)
def test_messages_that_are_quoted_are_in_the_code(name: str) -> None:
    quoted = re.findall(r'"(.+?)"', TEXTS[name])
    assert len(quoted) >= 20
    for message in quoted:
        for part in filter(None, message.split("…")):  # … is what differs from case to case
            assert part.strip() in CODE, message


@pytest.mark.parametrize(("manual", "page"), list(zip(MANUALS, SYMPTOMS, strict=True)))
def test_the_manual_s_symptoms_are_those_of_the_page(manual: str, page: str) -> None:
    chapter = TEXTS[manual].split("\n8. ")[1].split("\n9. ")[0]
    symptoms = re.split(r"\n(?=\S)", chapter)[1:-1]
    assert len(symptoms) >= 6
    assert [text for text in symptoms if text.strip("\n") not in TEXTS[page]] == []


def test_both_pages_of_symptoms_quote_the_same() -> None:
    english, french = (re.findall(r'"(.+?)"', TEXTS[page]) for page in SYMPTOMS)
    assert english == french


def test_the_image_is_the_one_of_the_batch_script() -> None:
    image = re.search(r"CONTAINER-(.*?)\}", BATCH)
    assert image
    assert f"IMAGE={image[1]}" in commands("README.txt")


def test_the_words_of_run_sh_are_known() -> None:
    words = re.findall(r"^    bash tests/run\.sh (\w+)", TEXTS["README.txt"], re.M)
    script = (BUNDLE / "tests" / "run.sh").read_text()
    assert words
    assert [word for word in words if not re.search(rf"^ +{word}\)", script, re.M)] == []


def test_versions_stand_in_no_document() -> None:
    for name in (*MANUALS, *PAGES):
        assert not re.search(r"==\d", TEXTS[name]), name


def test_the_hyphen_of_the_guide() -> None:
    script = SCRIPTS / "run-optuna-multinode-Turpan.sh"
    assert script.read_text() == BATCH
    assert os.readlink(script) == "run-optuna-multinode_Turpan.sh"


APPTAINER = """#!/bin/bash
# Stands for apptainer: shows what it was given, a word a line.
printf '%s\\n' "$@" "STUDY_NAME=$STUDY_NAME"
"""


def test_in_image_runs_a_command_in_the_container(tmp_path: Path) -> None:
    """The two lines that a reader pastes, and then a command of chapter 4 as it is printed."""
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(APPTAINER)
    apptainer.chmod(apptainer.stat().st_mode | stat.S_IXUSR)
    lines = [line for line in commands("README.txt") if line.startswith(("IMAGE=", "in_image()"))]
    assert len(lines) == 2
    [typed] = [line for line in commands("README.txt") if line.startswith("STUDY_NAME=")]
    shown = subprocess.run(
        ["bash", "-euc", "\n".join([*lines, typed])],
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    image = lines[0].removeprefix("IMAGE=")
    before = f"exec --bind /tmpdir,/work --nv {image}"
    assert shown.split() == f"{before} python check_best_model.py STUDY_NAME=mine".split()


@pytest.mark.parametrize("name", MANUALS)
def test_going_back_to_the_backup(name: str, tmp_path: Path) -> None:
    """The commands for a damaged study leave the copy in its place, and nothing deleted."""
    for file, content in {
        "study.db": "bad",
        "study.db-journal": "x",
        "study.db.backup": "ok",
    }.items():
        (tmp_path / file).write_text(content)
    typed = [line for line in commands(name) if line.startswith(("mv ", "cp study"))]
    assert len(typed) == 2
    subprocess.run(["bash", "-euc", "\n".join(typed)], cwd=tmp_path, check=True)
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"study.db": "ok", "study.db.damaged": "bad", "study.db.backup": "ok"}
