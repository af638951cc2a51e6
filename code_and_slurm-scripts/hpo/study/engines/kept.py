"""A backup keeps what it has: a study that was deleted, or begun afresh, does not replace it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from hpo.study.engines import EngineError


def refuse_loss(copy: str, target: str) -> None:
    """Raise EngineError if a backup has a study, or trials of one, that its successor has not."""
    now = _trials_by_study(copy)
    for name, trials in _trials_by_study(target).items():
        if now.get(name, -1) < trials:
            left = f"has {now[name]}" if name in now else "is not there"
            raise EngineError(
                f"study {name!r} {left}, and {trials} trials in its backup, which stays as it is: "
                f"if that is meant, move it away: {target}"
            )


def _trials_by_study(path: str) -> dict[str, int]:
    """Return how many trials each study of a file has; nothing of a file that cannot be read."""
    sql = "SELECT study_name, count(trial_id) FROM studies LEFT JOIN trials USING (study_id) "
    try:
        with closing(sqlite3.connect(f"{Path(path).as_uri()}?mode=ro", uri=True)) as db:
            return dict(db.execute(sql + "GROUP BY study_id").fetchall())
    except sqlite3.Error:
        return {}
