"""Writing a file whole or not at all: a reader finds the old one or the new one, never half of one.

with whole(path) as temporary:      a name beside `path`, for this process alone
    temporary.write_text(…)         and, if nothing was raised, `path` is that file now
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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
