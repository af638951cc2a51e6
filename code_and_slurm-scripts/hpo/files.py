"""Writing a file whole or not at all: a reader finds the old one or the new one, never half of one.

with whole(path) as temporary:      a name beside `path`, for this process alone
    temporary.write_text(…)         and, if nothing was raised, `path` is that file now

And what a disk or a file server says that is full, or away for a while (AWAY); and how a process
ends whose log is full, or whose script has left something behind.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# It may be well again in a minute, which a folder that nobody may write to will not be.
AWAY = {
    getattr(errno, name)
    for name in (
        *("ENOSPC", "EDQUOT", "EIO", "ESTALE", "ENOTCONN", "ETIMEDOUT", "EHOSTDOWN"),
        *("EHOSTUNREACH", "ENETUNREACH", "ECONNRESET", "ESHUTDOWN", "EREMOTEIO"),
    )
}

LONGEST_END = 60.0  # seconds, of a process whose work is done


class _Log(io.FileIO):
    """A file to which what cannot be written now is not written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in AWAY:
                raise
            return len(data)


def outlive_the_log() -> None:
    """Let no full disk of the logs end a job's process: what it prints meanwhile is lost."""
    if "SLURM_JOB_ID" not in os.environ:
        return
    for name, old in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        if not isinstance(old, io.TextIOWrapper) or old not in (sys.__stdout__, sys.__stderr__):
            continue  # a notebook's, or a test's
        if old.closed:
            continue
        old.flush()
        raw = io.BufferedWriter(_Log(old.fileno(), "w", closefd=False))
        text = io.TextIOWrapper(raw, old.encoding, old.errors, line_buffering=True)
        setattr(sys, name, text)


def end_in_time(status: int) -> None:
    """Let no thread or process that a script has left behind hold up the end of this one for long.

    Python waits for them as long as they run: a worker that has no trial left would keep its GPU.
    """

    def leave() -> None:
        # It ends when Python begins to wait: never in a notebook, which goes on after SystemExit.
        threading.main_thread().join()
        time.sleep(LONGEST_END)
        names = [thread.name for thread in threading.enumerate() if not thread.daemon]
        left = ", ".join(names[1:]) or "a process, or a function of atexit"  # the first is Python's
        with suppress(OSError, ValueError):
            print(f"left behind by the script, and ended after {LONGEST_END:.0f} s: {left}",
                  file=sys.stderr, flush=True)  # fmt: skip
        os._exit(status)

    threading.Thread(target=leave, name="longest end", daemon=True).start()


@contextmanager
def whole(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Give another name beside `path`; what is there at the end is renamed to `path`.

    `durable` files are on the disk before they have their name, so that a power cut leaves no
    empty file.  Makes the folder if there is none.  A writer that is killed leaves a file whose
    name begins with a dot; see `leftover_of`.

    Raises:
        OSError: it cannot be written; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def sync(path: Path | str) -> None:
    """Wait until a file (or a folder's list of names) is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def leftover_of(name: str) -> str:
    """Return the name of the file that was being written when this half-written one was left.

    The name itself where it is none.
    """
    match = re.fullmatch(r"\.(.+)\.[0-9a-f]{32}\.tmp", name)
    return match[1] if match else name
