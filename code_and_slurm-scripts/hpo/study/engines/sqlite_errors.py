"""What can be wrong with a study's file, in the user's terms."""

from __future__ import annotations

import sqlite3

from hpo.study.engines import EngineError


class StudyFileError(EngineError):
    """The study's file cannot be used; the message says which file, why, and what to do."""


class StudyBusy(StudyFileError):
    """Somebody held the lock for the whole time limit, or this file system has no locks."""


class CorruptStudy(StudyFileError):
    """The file is not a healthy study. It was left untouched."""


class DiskFull(StudyFileError):
    """A write did not fit, or failed. The file is as it was: go on when the site is well."""


def explain(error: sqlite3.Error, path: str) -> Exception:
    """Return SQLite's error in the user's terms (by its text: Python 3.10 has no codes)."""
    text = str(error)
    if "not a database" in text or "malformed" in text:
        return CorruptStudy(f"{path} is damaged ({text}). It was left as it is: restore a backup.")
    if "full" in text:
        return DiskFull(f"Cannot write {path}: disk full or over quota ({text}).")
    if "disk I/O error" in text:  # SQLite does not say more
        return DiskFull(
            f"Cannot use {path}: its disk or file server fails or is away, or disk full ({text})."
        )
    if "unable to open" in text or "readonly" in text:
        return StudyFileError(
            f"Cannot open or write {path}: missing, no permission, or disk full ({text})."
        )
    return StudyFileError(f"{path}: {text}") if type(error) is sqlite3.OperationalError else error
