"""The table of crowds in tests/benchmarks: its command works, and says what was lost."""

from __future__ import annotations

import subprocess
import sys

import pytest

from common import BUNDLE
from postgresql_server import wanted

FEW = "import storage_crowd as crowd\ncrowd.SECONDS = (0.2, 0.4)\nraise SystemExit(crowd.main())"


def test_a_crowd_of_a_few_loses_no_trial() -> None:
    if why := wanted():
        pytest.skip(why)
    folders = [BUNDLE / "tests" / name for name in ("benchmarks", "helpers")]
    paths = [*map(str, folders), str(BUNDLE / "code_and_slurm-scripts")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = {paths}\n{FEW}", "2", "3"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    rows = [line for line in result.stdout.splitlines() if line.endswith("   0 0 0")]
    assert [row.split()[0] for row in rows] == ["2", "2", "3", "3"] * 2
    assert not result.stderr
