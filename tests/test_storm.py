"""1 000 SIGKILLs over a 500-trial study: nothing is lost, doubled or left behind."""

from __future__ import annotations

from pathlib import Path

from storage_helpers import check_study
from storage_storm import KILLS, TRIALS, Result, print_table, storm_ours


def test_1000_kills_over_500_trials(tmp_path: Path) -> None:
    result = storm_ours(tmp_path, seed=0)
    print_table([result])
    hits, seconds = result.interrupted, result.seconds
    assert result == Result("ours", KILLS, hits, seconds, TRIALS, TRIALS, 0, 0, 0, 0, True)
    # The storm was over a study that ran, not over idle workers; on a slow machine many a kill
    # meets a worker that is still starting.
    assert hits > KILLS / 10
    check_study(tmp_path / "study.db", TRIALS)
