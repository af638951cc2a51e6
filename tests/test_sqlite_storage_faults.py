"""What can happen to the file and to a process that writes it: every crash point, a full disk,
damage, a dead holder of the lock, backups, and 10 000 trials in one process.
"""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from common import wait_for
from hpo.study.engines import EngineError, sqlite_file
from hpo.study.engines.sqlite_errors import CorruptStudy, DiskFull, StudyBusy, StudyFileError
from hpo.study.storage import LeaseLost, NoTrialLeft, StudyStorage
from storage_helpers import (
    EPOCHS,
    NAME,
    check_study,
    count_lines,
    file_of,
    fork,
    kill,
    make_study,
    open_study,
    read_trials,
    sql,
    storage_of,
    suggest,
    train,
    wait,
    work,
    write_line,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_study(tmp_path)


@pytest.fixture
def memory_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: for the tests with ten thousand commits."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def copy_study(folder: Path, case: int) -> Path:
    """A new, empty study for one case (making the tables anew takes 60 ms)."""
    (folder / str(case)).mkdir()
    return Path(shutil.copy(folder / "study.db", folder / str(case)))


# ---- every crash point ---------------------------------------------------------------------


def _life(path: Path, before_statement: Any = None) -> None:
    """All that happens to a trial: claim, report, return, second claim, finish; a stale return."""
    study = open_study(path, os.getpid(), total_trials=2, job_id="7", grace=0.0)
    storage = storage_of(study)
    if before_statement is not None:
        file_of(storage).connection().set_trace_callback(before_statement)
    trial = study.ask()
    suggest(trial)
    trial.report(trial.params["lr"], 0)
    storage.renew_lease(trial._trial_id)
    storage.return_trial(trial._trial_id, crashed=False)
    storage.return_stale_trials(study._study_id, alive_jobs=set())
    again = study.ask()
    study.tell(again, train(again))
    with suppress(NoTrialLeft):
        second = study.ask()
        second.set_user_attr("note", "x")
        suggest(second)
        storage.return_stale_trials(study._study_id)  # even its own, when nobody renews it
        with suppress(LeaseLost):
            study.tell(second, 0.0)
        again = study.ask()
        study.tell(again, train(again))
    file_of(storage).connection().set_trace_callback(None)


def _die_at(path: Path, k: int) -> None:
    seen = 0

    def before_statement(statement: str) -> None:
        nonlocal seen
        seen += 1
        if seen == k:
            os._exit(42)

    _life(path, before_statement)
    os._exit(43)  # there were fewer than k statements


def test_every_crash_point_is_legal_and_a_restart_finishes(memory_path: Path) -> None:
    points = 0
    make_study(memory_path)
    for k in range(1, 1000):
        path = copy_study(memory_path, k)
        (end,) = wait([fork(_die_at, path, k)])
        assert end in (42, 43)
        _check_legal(path)
        _restart(path, 2)
        check_study(path, 2)
        shutil.rmtree(path.parent)
        if end == 43:
            break
        points += 1
    print(f"\ncrash points (SQL statements): {points} of {points} legal, and finished by a restart")
    assert points > 60


def _restart(path: Path, total: int) -> None:
    """What the next job does: return what the last one held, then work to the end."""
    study = open_study(path, "init", job_id="8")
    storage_of(study).return_stale_trials(study._study_id, alive_jobs=set())
    assert wait([fork(work, path, 0, total, grace=60)]) == [0]


def _check_legal(path: Path) -> None:
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    trials = read_trials(path)
    assert [t.number for t in trials] == list(range(len(trials)))
    running = {t._trial_id for t in trials if t.state == TrialState.RUNNING}
    held = sql(path, "SELECT trial_id FROM leases WHERE owner IS NOT NULL")
    assert {trial_id for (trial_id,) in held} == running  # RUNNING and leased: never one alone
    for trial in trials:
        assert len(trial.params) in (0, 8)  # written together
        assert (trial.value is not None) == (trial.state == TrialState.COMPLETE)


CALLS = "pwrite64,fdatasync,fsync,unlink,unlinkat,ftruncate"
CHILD = """
import sys; sys.path[:0] = {sys_path!r}
from pathlib import Path
import test_sqlite_storage_faults
test_sqlite_storage_faults.{call}(Path({path!r}))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_killed_at_system_calls_of_a_commit(memory_path: Path) -> None:
    """Between the journal's write, its fsync, the pages and its end: strace kills there."""
    points = 0
    make_study(memory_path)
    for k in [*range(1, 16), *range(16, 1000, 48)]:
        path = copy_study(memory_path, k)
        child = CHILD.format(sys_path=sys.path, call="_life", path=str(path))
        inject = [f"--inject={call}:signal=KILL:when={k}" for call in CALLS.split(",")]
        strace = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={CALLS}", *inject]
        run = subprocess.run([*strace, sys.executable, "-c", child], check=False)
        _check_legal(path)
        _restart(path, 2)
        check_study(path, 2)
        if run.returncode == 0:
            break
        points += 1
    print(f"\ncrash points (system calls): {points} of {points} legal, and finished by a restart")
    assert points >= 16


# ---- a full disk ---------------------------------------------------------------------------


def _work_on_full_disk(path: Path, log: Path, limit: int) -> None:
    study = open_study(path, total_trials=8)
    size = path.stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

    def free_space(error: DiskFull) -> None:
        assert str(path) in str(error)
        assert "disk full" in str(error)
        if limit >= size:  # a smaller one also forbids to write old pages again, as no disk does
            sql(path, "SELECT count(*) FROM trials")  # still readable
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        write_line(log, "full 0")

    def insist(step: Any, *args: Any) -> Any:
        try:
            return step(*args)
        except DiskFull as error:
            free_space(error)
            return step(*args)  # and the same step once more

    for _ in range(8):
        trial = insist(study.ask)
        lr = suggest(trial)["lr"]
        for step in range(EPOCHS):
            insist(trial.report, lr + step, step)
        insist(study.tell, trial, lr)
        write_line(log, f"finished {trial.number}")
    assert count_lines(log, "full")[0] <= 1


def test_disk_full_at_any_moment(memory_path: Path) -> None:
    """Sweep the file-size limit over the journal, the old pages and the new ones."""
    met = 0
    size = make_study(memory_path).stat().st_size
    limits = [*range(0, size, 16 * 1024), *range(size, size + 20 * 1024, 1024)]
    for limit in limits:
        path = copy_study(memory_path, limit)
        log, errors = path.parent / "log", path.parent / "errors"
        assert wait([fork(_work_on_full_disk, path, log, limit, stderr=errors)]) == [0]
        assert errors.read_text() == ""
        assert count_lines(log, "finished") == dict.fromkeys(range(8), 1)
        check_study(path, 8)
        met += count_lines(log, "full")[0]
        shutil.rmtree(path.parent)
    print(f"\ndisk full: met at {met} of {len(limits)} limits, nothing lost, each study finished")
    assert met >= 16


def _die_of_full_disk(path: Path, log: Path, limit: int) -> None:
    study = open_study(path, job_id="7")
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def go_on() -> None:
        while True:
            trial = study.ask()
            study.tell(trial, train(trial))
            write_line(log, f"finished {trial.number}")

    with pytest.raises(DiskFull):
        go_on()


def test_no_finished_trial_is_lost_when_the_disk_stays_full(path: Path) -> None:
    log, errors = path.parent / "log", path.parent / "errors"
    limit = path.stat().st_size + 24 * 1024
    assert wait([fork(_die_of_full_disk, path, log, limit, stderr=errors)]) == [0]
    assert sql(path, "PRAGMA integrity_check") == [("ok",)]
    done = [t.number for t in read_trials(path) if t.state == TrialState.COMPLETE]
    assert done == sorted(count_lines(log, "finished"))
    assert len(done) > 0
    _restart(path, len(done) + 5)  # there is space again
    check_study(path, len(done) + 5)


def test_disk_full_while_the_file_is_created(tmp_path: Path) -> None:
    def create() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
        with pytest.raises(DiskFull):
            StudyStorage(tmp_path / "study.db")

    assert wait([fork(create)]) == [0]
    assert list(tmp_path.iterdir()) == []


# ---- damage --------------------------------------------------------------------------------


def _damage(path: Path) -> None:
    """Overwrite the rows of trials, as a bad disk does; what one reads to open it is healthy."""
    tables = path.stat().st_size // 4096
    work(path, 0, 20)
    content = bytearray(path.read_bytes())
    for page in range(tables, len(content) // 4096):
        content[page * 4096 : page * 4096 + 100] = b"\xff" * 100
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["text", "empty", "cut", "damaged", "other"])
def test_corrupt_file_is_named_and_left_untouched(path: Path, kind: str) -> None:
    if kind == "damaged":
        _damage(path)
    elif kind == "other":
        path.unlink()
        sql(path, "CREATE TABLE t (x)")
    else:
        whole = path.read_bytes()
        path.write_bytes({"text": b"a note\n" * 999, "empty": b"", "cut": whole[:50_000]}[kind])
    before, modified = path.read_bytes(), path.stat().st_mtime_ns
    with pytest.raises(CorruptStudy) as caught:
        StudyStorage(path)
    assert str(path) in str(caught.value)
    assert "left as it is" in str(caught.value)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, modified)
    files = {p.name for p in path.parent.iterdir()}
    assert files <= {path.name, f"{path.name}-journal", f"{path.name}.next"}


def test_another_schema_is_refused(path: Path) -> None:
    work(path, 0, 1)
    with sqlite3.connect(path) as db:
        db.execute("UPDATE alembic_version SET version_num = 'v9'")
    with pytest.raises(StudyFileError, match="another Optuna"):
        StudyStorage(path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises((StudyFileError, OSError), match="nowhere"):
        StudyStorage(tmp_path / "nowhere" / "study.db")


def test_odd_characters_in_the_path(tmp_path: Path) -> None:
    folder = tmp_path / "Étude n°1 {x}?#%20"
    folder.mkdir()
    work(make_study(folder), 0, 2)
    storage = StudyStorage(folder / "study.db")
    assert storage.get_n_trials(storage.get_study_id_from_name(NAME)) == 2


# ---- locks ---------------------------------------------------------------------------------


def _hold_lock(path: Path, log: Path) -> None:
    with storage_of(open_study(path, "holder")).file.write() as db:
        db.execute("UPDATE trials SET state = 'FAIL'")
        write_line(log, "holding 0")
        time.sleep(60)


def test_dead_holder_of_the_lock_delays_nobody(path: Path) -> None:
    study = open_study(path)
    trial = study.ask()
    holder = fork(_hold_lock, path, path.parent / "log")
    wait_for(lambda: count_lines(path.parent / "log", "holding"))
    kill(holder)
    start = time.monotonic()
    study.tell(trial, train(trial))
    assert time.monotonic() - start < 30  # half of the time until it would give up
    check_study(path, 1)  # and what the dead one wrote is gone


def test_a_lock_that_is_never_released_is_a_clear_error(path: Path) -> None:
    study = open_study(path, timeout=0.3)
    trial = study.ask()
    holder = fork(_hold_lock, path, path.parent / "log")
    wait_for(lambda: count_lines(path.parent / "log", "holding"))
    with pytest.raises(StudyBusy, match="stayed locked"):
        trial.report(1.0, 0)
    kill(holder)
    trial.report(1.0, 0)


def test_who_loses_every_race_waits_on_as_long_as_others_write(path: Path) -> None:
    """For more than its timeout: it is slow, and nothing is locked for good."""
    file = open_study(path, timeout=0.05)._storage.file  # type: ignore[attr-defined]
    races = []

    def lose() -> str:
        races.append(1)
        if len(races) < 40:
            time.sleep(0.01)
            os.utime(path, ns=(len(races), len(races)))  # somebody has written
            raise sqlite3.OperationalError("database is locked")
        return "won"

    assert file._patiently(lose) == "won"


def test_the_journal_is_never_wal(path: Path) -> None:
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    db.close()
    work(path, 0, 1)
    assert sql(path, "PRAGMA journal_mode") == [("delete",)]


# ---- backup --------------------------------------------------------------------------------


def test_backups_of_a_running_study_are_consistent(path: Path) -> None:
    errors, copies = path.parent / "errors", list[Path]()
    made = path.with_name("made")  # a byte for each copy
    made.touch()

    def objective(trial: optuna.Trial, epoch: float) -> float:
        while trial.number >= 24 * (1 + made.stat().st_size):  # so that there are more than three
            time.sleep(0.01)
        return train(trial, epoch)

    # No lease is renewed between two parameters of a trial: that would write the first one alone.
    more: dict[str, Any] = {"epoch": 0.003, "grace": 600, "job_id": "7", "objective": objective}
    workers = [fork(work, path, r, 120, **more, stderr=errors) for r in range(4)]
    storage = StudyStorage(path)
    while os.waitpid(workers[0], os.WNOHANG) == (0, 0):
        copies.append(path.with_name(f"copy {len(copies)}.db"))
        assert file_of(storage).backup(copies[-1], max_age=60)
        made.write_text("x" * len(copies))
        time.sleep(0.05)
    assert wait(workers[1:]) == [0] * 3
    assert errors.read_text() == ""
    check_study(path, 120)
    assert len(copies) > 3
    for copy in copies:
        _check_legal(copy)
    _restart(copies[1], 120)  # how one goes back to a backup
    check_study(copies[1], 120)


def test_backup_is_skipped_while_it_is_young(path: Path) -> None:
    storage, target = StudyStorage(path), path.with_name("study.db.backup")
    assert file_of(storage).backup(target, max_age=60)
    assert not file_of(storage).backup(target, max_age=60)
    assert file_of(storage).backup(target, max_age=0)
    os.utime(target, (time.time() - 61, time.time() - 61))
    assert file_of(storage).backup(target, max_age=60)
    os.utime(target, (time.time() + 600, time.time() + 600))  # a host whose clock is ahead
    assert file_of(storage).backup(target, max_age=60)


@pytest.mark.parametrize("more", ["an end", "a trial"])
def test_the_older_copy_of_a_slower_worker_is_dropped(
    path: Path, monkeypatch: pytest.MonkeyPatch, more: str
) -> None:
    storage, target = StudyStorage(path), path.with_name("study.db.backup")
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    assert file_of(storage).backup(target)
    original = sqlite_file.whole_copy

    @contextmanager
    def overtaken(source: sqlite3.Connection, name: str) -> Iterator[str]:
        with original(source, name) as copy:
            monkeypatch.setattr(sqlite_file, "whole_copy", original)
            if more == "an end":
                study.tell(trial, 0.5)
            else:
                study.ask()
            assert file_of(storage).backup(target, max_age=0)
            yield copy

    monkeypatch.setattr(sqlite_file, "whole_copy", overtaken)
    assert not file_of(storage).backup(target, max_age=0)
    kept = optuna.load_study(
        study_name=study.study_name, storage=f"sqlite:///{target}"
    ).get_trials()
    assert [t.state for t in kept] == [t.state for t in study.get_trials()]


def test_a_damaged_study_never_replaces_a_good_backup(path: Path) -> None:
    storage, target = StudyStorage(path), path.with_name("study.db.backup")
    assert file_of(storage).backup(target)
    good = target.read_bytes()
    _damage(path)
    with pytest.raises(CorruptStudy):
        file_of(storage).backup(target, max_age=0)
    assert target.read_bytes() == good
    assert not list(path.parent.glob(".*.new"))


def test_a_study_that_was_lost_never_replaces_its_backup(path: Path) -> None:
    storage, target = StudyStorage(path), path.with_name("study.db.backup")
    study = open_study(path)
    for value in range(3):
        study.add_trial(optuna.trial.create_trial(value=value))
    assert file_of(storage).backup(target)
    good = target.read_bytes()
    optuna.delete_study(study_name=NAME, storage=storage)
    with pytest.raises(EngineError, match="is not there, and 3 trials in its backup"):
        file_of(storage).backup(target, max_age=0)
    study = optuna.create_study(study_name=NAME, storage=storage)  # as the next job does
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(EngineError, match="has 1, and 3 trials in its backup"):
        file_of(storage).backup(target, max_age=0)
    assert target.read_bytes() == good
    assert not list(path.parent.glob(".*.new"))
    target.write_text("no database")  # nothing is lost with it
    assert file_of(storage).backup(target, max_age=0)


# ---- soak ----------------------------------------------------------------------------------


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(path: Path) -> None:
    """10 000 trials with an empty objective in this process; prints and checks what they cost."""
    with suppress(ImportError):
        importlib.import_module("torch")  # a real worker has it; only its size matters here
    study = open_study(path, total_trials=10_000)
    resident, open_files = [], []
    for i in range(10_000):
        study.tell(study.ask(), 0.0)
        if i % 1000 == 999:
            resident.append(_resident())
            open_files.append(len(os.listdir("/proc/self/fd")))
    growth = resident[-1] - resident[0]
    print(
        f"\nsoak: {resident[0] / 1e6:.0f} MB after 1 000 trials, +{growth / resident[0]:.1%} "
        f"after 10 000 ({growth / 9000:.0f} bytes a trial), {open_files[-1]} descriptors"
    )
    assert len(set(open_files)) == 1
    assert growth / 9000 < 1200  # one finished trial, which samplers need; and nothing else
    if "torch" in sys.modules:
        assert growth < 0.05 * resident[0]


def test_soak_of_10_000_trials(memory_path: Path) -> None:
    path = make_study(memory_path)
    child = CHILD.format(sys_path=sys.path, call="soak", path=str(path))
    assert subprocess.run([sys.executable, "-c", child], check=False).returncode == 0
    check_study(path, 10_000, reports=None)
