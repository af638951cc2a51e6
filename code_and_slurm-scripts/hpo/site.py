"""When the site, and not the program, is at fault: a full disk, a lost database, a failing sampler.

No trial fails for it.  The worker tries again for some minutes, then stops with status SITE_FAULT
(hpo/values.py).
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.exceptions import StorageInternalError

from hpo.drain import Drain
from hpo.files import AWAY
from hpo.search.guard import SearchFailed
from hpo.settings import UserError
from hpo.study.engines.sqlite_errors import CorruptStudy
from hpo.words import duration, logger, one_line, text_of

T = TypeVar("T")

GRACES = 5  # grace periods of a lease that a worker tries again
LONGEST_PAUSE = 30.0  # seconds
# What a file system or a network says when it, and not the program, is at fault.
ERRNO = AWAY | {errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENFILE, errno.ENOLCK}
WORDS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed")
INSTALLED = {"site-packages", "dist-packages"}  # folders of packages that pip or a system installs

log = logger("hpo.worker")


class SiteFault(Exception):
    """The site cannot be used, and has not been for minutes."""


def fault_of(error: BaseException) -> str:
    """Return what is wrong with the site, if that is why this was raised; "" otherwise."""
    for each in _chain(error):
        if isinstance(each, (StorageInternalError, SearchFailed)):
            return one_line(each)
        if isinstance(each, OSError) and each.errno in ERRNO:
            return one_line(each)
        if any(words in text_of(each) for words in WORDS) or _cannot_be_opened(each):
            return one_line(each)
    return ""


def _cannot_be_opened(error: BaseException) -> bool:
    """Whether torch.save could not open a file for such a reason; it gives no errno."""
    if not isinstance(error, RuntimeError):
        return False
    if found := re.search(r"open file failed with strerror: (.+)", text := text_of(error)):
        return found[1].strip() in map(os.strerror, ERRNO)
    if not (found := re.search(r"File (.+) cannot be opened", text)):  # older ones say no more
        return False
    try:  # in a folder that is there, it could have been
        os.stat(os.path.dirname(found[1]))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # away
        return True
    return not os.path.isdir(found[1])


def half_imported(error: BaseException) -> str:
    """Return which package this process has only half of; "" if that is not why this was raised.

    Its files were away while it was being imported.  What was imported of it stays in the process,
    so that only a new one helps.  A circle in the user's own modules reads alike, and is a mistake.
    """
    for each in _chain(error):
        found = re.search(r"partially initialized module '((\w+)[\w.]*)'", text_of(each))
        if found and isinstance(each, (ImportError, AttributeError)):
            spec = PathFinder.find_spec(found[2])
            if INSTALLED & set(Path(spec.origin if spec and spec.origin else "").parts):
                return f"{found[1]} was imported by half, and is in this process for good"
    return ""


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those it came from: torch hides a full disk behind one of its own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


class Patience:
    """How long a worker has waited for the site; a trial that ends well ends the wait."""

    def __init__(self, grace: float, drain: Drain) -> None:
        self._seconds, self._drain = GRACES * grace, drain
        self._begin: float | None = None
        self._pause = 0.0

    def call(self, step: Callable[[], T]) -> T:
        """Return what `step` does, called again while the site is at fault. Raises SiteFault."""
        while True:
            try:
                return step()
            except CorruptStudy as error:  # it will not be whole in a minute
                raise SiteFault(str(error)) from None
            except UserError:  # whatever it comes from, somebody has to mend it
                raise
            except Exception as error:
                if not (fault := fault_of(error)):
                    raise
                self.wait(fault)

    def wait(self, fault: str) -> None:
        """Wait a little longer each time. Raises SiteFault when it has been too long."""
        now = time.monotonic()
        if self._begin is None:
            self._begin, self._pause = now, 0.5
            log.warning("%s: trying again for %s", fault, duration(self._seconds))
        if now - self._begin > self._seconds or self._drain.is_due():
            raise SiteFault(
                f"{fault}. It is not the trial's fault, which goes back to the queue: mend it "
                "(space, quota, server), and submit again"
            )
        time.sleep(self._pause)
        self._pause = min(2 * self._pause, LONGEST_PAUSE, self._seconds / 4)

    def call_inside(self, method: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Return what a method of the running trial does, as `call`; but for the database alone."""
        begin, waited = time.monotonic(), False
        while True:
            try:
                result = method(*args, **kwargs)
            except StorageInternalError as error:
                if isinstance(error, CorruptStudy):
                    raise
                self.wait(one_line(error))
                waited = True
                continue
            if waited:
                self.restore()
                self._drain.leave_out(time.monotonic() - begin)
            return result

    def restore(self) -> None:
        """Note that all is well."""
        if self._begin is not None:
            log.info("it works again, after %s", duration(time.monotonic() - self._begin))
        self._begin = None


def wait_inside(trial: optuna.Trial, patience: Patience) -> None:
    """Let a trial's reports wait for a database that is away: no epoch is lost, nor run twice."""
    for name in ("report", "should_prune", "set_user_attr"):
        setattr(trial, name, partial(patience.call_inside, getattr(trial, name)))
