"""One file that is being written while the trial goes on, and the rule when that is worth it.

    begin(write)        a thread calls it, once the writing before has ended
    wait()              until nothing is being written; raises what was raised there
    timed(write)        calls it here, and notes how long it took

A signal may interrupt the trial's thread anywhere, and so leave any lock of Python's that it was
waiting for locked for ever.  Hence plain values that are looked at again and again, and a thread
that is started anew where its start was interrupted: whichever comes first writes.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

SLOW = 0.5  # seconds that a GPU may be held up
LARGEST = 4 * 2**30  # bytes of a copy in the memory of the CPU, which the job may have little of
PAUSE = 0.02  # seconds between two looks


@dataclass
class _Writing:
    """A file that is written by a thread, never by the trial's own."""

    write: Callable[[], int]
    begun: threading.Lock = field(default_factory=threading.Lock)  # never waited for
    done: bool = False
    error: BaseException | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="checkpoint", daemon=True).start()

    def _run(self) -> None:
        if not self.begun.acquire(blocking=False):
            return
        try:
            timed(self.write)
        except BaseException as error:  # wait() raises it in the trial's own thread
            self.error = error
        self.done = True


class _Last:
    """The last writing of this process."""

    seconds = 0.0
    size = 0  # bytes


_running: list[_Writing] = []  # at most one


def worth_it() -> bool:
    """Whether the next state should be written by a thread: a GPU would wait for long.

    On a CPU the thread would take from the training what it saves.
    """
    return _uses_gpu() and _Last.seconds > SLOW and _Last.size <= LARGEST


def _uses_gpu() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def timed(write: Callable[[], int]) -> None:
    """Call what writes a file and returns its size in bytes, and note both."""
    begin = time.monotonic()
    size = write()
    _Last.seconds, _Last.size = time.monotonic() - begin, size


def begin(write: Callable[[], int]) -> None:
    """Let a thread call `write`, as timed() does.  Raises what wait() does."""
    wait()
    writing = _Writing(write)
    _running.append(writing)
    writing.start()


def wait() -> None:
    """Wait until nothing is being written.

    Raises:
        OSError, or whatever else the writing has raised: the file is what it was before.
    """
    while _running and not _running[0].done:
        time.sleep(PAUSE)
        if not _running[0].begun.locked():
            _running[0].start()
    if _running and (error := _running.pop().error):
        raise error
