"""Workers on a real PostgreSQL server: what happens to it, to them, and to what people type."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from common import HELPERS, LIMIT, SCRIPTS, Run, wait_for
from hpo import settings as settings_module
from hpo import site
from hpo.drain import Drain
from hpo.settings import Settings, UserError
from hpo.show import facts
from hpo.site import Patience, wait_inside
from hpo.study import copying, opening
from hpo.study.engines import EngineError, postgresql, unanswered
from hpo.study.engines.postgresql import PostgreSQL
from hpo.study.leases import LeaseLost, NoTrialLeft
from hpo.study.opening import create_or_open_study, open_study
from hpo.study.storage import StudyStorage
from hpo.study.trials import count
from hpo.values import SiteAway
from postgresql_server import PostgreSQLServer, ask
from storage_helpers import (
    NAME,
    fork,
    make_study,
    short_trials,
    storage_of,
    suggest,
    train,
    wait,
    work,
)
from storage_helpers import open_study as open_path

OBJECTIVE = HELPERS / "objective_for_tests.py"
SECRET = "s3cr%40t"  # as it stands in a URL


@pytest.fixture
def url(server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Give the test an empty database; remove what a study leaves beside the scripts."""
    server.empty("bare")
    url = server.url("bare", f"postgres:{SECRET}")
    monkeypatch.setenv("STUDY_DB", url)
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv("PY_SCRIPT", str(OBJECTIVE))
    settings = Settings.from_env(STUDY_DB=url)
    yield url
    shutil.rmtree(settings.checkpoints.parent, ignore_errors=True)
    if settings.backup_path:
        settings.backup_path.unlink(missing_ok=True)


def start(rank: int, **env: str) -> subprocess.Popen[str]:
    """Start one worker."""
    return subprocess.Popen(
        [sys.executable, str(OBJECTIVE)],
        env={**os.environ, "WORKER_RANK": str(rank), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def facts_of(trials: list[FrozenTrial]) -> list[Any]:
    """All but the id in the database, where numbers may be left out."""
    return [{k: v for k, v in vars(trial).items() if k != "_trial_id"} for trial in trials]


def states(url: str) -> Counter[str]:
    return Counter(state for (state,) in ask(url, "SELECT state::text FROM trials"))


# ---- workers -------------------------------------------------------------------------------


def test_workers_go_on_after_a_restart_and_a_kill_and_leave_a_backup(
    url: str,
    run: Run,
    server: PostgreSQLServer,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    said = run("init_optuna_db.py", TOTAL_TRIALS="30")
    assert said.returncode == 0, said.stderr
    env = {"TOTAL_TRIALS": "30", "BEHAVIOUR": "slow", "LEASE_GRACE": "6", "GATES": str(tmp_path)}
    for number in range(6):
        (tmp_path / f"{number}").touch()
    workers = [start(rank, **env) for rank in range(3)]
    wait_for(lambda: states(url)["COMPLETE"] >= 4)
    wait_for((tmp_path / f"process {workers[2].pid}").exists)
    server.stop()  # as a crash does
    workers[2].kill()
    for number in range(6, 30):
        (tmp_path / f"{number}").touch()
    time.sleep(1)
    server.start()
    output = [worker.communicate(timeout=LIMIT)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0, -9], output
    assert "Traceback" not in "".join(output)
    settings = Settings.from_env(STUDY_DB=url)
    trials = open_study(settings).get_trials()
    assert [trial.number for trial in trials] == list(range(30))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert settings.backup_path
    copied = open_study(Settings.from_env(STUDY_DB=f"sqlite:///{settings.backup_path}"))
    assert facts_of(copied.get_trials()) == facts_of(trials)
    _check_no_password(said.stdout + "".join(output), url, capsys)


def _check_no_password(said: str, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of what a study on that server shows to people."""
    settings = Settings.from_env(STUDY_DB=url)
    said += str(facts.settings_of(open_study(settings), settings))
    settings_module.print_table()
    sys.argv, before = ["settings", "given"], sys.argv
    settings_module.print_table()
    sys.argv = before
    said += capsys.readouterr().out
    assert said.count("postgres:***@/") >= 4
    assert not [word for word in (SECRET, "s3cr@t") if word in said]


def test_stopped_worker_returns_its_trial_and_the_next_one_finishes_it(url: str) -> None:
    worker = start(0, BEHAVIOUR="usr1", TOTAL_TRIALS="4")
    output = worker.communicate(timeout=LIMIT)[0]
    assert worker.returncode == 0, output
    study = open_study(Settings.from_env(STUDY_DB=url))
    returned = study.get_trials()[2]
    assert returned.state == TrialState.WAITING
    worker = start(0, BEHAVIOUR="sleep", TOTAL_TRIALS="4")
    wait_for(lambda: study.get_trials()[2].state == TrialState.RUNNING)
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=LIMIT)
    trial = study.get_trials()[2]
    assert (trial.state, trial.params) == (TrialState.WAITING, returned.params)


# ---- the storage ---------------------------------------------------------------------------


@pytest.fixture
def path(server: PostgreSQLServer, tmp_path: Path) -> Path:
    (tmp_path / "study.url").write_text(server.with_study("study"))
    return tmp_path / "study.url"


def test_a_server_that_is_away(path: Path, server: PostgreSQLServer) -> None:
    study = open_path(path, timeout=0.4)
    trial = study.ask()
    suggest(trial)
    server.stop()
    with pytest.raises(EngineError, match=r"has been away for \d+ s"):
        trial.report(1.0, 0)
    with pytest.raises(EngineError, match="has been away"):
        study.get_trials()
    server.start()
    storage_of(study).file.timeout = LIMIT  # type: ignore[attr-defined]
    trial.report(1.0, 0)  # the same call once more
    server.stop("fast")
    server.start()
    study.tell(trial, 2.0)
    (frozen,) = study.get_trials()
    assert (frozen.intermediate_values, frozen.value) == ({0: 1.0}, 2.0)


def test_a_report_waits_for_its_server(
    path: Path, server: PostgreSQLServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a trial: no epoch is lost, and the wait is no long epoch."""
    study = open_path(path, timeout=0.4)
    drain = Drain(float("inf"))
    suggest(trial := study.ask())
    wait_inside(trial, Patience(60.0, drain))
    server.stop()
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: server.start())
    monkeypatch.setattr(site, "time", clock)
    drain._last = begin = time.monotonic()
    trial.report(1.0, 0)
    waited = time.monotonic() - begin
    drain.epoch_ended()
    assert drain._longest_epoch < waited
    assert study.get_trials()[0].intermediate_values == {0: 1.0}


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_server_that_stands_still(
    path: Path, server: PostgreSQLServer, driver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections stay, and no word comes: the wait ends, and the trial goes on."""
    monkeypatch.setattr(postgresql, "DRIVERS", (driver,))
    monkeypatch.setattr(unanswered, "LOOK", 0.1)
    study = open_path(path, timeout=0.4)
    suggest(trial := study.ask())
    server.signal(signal.SIGSTOP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(unanswered, "LONGEST", 1.0)
            with pytest.raises(EngineError, match="has been away"):
                trial.report(1.0, 0)
    finally:
        server.signal(signal.SIGCONT)
    storage_of(study).file.timeout = LIMIT  # type: ignore[attr-defined]
    trial.report(1.0, 0)
    study.tell(trial, 2.0)
    (frozen,) = study.get_trials()
    assert (frozen.intermediate_values, frozen.value) == ({0: 1.0}, 2.0)


def test_a_connection_lost_inside_a_transaction_changes_nothing(
    path: Path, server: PostgreSQLServer
) -> None:
    storage = storage_of(open_path(path))
    end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'optuna'"

    def rename() -> None:
        with storage.file.write() as db:
            db.execute("UPDATE studies SET study_name = 'other'")
            server.sql("postgres", end)
            db.execute("UPDATE studies SET study_name = 'another'")

    with pytest.raises(EngineError, match=r"postgresql://postgres@"):
        rename()
    assert [study.study_name for study in storage.get_all_studies()] == [NAME]


def test_both_drivers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "DRIVERS", ("psycopg2",))
    study = open_path(path, total_trials=2)
    assert storage_of(study).file._driver.__name__ == "psycopg2"  # type: ignore[attr-defined]
    for _ in range(2):
        trial = study.ask()
        study.tell(trial, train(trial))
    with pytest.raises(NoTrialLeft):
        study.ask()
    monkeypatch.setattr(postgresql, "DRIVERS", ("psycopg",))
    assert repr(open_path(path).get_trials()) == repr(study.get_trials())
    monkeypatch.setattr(postgresql, "DRIVERS", ())
    with pytest.raises(UserError, match="is libpq missing"):
        open_path(path)


def _count(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that each statement is appended to before it is executed."""
    seen: list[str] = []
    execute = postgresql._Cursor.__init__

    def noted(self: Any, connection: Any, sql: str, args: Any) -> None:
        seen.append(sql)
        execute(self, connection, sql, args)

    monkeypatch.setattr(postgresql._Cursor, "__init__", noted)
    return seen


def test_statements_of_a_trial(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_path(path)
    study.pruner = optuna.pruners.MedianPruner()
    for _ in range(3):
        trial = study.ask()
        study.tell(trial, train(trial))
    seen = _count(monkeypatch)
    trial = study.ask()
    study.tell(trial, train(trial))
    assert seen.count("COMMIT") == 6
    assert len(seen) < 45


@pytest.mark.parametrize(("wait", "counts"), [(0.0, (7, 10)), (600.0, (2, 6))])
def test_statements_of_a_trial_with_tpe(
    path: Path, monkeypatch: pytest.MonkeyPatch, wait: float, counts: tuple[int, int]
) -> None:
    """Reports that come less than `wait` seconds apart share a transaction."""
    study = open_path(path, wait=wait)
    run = short_trials(study)
    seen = _count(monkeypatch)
    run(4)
    selects = sum(sql.lstrip().startswith(("SELECT", "WITH")) for sql in seen)
    assert (seen.count("COMMIT"), selects) == (4 * counts[0], 4 * counts[1])


# ---- a process that dies -------------------------------------------------------------------


def _life(path: Path) -> None:
    """Claim, report, return, claim again and finish; then lose a trial to another."""
    study = open_path(path, os.getpid(), total_trials=2, job_id="7", grace=0.0)
    storage = storage_of(study)
    trial = study.ask()
    suggest(trial)
    trial.report(trial.params["lr"], 0)
    storage.return_trial(trial._trial_id, crashed=False)
    study.tell(again := study.ask(), train(again))
    second = study.ask()
    storage.return_stale_trials(study._study_id)
    storage.return_stale_trials(study._study_id)
    with pytest.raises(LeaseLost):
        study.tell(second, 0.0)
    study.tell(again := study.ask(), train(again))


def _die_at(path: Path, k: int) -> None:
    """End before the k-th COMMIT, or right after it for the odd ones."""
    execute, seen = postgresql._Cursor.__init__, 0

    def counted(self: Any, connection: Any, sql: str, args: Any) -> None:
        nonlocal seen
        seen += sql == "COMMIT"
        if seen > k // 2 and not k % 2:
            os._exit(42)
        execute(self, connection, sql, args)
        if seen > k // 2:
            os._exit(42)

    postgresql._Cursor.__init__ = counted  # type: ignore[method-assign]
    _life(path)
    os._exit(43)  # there were fewer


def test_crash_points_are_legal_and_a_restart_finishes(path: Path) -> None:
    """Between two COMMITs a death is the server's ROLLBACK: before and after each is enough."""
    for k in range(100):
        ask(path.read_text(), "TRUNCATE trials RESTART IDENTITY CASCADE")
        (end,) = wait([fork(_die_at, path, k)])
        rows = ask(path.read_text(), "SELECT number, state::text, owner, (SELECT count(*) FROM "
                   "trial_params p WHERE p.trial_id = t.trial_id) FROM trials t LEFT JOIN leases "
                   "USING (trial_id) ORDER BY 1")  # fmt: skip
        assert [row[0] for row in rows] == list(range(len(rows)))
        for _, state, owner, params in rows:
            assert (owner is not None) == (state == "RUNNING")  # never one alone
            assert params in (0, 8)
        study = open_path(path, "init", job_id="8")
        storage_of(study).return_stale_trials(study._study_id, alive_jobs=set())
        assert wait([fork(work, path, 0, 2, grace=60)]) == [0]
        assert states(path.read_text()) == {"COMPLETE": 2}
        if end == 43:
            break
    assert k > 20


def _freeze(path: Path, ready: int) -> None:
    with storage_of(open_path(path)).file.write() as db:
        db.execute("SELECT 1 FROM studies FOR UPDATE")
        os.write(ready, b"x")
        os.kill(os.getpid(), signal.SIGSTOP)
        db.execute("SELECT 1")


def test_a_worker_frozen_in_a_claim_holds_up_nobody_for_long(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "SESSION", postgresql.SESSION.replace("'20s'", "'1s'"))
    read, ready = os.pipe()
    frozen = fork(_freeze, path, ready, stderr=path.parent / "errors")
    os.read(read, 1)
    assert open_path(path).ask().number == 0  # waits until the server has ended its transaction
    os.kill(frozen, signal.SIGCONT)
    assert wait([frozen]) == [1]
    assert "idle-in-transaction timeout" in (path.parent / "errors").read_text()


# ---- copies --------------------------------------------------------------------------------


def test_a_study_is_copied_there_and_back(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_NAME", NAME)
    monkeypatch.setenv("LEASE_GRACE", "1")
    file = make_study(tmp_path)
    study = open_path(file, max_attempts=9)
    study.set_user_attr("note", {"a": [1, None]})
    study.tell(trial := study.ask(), train(trial))
    study.tell(study.ask(), float("inf"))
    storage_of(study).return_trial(study.ask()._trial_id, crashed=True)
    study.enqueue_trial({"lr": 1e-3})
    here = Settings.from_env(STUDY_DB=f"sqlite:///{file}")
    here.checkpoints.mkdir(parents=True)
    (here.checkpoints / "trial-00000.weights.pt").write_text("weights")
    there = Settings.from_env(STUDY_DB=url)
    assert "4 trials copied from sqlite:////" in copying.copy_study(there, here.study_db)
    assert (there.checkpoints / "trial-00000.weights.pt").read_text() == "weights"
    back = Settings.from_env(STUDY_DB=f"sqlite:///{tmp_path}/back.db")
    assert "postgres:***@" in copying.copy_study(back, url)
    trials = open_path(tmp_path / "back.db").get_trials()
    assert facts_of(trials) == facts_of(study.get_trials())
    assert open_study(there).user_attrs == study.user_attrs
    rows = "SELECT number, attempts FROM leases JOIN trials USING (trial_id)"
    assert ask(url, rows) == [(2, 1)]
    with pytest.raises(UserError, match="has a study 'study' already: nothing was copied"):
        copying.copy_study(there, here.study_db)
    with pytest.raises(UserError, match="are the same"):
        copying.copy_study(there, url)


def test_a_study_that_runs_is_not_copied(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STUDY_NAME", NAME)
    file = make_study(tmp_path)
    study = open_path(file)
    trial = study.ask()
    source = Settings.from_env(STUDY_DB=f"sqlite:///{file}")
    target = Settings.from_env(STUDY_DB=url)
    monkeypatch.setattr(time, "sleep", lambda _: storage_of(study).renew_lease(trial._trial_id))
    with pytest.raises(UserError, match="somebody runs the study in sqlite:"):
        copying.copy_study(target, source.study_db)
    assert ask(url, "SELECT to_regclass('trials')::text") == [(None,)]
    monkeypatch.setattr(time, "sleep", lambda _: None)  # its worker is dead
    copying.copy_study(target, source.study_db)
    assert states(url) == {"RUNNING": 1}
    storage = StudyStorage(PostgreSQL(url), grace=0.0)
    assert storage.return_stale_trials(1) == [0]


# ---- what people type ----------------------------------------------------------------------


def _tables(url: str) -> list[Any]:
    return ask(url, "SELECT tablename FROM pg_tables WHERE schemaname = 'public'")


def test_bad_input_is_one_line_and_creates_nothing(
    url: str, server: PostgreSQLServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hba = server.folder / "data" / "pg_hba.conf"
    ask(url, "DROP ROLE IF EXISTS stranger")
    ask(url, "CREATE ROLE stranger LOGIN PASSWORD 'known'")
    hba.write_text("local all stranger md5\n" + hba.read_text())
    ask(url, "SELECT pg_reload_conf()")
    stranger = url.replace("postgres:", "stranger:")
    wait_for(lambda: _is_refused(stranger))  # the server reads its file a moment later
    cases = {
        f"postgresql://postgres:{SECRET}@127.0.0.1:9/study": "refused",
        stranger: "password authentication failed",
        stranger.replace(SECRET, "known"): "may not create tables",
        url.replace("/bare", "/nowhere"): "does not exist",
    }
    waits: list[float] = []
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=waits.append)
    monkeypatch.setattr(postgresql, "time", clock)
    for case, says in cases.items():
        settings = Settings.from_env(STUDY_DB=case)
        for act in (create_or_open_study, open_study):
            with pytest.raises(UserError) as caught:
                act(settings)
            text = str(caught.value)
            assert says in text or "there is no study yet" in text
            assert "\n" not in text
            assert SECRET not in text
    assert waits == []  # nor does the connection: see below
    assert _tables(url) == []
    typed = [url.replace("?host=", "?host=no-such-host.invalid"), *cases]
    with ThreadPoolExecutor() as pool:
        for result in pool.map(partial(_init, run), typed):
            assert result.stderr.count("\n") == 1, result.stderr
            assert result.returncode == 2, result.stderr
            assert "s3cr" not in result.stderr
    [away] = [case for case, says in cases.items() if says == "refused"]
    in_a_job = run("init_optuna_db.py", STUDY_DB=away, SLURM_JOB_ID="1")
    assert in_a_job.returncode == 75  # job.sh waits
    assert _tables(url) == []
    assert not Settings.from_env(STUDY_DB=url).checkpoints.parent.exists()
    ask(url, "CREATE TABLE studies (x int)")
    with pytest.raises(UserError, match="tables of another program"):
        create_or_open_study(Settings.from_env(STUDY_DB=url))
    assert _tables(url) == [("studies",)]
    hba.write_text(hba.read_text().partition("\n")[2])
    ask(url, "SELECT pg_reload_conf()")


def _certify(address: str, path: Path) -> tuple[Path, Path]:
    """Make a certificate of an address, and its key."""
    certificate, key = path.with_suffix(".crt"), path.with_suffix(".key")
    make = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={address}")
    to = ("-addext", f"subjectAltName=IP:{address}", "-out", certificate, "-keyout", key)
    subprocess.run([*make, *to], check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def tls() -> Iterator[tuple[str, Path]]:
    """Give the URL of a database that takes encrypted connections alone, and its certificate."""
    address = f"127.{os.getpid() % 127 + 1}.{os.getpid() // 127 % 127}.1"
    folder = Path(f"/tmp/tls-{os.getpid()}")
    folder.mkdir(mode=0o755)
    certificate, key = _certify(address, folder / "server")
    shutil.chown(key, "postgres")
    options = f"-c ssl=on -c ssl_cert_file={certificate} -c ssl_key_file={key}"
    server = PostgreSQLServer(folder / "pg", f"{options} -c listen_addresses={address}")
    password = SECRET.replace("%40", "@")
    ask(server.url("postgres"), f"ALTER ROLE postgres PASSWORD '{password}'")
    rules = "local all all trust\nhostssl all all 127.0.0.0/8 md5\n"
    (server.folder / "data" / "pg_hba.conf").write_text(rules)
    server.stop()
    server.start()
    server.empty("encrypted")
    yield f"postgresql://postgres:{SECRET}@{address}/encrypted", certificate
    server.stop()
    shutil.rmtree(folder)


def test_a_server_that_takes_encrypted_connections_alone(
    tls: tuple[str, Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, certificate = tls
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    stranger, _ = _certify("127.0.0.1", certificate.with_name("stranger"))
    for query, says in {
        "sslmode=disable": "no pg_hba.conf entry",
        f"sslmode=verify-full&sslrootcert={stranger}": "certificate verify failed",
    }.items():
        result = _init(run, f"{url}?{query}")
        assert result.returncode == 2, result.stderr
        assert says in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
        assert "s3cr" not in result.stderr
    safe = f"{url}?sslmode=verify-full&sslrootcert={certificate}"
    assert _tables(safe) == []
    settings = Settings.from_env(STUDY_DB=safe)
    for driver in postgresql.DRIVERS:
        monkeypatch.setattr(postgresql, "DRIVERS", (driver,))
        storage = StudyStorage(PostgreSQL(safe))
        encrypted = "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert storage.file.read(encrypted) == [(True,)]
        storage.remove_session()
    monkeypatch.undo()
    worker = start(0, STUDY_DB=safe, PYTHONPATH=str(SCRIPTS), TOTAL_TRIALS="3")
    said = worker.communicate(timeout=LIMIT)[0]
    assert worker.returncode == 0, said
    assert count(open_study(settings), settings).complete == 3
    shutil.rmtree(settings.checkpoints.parent, ignore_errors=True)
    assert settings.backup_path
    settings.backup_path.unlink()


def _is_refused(url: str) -> bool:
    try:
        ask(url, "SELECT 1")
    except Exception as error:
        return "authentication failed" in str(error)
    return False


def _init(run: Run, url: str) -> subprocess.CompletedProcess[str]:
    return run("init_optuna_db.py", STUDY_DB=url)


def test_addresses_that_do_not_answer() -> None:
    """Two of one server, as a name of IPv4 and IPv6 has; and one of Optuna's gRPC."""
    with socket.create_server(("127.0.0.1", 0)) as a, socket.create_server(("127.0.0.1", 0)) as b:
        ports = [each.getsockname()[1] for each in (a, b)]  # who connects, gets no word
        url = f"postgresql://me@127.0.0.1,127.0.0.1/db?port={ports[0]},{ports[1]}"
        _check_no_answer(url, SiteAway)
        assert [_connections(each) for each in (a, b)] == [1, 1]
        _check_no_answer(f"grpc://127.0.0.1:{ports[0]}", UserError)
    # So long one of each is tried: less than ten seconds, of which Python needs some to start.
    assert 2 * postgresql.CONNECT < 8
    assert opening.CONNECT_SECONDS < 8


def _check_no_answer(url: str, kind: type[UserError]) -> None:
    begin = time.monotonic()
    with pytest.raises(kind) as caught:
        create_or_open_study(Settings.from_env(STUDY_DB=url))
    assert time.monotonic() - begin < 60  # 6 s, on a machine that has nothing else to do
    assert "\n" not in str(caught.value)


def _connections(server: socket.socket) -> int:
    """Return how many have come since."""
    server.setblocking(False)
    for number in range(99):
        try:
            server.accept()[0].close()
        except BlockingIOError:
            return number
    return 99


def test_a_reader_may_look_and_another_optuna_is_refused(url: str) -> None:
    settings = Settings.from_env(STUDY_DB=url)
    create_or_open_study(settings)
    ask(url, "DROP TABLE leases")  # as stock Optuna makes a study
    ask(url, "DROP ROLE IF EXISTS reader")
    ask(url, "CREATE ROLE reader LOGIN")
    ask(url, "GRANT SELECT ON ALL TABLES IN SCHEMA public TO reader")
    reader = Settings.from_env(STUDY_DB=url.replace("postgres:", "reader:"))
    study = open_study(reader)
    assert count(study, reader).finished == 0
    assert storage_of(study).owners(1) == {}
    storage_of(study).remove_session()
    ask(url, "DROP OWNED BY reader")
    ask(url, "UPDATE alembic_version SET version_num = 'v9'")
    with pytest.raises(UserError, match=r"of another Optuna \(v9\)"):
        create_or_open_study(Settings.from_env(STUDY_DB=url))


def test_what_ends_by_itself_is_told_from_what_a_person_mends() -> None:
    away = ["connection refused", "FATAL:  the database system is starting up",
            "FATAL:  terminating connection due to administrator command"]  # fmt: skip
    mend = ['FATAL:  password authentication failed for user "x"', "ERROR:  permission denied",
            "[Errno -2] Name or service not known"]  # fmt: skip
    found = [postgresql.is_away(Exception(text)) for text in [*away, *mend]]
    assert found == [True] * len(away) + [False] * len(mend)


def test_eight_make_the_tables_at_once(url: str) -> None:
    settings = Settings.from_env(STUDY_DB=url)
    assert wait([fork(create_or_open_study, settings) for _ in range(8)]) == [0] * 8
    assert ask(url, "SELECT count(*) FROM studies") == [(1,)]


def test_tables_that_another_process_is_making_are_waited_for(url: str) -> None:
    with postgresql.driver().connect(url) as maker:
        maker.cursor().execute(f"SELECT pg_advisory_lock({postgresql.KEY})")
        maker.cursor().execute("CREATE TABLE studies (); CREATE TABLE trials ()")
        maker.commit()  # Optuna writes its version last
        with ThreadPoolExecutor() as pool:
            other = pool.submit(PostgreSQL, url)
            waiting = "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype='advisory'"
            wait_for(lambda: ask(url, waiting) or other.done())
            assert not other.done(), other.exception()
            maker.cursor().execute("DROP TABLE studies; DROP TABLE trials")
            maker.commit()
            maker.cursor().execute(f"SELECT pg_advisory_unlock({postgresql.KEY})")
            assert other.result(timeout=LIMIT).read(postgresql.NUMBER)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://me:p@ss@host/db", "write / \\? # @ : % as"),
        ("postgres://me:pa/ss@host/db", "write / \\? # @ : % as"),
        ("postgresql://me:p%ss@host/db", "write / \\? # @ : % as"),
        ("postgresql://me:pass@host:http/db", "the port is a number"),
        ("postgresql://me:pass@host", "names no database"),
        ("postgresql://me:***@host/db", "in the place of \\*\\*\\*"),
        ("postgre://me:pass@host/db", "'postgre://me:\\*\\*\\*@host/db' is no URL"),
    ],
)
def test_urls_that_cannot_be(url: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        Settings.from_env(STUDY_DB=url)
    assert "ss@" not in str(caught.value)


def test_databases_have_folders_of_their_own() -> None:
    same = ["postgresql://me:a@Host/db", "postgres://host:5432/db", "postgresql+psycopg2://host/db"]
    others = [
        *("postgresql://host/db2", "postgresql://host:5433/db", "postgresql://host2/db"),
        *("postgresql:///db?host=/run/a", "postgresql:///db?host=/run/b", "postgresql:///db"),
        *("postgresql://host/db?options=-csearch_path%3Dmine", "mysql://host/db"),
        *("journal:///a", "journal:///b", "grpc://host:1", "sqlite:///a.db"),
    ]
    folders = [Settings.from_env(STUDY_DB=text).checkpoints for text in [*same, *others]]
    assert len(set(folders)) == 1 + len(others)
    assert folders[0].parts[-3:] == ("checkpoints", "postgresql-db@host", "mnist_hpo")
