"""A program that runs for a trial: its process group, its log, its end.

    with running(words, log, grace) as program:
        while program.wait(0.1) is None:
            …
    whatever leaves the block, the whole group has ended: SIGTERM, and SIGKILL after `grace` seconds

The program has a session of its own, so that Ctrl-C in a terminal reaches the worker alone, which
then ends it.  If the worker is killed, the program is, too: a trial that another worker goes on
with must not still be running here.  A guard sees to that, and the program waits until it is there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hpo.drain import signals_held
from hpo.settings import SCRIPTS
from hpo.words import logger

# Waits for a line from the worker; if the worker is gone instead, the program never begins.
START = 'read -r line && exec "$@" </dev/null'
# Waits likewise; if the worker is gone instead, ends the group.
GUARD = 'trap "" TERM INT; read -r line || kill -s KILL -- "-$0"'

log = logger("hpo.worker")


class Program:
    """A running program: the leader of a process group."""

    def __init__(self, words: Sequence[str], output: Path, environment: Mapping[str, str]) -> None:
        """Start it in the scripts' folder; one that is not there ends with exit status 127.

        Raises OSError.
        """
        with output.open("ab") as file:
            self._process = subprocess.Popen(
                ["sh", "-c", START, "sh", *words],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=SCRIPTS,
                env=environment,
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["sh", "-c", GUARD, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin
        with suppress(BrokenPipeError), self._process.stdin as begin:  # somebody has ended it
            begin.write(b"begin\n")

    def wait(self, seconds: float) -> int | None:
        """Return its exit status (−n if signal n ended it), or None if it still runs then."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(seconds)
        return None

    def end(self, grace: float) -> None:
        """End what is left of the group."""
        deadline = time.monotonic() + grace
        self._signal(signal.SIGTERM)
        while self._is_there() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self._is_there():
            log.warning(
                "the program did not end within %g s of SIGTERM, and was ended by SIGKILL", grace
            )
            self._signal(signal.SIGKILL)
        self._process.wait()
        self._guard.communicate(b"done\n")

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(self._process.pid, number)

    def _is_there(self) -> bool:
        """Whether a process of the group runs: a container may have no one who buries the dead."""
        if self._process.poll() is None:
            return True
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                state, _, group, *_ = stat.read_text().rpartition(")")[2].split()
                if int(group) == self._process.pid and state not in ("Z", "X"):
                    return True
        return False


@contextmanager
def running(words: Sequence[str], output: Path, grace: float) -> Iterator[Program]:
    """Run a program in this block; its output is appended to a file. Raises OSError."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # Python would keep its lines for long
    program = None
    try:
        with signals_held():
            program = Program(words, output, environment)
        yield program
    finally:
        if program:
            with signals_held():
                program.end(grace)


class Lines:
    """The lines of a file that another process writes."""

    def __init__(self, path: Path, begin: int = 0) -> None:
        """Read from byte `begin` on; the file need not be there yet."""
        self._path, self._position, self._begun = path, begin, b""

    def new(self, whole: bool = True) -> list[str]:
        """Return the lines since the last call; with `whole=False` also one that has no end.

        A progress bar's lines end with a carriage return.
        """
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._position:  # written anew
                    self._position, self._begun = 0, b""
                file.seek(self._position)
                read = file.read()
        except FileNotFoundError:
            return []
        self._position += len(read)
        lines = (self._begun + read).replace(b"\r", b"\n").split(b"\n")
        self._begun = lines.pop() if whole else b""
        return [text for line in lines if (text := line.decode(errors="replace").strip())]
