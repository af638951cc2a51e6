"""A backup keeps what it has: a study that was deleted, or begun afresh, does not replace it; nor
does the older copy of a slower worker.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path

from hpo.study.engines import EngineError

NONE = -1, -1  # of a study that is not there


def refuse_loss(copy: str, target: str) -> None:
    """Raise EngineError if a backup has a study, or trials of one, that its successor has not."""
    now = _trials_by_study(copy)
    for name, trials in _trials_by_study(target).items():
        before, _ = trials
        if now.get(name, NONE)[0] < before:
            left = f"has {now[name][0]}" if name in now else "is not there"
            raise EngineError(
                f"study {name!r} {left}, and {before} trials in its backup, which stays as it is: "
                f"if that is meant, move it away: {target}"
            )


def mark(target: str) -> tuple[int, int]:
    """Return what differs when a backup has been replaced."""
    with suppress(FileNotFoundError):
        found = os.stat(target)
        return found.st_ino, found.st_mtime_ns
    return 0, 0


def has_all(target: str, copy: str) -> bool:
    """Whether a backup has all the trials of a copy, and as many that have ended."""
    kept = _trials_by_study(target)
    return all(
        all(mine <= theirs for mine, theirs in zip(trials, kept.get(name, NONE), strict=True))
        for name, trials in _trials_by_study(copy).items()
    )


def _trials_by_study(path: str) -> dict[str, tuple[int, int]]:
    """Return how many trials each study of a file has, and how many of them have ended.

    Nothing of a file that cannot be read.
    """
    sql = (
        "SELECT study_name, count(trial_id), count(CASE WHEN state IN ('COMPLETE', 'PRUNED', "
        "'FAIL') THEN 1 END) FROM studies LEFT JOIN trials USING (study_id) GROUP BY study_id"
    )
    try:
        with closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)) as db:
            return {name: (all_of_it, ended) for name, all_of_it, ended in db.execute(sql)}
    except sqlite3.Error:
        return {}
