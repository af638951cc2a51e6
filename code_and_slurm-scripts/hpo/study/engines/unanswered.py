"""A statement that is never answered: a server that stands still keeps its connections.

To the network all is well then, and the drivers wait for ever.  A thread of this process ends the
connection of a statement that takes too long, which is an error like any other lost connection.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LONGEST = 90.0  # seconds that a statement may take: more than any wait for a lock
LOOK = 5.0  # seconds between two looks at what is under way

# The end of each statement's time (monotonic seconds), by a descriptor of its own for the socket:
# who takes it out of here may use it, and closes it.
_ends: dict[int, float] = {}
_watching: list[threading.Thread] = []  # at most one


@contextmanager
def answered(descriptor: int) -> Iterator[None]:
    """End the connection behind a socket's descriptor if this block takes LONGEST seconds."""
    if not _watching:
        _watching.append(threading.Thread(target=_watch, name="unanswered", daemon=True))
        _watching[0].start()
    mine = os.dup(descriptor)
    _ends[mine] = time.monotonic() + LONGEST
    try:
        yield
    finally:
        if _ends.pop(mine, None) is not None:
            os.close(mine)


def _watch() -> None:
    while True:
        time.sleep(LOOK)
        now = time.monotonic()
        for mine, end in _ends.copy().items():
            if end < now and _ends.pop(mine, None) is not None:
                with socket.socket(fileno=mine) as hung, suppress(OSError):
                    hung.shutdown(socket.SHUT_RDWR)


def _forget() -> None:  # the statements are the parent's, and the thread has stayed there
    _ends.clear()
    _watching.clear()


os.register_at_fork(after_in_child=_forget)
