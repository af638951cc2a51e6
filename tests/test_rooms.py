"""The house: what each room may do.  Which way its arrows point, the lint step says (pyproject)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hpo
from common import BUNDLE, SCRIPTS
from hpo import script

WITHOUT = ("NEEDS", "NO_EPOCHS", "export_model")  # what the first example does not offer
ROOMS = sorted((SCRIPTS / "hpo").rglob("*.py"))


def test_looking_at_a_study_needs_no_torch() -> None:
    """Nothing in study, search, show or job imports it before a function needs it."""
    folders = ("study", "search", "show", "job")
    names = [
        ".".join(path.relative_to(SCRIPTS).with_suffix("").parts)
        for path in ROOMS
        if path.relative_to(SCRIPTS / "hpo").parts[0] in folders and path.stem != "__init__"
    ]
    assert len(names) > 20
    code = f"import sys, {', '.join(names)}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("path", ROOMS, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_a_room_is_read_once_from_top_to_bottom(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 340
    assert text.startswith('"""')
    if path.stem != "optuna_private":
        assert not re.search(r"^(?:from|import) optuna\S*\._", text, re.M)
        assert not re.search(r"\b(?:study|trial|frozen|t)\._(?:storage|study_id|trial_id)\b", text)
    if path.parent.name != "train":
        assert "MNIST" not in text, "a word of one example"


def test_at_most_a_dozen_files_at_one_level() -> None:
    for folder in {path.parent for path in ROOMS}:
        assert len(list(folder.glob("*.py"))) <= (14 if folder.name == "hpo" else 12), folder


def test_the_contract_names_what_is_there() -> None:
    for name in hpo.__all__:
        assert getattr(hpo, name) is not None
    with pytest.raises(AttributeError, match="offers no 'run_workers'; it offers Settings"):
        getattr(hpo, "run_workers")  # noqa: B009
    assert hpo.__doc__
    table = hpo.__doc__.split("without it\n")[1].split("\n\n")[0]
    offered = re.findall(r"^    (\w+) ", table, re.M)
    code = "".join(path.read_text() for path in [*ROOMS, *SCRIPTS.glob("*.py")])
    assert {"objective", "search_space", "prepare", "NEEDS"} <= set(offered)
    for name in set(offered) - {"objective", "finite_space", "numeric_space"}:
        assert f'"{name}"' in code, f"nobody asks for {name}"
    example = script.Script("optuna_mnist.py", {}).py_script
    assert all(script.defines(example, name) or name in WITHOUT for name in offered)


def test_old_import_lines_still_work() -> None:
    from hpo import checkpoint
    from hpo.settings import run_script
    from hpo.worker import run_worker

    assert (hpo.run_script, hpo.run_worker, hpo.checkpoint) == (run_script, run_worker, checkpoint)


def test_versions_are_those_of_one_file() -> None:
    """requirements-container.txt: pyproject's groups follow it, and nothing else has a version."""
    from hpo.packages import pinned

    known = pinned()
    text = (BUNDLE / "pyproject.toml").read_text()
    groups = {name: text.split(f"\n{name} = [")[1].split("\n]")[0] for name in ("run", "floor")}
    floor = dict(re.findall(r'"([\w-]+)==([\w.]+)"', groups["floor"]))
    for package, requirement in known.items():
        if package not in ("grpcio", "protobuf", "psycopg"):  # in the group `test`
            assert floor[package] == requirement.split("==")[1]
        assert f'"{requirement}' in text
    assert not {"torch", "torchvision", "numpy"} & known.keys()
    for path in [*ROOMS, *SCRIPTS.glob("*.py"), *SCRIPTS.rglob("*.sh"), BUNDLE / "README.txt"]:
        for package, requirement in known.items():
            assert not re.search(rf"\b{package}==\d", path.read_text()) or path.name in (
                "packages.py",
                "opening.py",
            ), f"{requirement} in {path}"
