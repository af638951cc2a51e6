"""README.txt and LISEZMOI.txt: the same chapters and commands, and every name in them exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common import BUNDLE, SCRIPTS
from hpo import settings

TEXTS = {name: (BUNDLE / name).read_text() for name in ("README.txt", "LISEZMOI.txt")}
COMMAND = re.compile(
    r"^    ((?:[A-Z_]+=\S+ )*(?:bash|sbatch|python|tar|cd|cp|mv|rm|pip|apptainer|squeue|\.venv).*)$"
)


def commands(text: str) -> list[str]:
    """Return the lines of a text that are commands to copy."""
    return [match[1] for line in text.splitlines() if (match := COMMAND.match(line))]


def test_both_languages_have_the_same_commands_and_chapters() -> None:
    english, french = TEXTS.values()
    assert commands(english) == commands(french)
    assert len(commands(english)) >= 10
    assert len(re.findall(r"^\d+\. ", english, re.M)) == 12
    assert re.findall(r"^(\d+)\. ", english, re.M) == re.findall(r"^(\d+)\. ", french, re.M)


@pytest.mark.parametrize("name", TEXTS)
def test_files_that_are_named_exist(name: str) -> None:
    for path in re.findall(r"^ +([\w/.-]+\.(?:py|sh|toml|txt)) ", TEXTS[name], re.M):
        folder = BUNDLE if (BUNDLE / path).exists() else SCRIPTS
        assert (folder / path).exists(), path


@pytest.mark.parametrize("name", TEXTS)
def test_settings_and_their_defaults_are_those_of_the_code(name: str) -> None:
    text = TEXTS[name]
    local = (SCRIPTS / "run-optuna-local.sh").read_text()
    batch = (SCRIPTS / "run-optuna-multinode_Turpan.sh").read_text()
    config = re.findall(r'^([A-Z_]+)="\$\{\1:-(.*?)\}"', batch, re.M)
    assert len(config) == 7
    for variable, default in config:
        row = re.search(rf"^    {variable} .*\S", text, re.M)
        assert row, f"{variable} is missing"
        if variable not in ("CONTAINER", "PRUNER"):
            assert default in row[0]
    for choice in (*settings.SAMPLERS, *settings.PRUNERS):
        assert re.search(rf"\b{choice}\b", text), choice
    for variable in ("TOTAL_TRIALS", "SEED"):
        default = re.search(rf"{variable}:?-(\d+)", local)
        assert default
        assert re.search(rf"^    {variable} .*\(local ?: {default[1]}\)$", text, re.M)


@pytest.mark.parametrize("name", TEXTS)
def test_messages_that_are_quoted_are_in_the_code(name: str) -> None:
    chapter = TEXTS[name].split("\n11. ")[1].split("\n12. ")[0]
    code = "".join(path.read_text() for path in sorted(SCRIPTS.rglob("*.[ps][yh]")))
    quoted = re.findall(
        r"^(?:error: )(?:study 'mnist_hpo' )?(?:\.\.\. )?(.*?)(?: \.\.\.)?$", chapter, re.M
    )
    assert len(quoted) == 3
    for message in [*quoted, "trials in a row failed, none succeeded", "out of memory"]:
        assert message in code, message


def test_the_image_is_the_one_of_the_batch_script() -> None:
    batch = Path(SCRIPTS / "run-optuna-multinode_Turpan.sh").read_text()
    image = re.search(r"CONTAINER:-(.*?)\}", batch)
    assert image
    assert TEXTS["README.txt"].count(image[1]) == 3
