"""A study that one process serves: what a job does where locks do not hold between nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import optuna
import pytest
from optuna.trial import TrialState

from common import HELPERS, LIMIT, SCRIPTS, Run, wait_for
from hpo.job import return_trials
from hpo.settings import Settings, UserError
from hpo.show import progress
from hpo.site import fault_of
from hpo.study.opening import backup_in_use, create_or_open_study, open_study
from hpo.study.optuna_private import storage_of
from hpo.study.serving import served
from hpo.study.serving.served import OWN, ServedStorage, Server, ServerGone, announce, find_server
from hpo.study.serving.server import own_address
from hpo.study.storage import NoTrialLeft, StudyStorage
from hpo.study.trials import is_final
from hpo.trial import Outcome, _give_back

OBJECTIVE = HELPERS / "objective_for_tests.py"
WORKERS = 3
started: list[subprocess.Popen[str]] = []  # workers
JOB = {
    "SLURM_JOB_ID": "77",
    "TOTAL_TRIALS": "12",
    "LEASE_GRACE": "600",  # longer than a test: nothing comes back because time has passed
    "PRUNER": "none",
    "PYTHONPATH": str(SCRIPTS),
    "PY_SCRIPT": str(OBJECTIVE),
}


@pytest.fixture
def keeper(
    own_study: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[subprocess.Popen[str]]:
    """Serve the test's study, as hpo/job/job.sh does in job 77."""
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    create_or_open_study(Settings.from_env())._storage.remove_session()
    command = [sys.executable, "-m", "hpo.study.serving.server", str(WORKERS), socket.gethostname()]
    process = subprocess.Popen(
        ["bash", "hpo/job/keep_serving.sh", str(tmp_path / "server.out"), *command],
        cwd=SCRIPTS,
        text=True,
        stdout=subprocess.PIPE,
    )
    wait_for(lambda: find_server(own_study) or process.poll() is not None)
    assert process.poll() is None, (tmp_path / "server.out").read_text()
    yield process
    server = server_of(process) if process.poll() is None else 0
    process.terminate()
    if server:
        os.kill(server, signal.SIGKILL)  # it would wait for the trials that the test has left
    process.communicate()
    for worker in (each for each in started if each.poll() is None):  # a test has failed
        os.killpg(worker.pid, signal.SIGKILL)  # it would wait for the server
    started.clear()


def server_of(keeper: subprocess.Popen[str]) -> int:
    """Return the id of the process that serves, below the one that keeps it."""
    text = Path(f"/proc/{keeper.pid}/task/{keeper.pid}/children").read_text()
    for pid in map(int, text.split()):
        if b"hpo.study.serving.server" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return 0


def start(rank: int, **env: str) -> subprocess.Popen[str]:
    """Start one worker of job 77."""
    worker = subprocess.Popen(
        ["bash", "hpo/job/keep_running.sh", str(OBJECTIVE), sys.executable],
        cwd=SCRIPTS,
        env={**os.environ, "SLURM_PROCID": str(rank), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    started.append(worker)
    return worker


def storage(rank: int = 0) -> ServedStorage:
    """Return what a worker of the job opens."""
    study = open_study(Settings.from_env(SLURM_PROCID=str(rank)))
    found = storage_of(study)
    assert isinstance(found, ServedStorage)
    return found


def test_workers_outlive_their_server(
    keeper: subprocess.Popen[str], own_study: Path, tmp_path: Path
) -> None:
    """It stands still, is killed, and is started again: each trial ends once, nobody notices.

    One worker has left its first trial, with status 0: it is started again, too.
    """
    (gates := tmp_path / "gates").mkdir()
    env = {"FINAL_SEEDS": "2", "GATES": str(gates)}
    workers = [start(rank, BEHAVIOUR="slow", **env) for rank in range(1, WORKERS)]
    workers.append(start(0, BEHAVIOUR="leave once", LEFT=str(tmp_path / "left"), **env))
    here = storage()
    before = find_server(own_study)

    def finished() -> int:
        return sum(trial.state.is_finished() for trial in here.get_all_trials(1))

    def open_gates(*numbers: int) -> None:
        for number in numbers:
            (gates / f"{number}").touch()

    wait_for(lambda: len(list(gates.iterdir())) == WORKERS)  # each of them has a trial
    open_gates(0, 1)
    wait_for(lambda: finished() > 1)
    os.kill(server_of(keeper), signal.SIGSTOP)
    open_gates(2, 3, 4)
    time.sleep(2)  # not to wait for something: so long nothing goes on
    os.kill(server_of(keeper), signal.SIGCONT)
    wait_for(lambda: finished() > 4)
    os.kill(killed := server_of(keeper), signal.SIGKILL)
    open_gates(*range(5, 12))
    output = [worker.communicate(timeout=LIMIT)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, output
    assert all("complete" in text for text in output)
    assert not any("no longer this worker's" in text for text in output), output
    assert "back to the queue\nthe worker died with status 0: starting it again" in output[-1]
    assert server_of(keeper) != killed
    assert find_server(own_study) == before
    keeper.send_signal(signal.SIGTERM)
    assert keeper.communicate(timeout=LIMIT)[0] == (
        "the study's server died with status 137: starting it again (1 of 3)\n"
    )
    assert keeper.returncode == 0
    assert find_server(own_study) is None
    study = open_study(Settings.from_env())
    assert isinstance(storage_of(study), StudyStorage)
    trials = study.get_trials()
    assert [(trial.number, trial.state, len(trial.params)) for trial in trials] == [
        (number, TrialState.COMPLETE, 1) for number in range(12)
    ]
    assert [is_final(trial) for trial in trials] == [False] * 7 + [True] * 5
    assert len({trial.user_attrs["final_of"] for trial in trials[7:]}) == 5


def rejected(call: Callable[[], Any]) -> bool:
    """Whether the server refuses a call because of its secret."""
    with pytest.raises(grpc.RpcError) as error:
        call()
    return bool(error.value.code() == grpc.StatusCode.UNAUTHENTICATED)


def test_nobody_else_can_read_forge_or_delete(
    keeper: subprocess.Popen[str], own_study: Path
) -> None:
    path = served.server_path(own_study)
    assert path.stat().st_mode & 0o777 == 0o600
    server = find_server(own_study)
    assert server
    tables = [Path("/proc/net") / name for name in ("tcp", "tcp6")]
    rows = [row.split() for table in tables if table.exists() for row in table.open()]
    listening = [row[1].split(":") for row in rows if row[3] == "0A"]
    addresses = [ip for ip, port in listening if int(port, 16) in server.ports]
    assert len(addresses) == WORKERS
    # 127.0.0.1, also as an IPv6 socket has it: the job has no other node.
    assert all(address.endswith("0100007F") for address in addresses)

    mine = storage()
    mine.create_new_trial(1)
    forger = optuna.storages.GrpcStorageProxy(host=server.address, port=server.ports[0])
    best = optuna.trial.create_trial(value=-2e9)
    assert rejected(lambda: forger.get_all_trials(1))
    assert rejected(lambda: forger.create_new_trial(1, best))
    assert rejected(lambda: forger.delete_study(1))
    with grpc.insecure_channel(f"{server.address}:{server.ports[0]}") as channel:
        own = channel.unary_unary(OWN)
        request = json.dumps(["return_all", [True]]).encode()
        assert rejected(lambda: own(request))
        assert rejected(lambda: own(request, metadata=((served.HEADER, "0" * 64),)))
    guess = ServedStorage(server._replace(secret="0" * 64), 0)
    for call in (
        lambda: guess.get_all_trials(1),
        lambda: guess.create_new_trial(1, best),
        lambda: guess.create_new_trial(1),
        lambda: guess.delete_study(1),
    ):
        with pytest.raises(ServerGone, match="one job, which has a secret"):
            call()
    assert [trial.state for trial in mine.get_all_trials(1)] == [TrialState.RUNNING]


def test_a_served_storage_does_what_the_file_does(
    keeper: subprocess.Popen[str], own_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = storage(0), storage(1)
    # Excused returns are no attempts; others are, and the third is the last (MAX_ATTEMPTS).
    study = optuna.load_study(study_name="mnist_hpo", storage=mine)
    for _ in range(4):
        trial = study.ask()
        outcome = Outcome(TrialState.WAITING, site="No space left on device")
        _give_back(study, trial, outcome)
        assert outcome.state == TrialState.WAITING
    for expected in (TrialState.WAITING, TrialState.WAITING, TrialState.FAIL):
        trial = study.ask()
        assert trial.number == 0
        _give_back(study, trial, outcome := Outcome(TrialState.WAITING))
        assert outcome.state == expected
    assert "without one new epoch 3 times" in outcome.reason
    # A sampler that fails: all that this worker holds, and no other's.
    first, second = mine.create_new_trial(1), other.create_new_trial(1)
    assert mine.owners(1).keys() == {1, 2}
    mine.return_held()
    assert mine.get_trial(first).state == TrialState.WAITING
    assert mine.get_trial(second).state == TrialState.RUNNING
    # A worker that has left in the middle of a trial: keep_running.sh starts another.
    monkeypatch.setattr(sys, "argv", ["return_trials", "any token", "crashed", "5"])
    Settings.from_env(SLURM_PROCID="1")
    assert return_trials.main() == return_trials.RETURNED
    assert return_trials.main() == 0
    assert mine.count_leases(1) == 0
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        other.renew_lease(second)
    # A space with less than TOTAL_TRIALS combinations: the server learns it with each trial.
    mine.total_trials = 4
    mine.create_new_trial(1)
    with pytest.raises(NoTrialLeft, match="its 4 trials"):
        mine.create_new_trial(1)
    with pytest.raises(KeyError):
        mine.create_new_trial(99)


def test_others_may_look_at_the_backup_and_do_no_more(
    keeper: subprocess.Popen[str], own_study: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    storage().create_new_trial(1, optuna.trial.create_trial(value=5.0))
    keeper.terminate()
    assert keeper.wait(timeout=LIMIT) == 0
    backup = own_study.with_name("study.db.backup")
    announce(own_study, Server("77", "n1", "127.0.0.1", [9], "secret"))
    os.utime(backup, (time.time() - 600, time.time() - 600))
    for job in ("78", ""):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        with pytest.raises(UserError, match="job 77 on n1 serves"):
            create_or_open_study(Settings.from_env(SLURM_JOB_ID=job))
        assert backup_in_use(open_study(Settings.from_env())).startswith(
            "(a backup, made 10 min ago, at 2"
        )
    result = run("check_best_model.py")
    assert "made 10 min ago" in result.stdout
    assert "job 77 on n1 serves the study itself)" in result.stdout
    assert "best_value  5 (trial 0)" in result.stdout
    result = run(OBJECTIVE)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    result = run(OBJECTIVE, STUDY_DB=f"sqlite:///{backup}")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "is a backup, which can be looked at only" in result.stderr
    assert not own_study.with_name("checkpoints").exists()


def test_the_view_follows_the_backup_which_is_a_new_file_each_time(
    own_study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = create_or_open_study(Settings.from_env())
    backup = own_study.with_name("study.db.backup")

    def another_trial(seconds: float = 0.0) -> None:
        assert len(study.get_trials()) < 5, "the view stands still"
        study.add_trial(optuna.trial.create_trial(value=1.0))
        file = storage_of(study).file  # type: ignore[attr-defined]
        assert file.backup(backup, max_age=0)

    another_trial()
    clock = SimpleNamespace(monotonic=time.monotonic, strftime=time.strftime, sleep=another_trial)
    monkeypatch.setattr(progress, "time", clock)
    settings = Settings.from_env(STUDY_DB=f"sqlite:///{backup}", TOTAL_TRIALS="3")
    progress.follow(open_study(settings), settings)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[1:4] == ["1", "of", "3"]
    found = [re.findall(r"\((\d) of 3 finished", line) for line in lines[1:]]
    assert found == [["2"], ["3"]]


def test_only_one_server_and_a_dead_job_s_is_forgotten(own_study: Path) -> None:
    create_or_open_study(Settings.from_env())
    job = Settings.from_env(SLURM_JOB_ID="77").job_id
    assert announce(own_study, Server(job, "n1", "127.0.0.1", [1], "a"))
    assert not announce(own_study, Server("78", "n2", "127.0.0.1", [2], "b"))
    assert [path.name for path in own_study.parent.glob(".*")] == []
    for alive in ("77 78", "78"):
        assert find_server(own_study)
        served.forget_dead_server(Settings.from_env(SLURM_JOB_ID="78", ALIVE_JOBS=alive))
    assert find_server(own_study) is None


def test_another_user_s_server_is_not_ours(
    own_study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create_or_open_study(Settings.from_env())
    announce(own_study, Server("77", "n1", "127.0.0.1", [1], "a"))

    read_text = Path.read_text

    def read(path: Path, *options: Any, **more: Any) -> str:
        if path.suffix == ".server":
            raise PermissionError
        return read_text(path, *options, **more)

    monkeypatch.setattr(Path, "read_text", read)
    served.forget_dead_server(Settings.from_env(SLURM_JOB_ID="78", ALIVE_JOBS="78"))
    with pytest.raises(UserError, match=r"a job of .* serves"):
        create_or_open_study(Settings.from_env(SLURM_JOB_ID=""))


def test_a_server_that_stays_away_is_the_site_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "PATIENCE", 0.3)
    gone = ServedStorage(Server("77", "n1", "127.0.0.1", [9], "a"), 0)
    with pytest.raises(ServerGone) as error:
        gone.create_new_trial(1)
    assert fault_of(error.value).startswith("the study's server (job 77 on n1): ")


def test_the_address_is_the_one_that_leads_to_the_other_nodes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "n1.site")
    asked = []

    class Probe(socket.socket):
        def connect(self, address: Any) -> None:
            asked.append(address)
            super().connect(address)

    monkeypatch.setattr(socket, "socket", Probe)
    assert (own_address(["n1"]), asked) == ("127.0.0.1", [])
    assert own_address(["n1", "127.0.0.2"]) == "127.0.0.1"
    assert asked == [("127.0.0.2", 9)]
    with pytest.raises(UserError, match=r"no way from here to the job's node n2\.invalid"):
        own_address(["n1", "n2.invalid"])
