"""Who writes next has a turn (study.db.next): who is slow, stopped, or without such locks."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from common import HELPERS
from hpo.study.engines import turn
from hpo.study.engines.sqlite_file import StudyFile
from storage_helpers import fork, kill, make_study, wait, write_line

LIMIT = 240.0  # seconds, for what takes a few: only a test that fails waits so long


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_study(tmp_path)


def write(path: Path, log: Path, times: int) -> None:
    """Write again and again, without a pause."""
    file = StudyFile(path)
    for _ in range(times):
        with file.write() as db:
            db.execute("UPDATE studies SET study_name = study_name")
        write_line(log, "written 0")


def ended(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a process ended well in time."""
    try:
        return process.wait(LIMIT) == 0
    except subprocess.TimeoutExpired:
        process.kill()
        return False


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_a_node_behind_a_slow_link_has_its_turn(path: Path) -> None:
    """Beside two that write all the time; without turns it does not write once in a minute."""
    library = path.with_name("slow_link.so")
    source = HELPERS / "slow_link.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    log = path.with_name("fast")
    fast = [fork(write, path, log, 10**9) for _ in range(2)]
    code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\nimport test_turn\n"
    code += f"test_turn.write(Path({str(path)!r}), Path({str(path.with_name('slow'))!r}), 10)"
    slow = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "LD_PRELOAD": str(library), "DELAY": "5000"},
    )
    try:
        assert ended(slow)
    finally:
        for pid in fast:
            kill(pid)


def _stop_in_ones_turn(path: Path) -> None:
    with turn.Turn(str(path)):
        os.kill(os.getpid(), signal.SIGSTOP)


def test_who_is_stopped_in_its_turn_stops_nobody(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = fork(_stop_in_ones_turn, path)
    os.waitpid(stopped, os.WUNTRACED)
    try:
        log = path.with_name("log")
        code = f"import sys; sys.path[:0] = {sys.path!r}\nfrom pathlib import Path\n"
        code += f"import test_turn\ntest_turn.write(Path({str(path)!r}), Path({str(log)!r}), 3)"
        begin = time.monotonic()
        assert ended(subprocess.Popen([sys.executable, "-c", code]))
        assert time.monotonic() - begin > turn.FROZEN  # it did wait, once
        monkeypatch.setattr(turn, "FROZEN", 0.1)
        file = StudyFile(path)
        with file.write():
            pass
        monkeypatch.setattr(turn, "time", SimpleNamespace(monotonic=time.monotonic))  # no sleep
        with file.write():
            pass
    finally:
        kill(stopped)
    monkeypatch.undo()
    with file.write():  # it is free: from now on it is waited for again
        pass
    assert file._turn._stopped is None


def test_in_a_crowd_the_turn_is_waited_for_and_seldom_looked_at(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others write for two minutes of a clock that only sleep() moves: it never goes without."""
    holder = fork(_stop_in_ones_turn, path)
    os.waitpid(holder, os.WUNTRACED)
    looks, seconds = 0, 0.0

    def sleep(pause: float) -> None:
        nonlocal looks, seconds
        looks, seconds = looks + 1, seconds + pause
        path.with_name("study.db.next").write_bytes(os.urandom(8))  # another one has it now
        if seconds > 120.0:
            os.kill(holder, signal.SIGKILL)

    monkeypatch.setattr(turn, "time", SimpleNamespace(monotonic=lambda: seconds, sleep=sleep))
    waiting = turn.Turn(str(path))
    try:
        with waiting:
            assert seconds > 120.0
            assert waiting._stopped is None
    finally:
        kill(holder)
    assert looks < 1500, "with three hundred that wait, looking would be all that the machine does"


def _no_locks(*arguments: Any) -> NoReturn:
    raise OSError(errno.ENOLCK, "No locks available")


def test_where_there_are_no_such_locks_there_are_no_turns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpo.study.engines.turn.fcntl.lockf", _no_locks)
    assert wait([fork(write, path, path.with_name("log"), 2)]) == [0]


def test_where_the_file_cannot_be_made_there_are_no_turns(path: Path) -> None:
    path.with_name("study.db.next").mkdir()
    assert wait([fork(write, path, path.with_name("log"), 2)]) == [0]


def test_no_descriptor_is_left_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        file = StudyFile(path)
        with file.write():
            pass
        file.close()
    assert len(os.listdir("/proc/self/fd")) == before
