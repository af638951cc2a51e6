"""Whose turn it is to write next: a lock file beside the study, study.db.next.

SQLite's lock goes to who asks in the right moment.  To ask takes some ten rounds with the file
system: behind a slow link others, whose rounds are short, are always faster, and a node may wait
for ever.  So a worker takes the turn first, which is one round, and holds it until it has SQLite's
lock: who is slow queues while another one writes, and asks alone when that has ended.  It also
spares the others their asking.

Who takes the turn writes a few random bytes into the file.  So who waits sees whether it goes on:
in a crowd a turn may come after many seconds.  Who waits looks rarely then; with three hundred
that look every few milliseconds, looking would be all that the machine does.

The turn is a courtesy: whatever becomes of it, SQLite's lock alone decides who writes.  A holder
that is stopped half-way (a frozen node) is waited for once, for two times FROZEN seconds at most;
then the turn is taken only where it is free.  Where a file system has no such locks, there are no
turns.
"""

from __future__ import annotations

import fcntl
import os
import random
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

FROZEN = 5.0  # seconds after which the same holder is taken for stopped; a write takes milliseconds
PAUSE = 0.01  # seconds between two looks, at most: at first,
LONG = 0.25  # and in a crowd


class Turn:
    """A context in which this process asks for the lock of the study's file; never an error."""

    def __init__(self, path: str) -> None:
        self._path = f"{path}.next"
        self._stopped: bytes | None = None  # what the holder wrote that was waited for in vain
        self._file: int | None = None
        self._close: Callable[[], object] | None = None  # for the file

    def __enter__(self) -> None:
        with suppress(OSError):  # no such locks here, no room, no permission: then without
            if self._file is None:
                self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                self._close = weakref.finalize(self, os.close, self._file)
            if self._wait(self._file):
                self._stopped = None
                os.pwrite(self._file, os.urandom(8), 0)

    def _wait(self, file: int) -> bool:
        """Return whether this process has the turn: False if its holder stands still."""
        looks, since, seen = 0, time.monotonic(), self._stopped
        while not self._taken():
            if self._stopped is not None or time.monotonic() - since > FROZEN:
                if (holder := os.pread(file, 8, 0)) == seen:
                    self._stopped = holder
                    return False
                self._stopped, seen, since = None, holder, time.monotonic()
            time.sleep(random.uniform(0.0002, min(PAUSE * (1 + looks / 4), LONG)))
            looks += 1
        return True

    def _taken(self) -> bool:
        assert self._file is not None
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # somebody else has it; POSIX allows both
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is not None:
            with suppress(OSError):
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; the next use opens it again."""
        if self._close:
            self._close()
        self._file = self._close = None
