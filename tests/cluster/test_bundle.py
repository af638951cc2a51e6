"""The bundle on the rehearsal cluster: README.txt's commands, the sbatch script unmodified.

Each scenario runs in a fresh copy of the last commit (`git archive HEAD`) under /work, as the
ordinary user, and adds a row to the table at the end of the run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from cluster.rehearsal import STATE, Cluster, Scenario
from common import BUNDLE

SCRIPT = "run-optuna-multinode_Turpan.sh"
README = (BUNDLE / "README.txt").read_text()
SCANCEL = "scancel, then submitted again"
FINISHED = ("COMPLETE", "PRUNED", "FAIL")
# All in the environment. Four workers share what cores this machine has: one thread each; and what
# a dead worker held is free again after 15 s.
QUICK = {
    "TOTAL_TRIALS": "12",
    "TRAIN_IMAGES": "200",
    "OMP_NUM_THREADS": "1",
    "LEASE_GRACE": "15",
}


def readme_command(start: str, end: str = "") -> str:
    """Return the command of README.txt that begins and ends so."""
    pattern = rf"^ +({re.escape(start)}.*{re.escape(end)})$"
    found = re.search(pattern, README, re.MULTILINE)
    assert found, f"README.txt has no command like: {start} … {end}"
    return found[1]


def typed(command: str) -> tuple[str, ...]:
    """Return what runs a command as it is typed after README.txt's two lines for the container."""
    lines = [readme_command("IMAGE="), readme_command("in_image()"), command]
    return ("bash", "-c", "\n".join(lines))


ASK = """
import json, sqlite3, sys
database = sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True, timeout=30)
print(json.dumps(database.execute(sys.argv[2]).fetchall()))
"""


@dataclass
class Bundle:
    """A copy of the bundle on the cluster, and what its study and logs say."""

    cluster: Cluster
    folder: str
    record: Callable[[Scenario], None]

    @property
    def scripts(self) -> str:
        """The folder that jobs are submitted from."""
        return f"{self.folder}/code_and_slurm-scripts"

    def submit(self, *options: str, script: str = SCRIPT, **variables: str) -> int:
        """Submit the script; the environment and options of sbatch are all that differs."""
        return self.cluster.sbatch(*options, script, folder=self.scripts, **{**QUICK, **variables})

    def submit_as(self, user: str, **variables: str) -> int:
        """Submit the script, on one node, as one of several users who share the folder."""
        names = [f"{name}={value}" for name, value in {**QUICK, **variables}.items()]
        command = ("env", *names, "sbatch", "--parsable", "--nodes=1", SCRIPT)
        options = ("--user", user, "--cd", self.scripts)
        shell = ("bash", "-c", 'umask 002 && exec "$@"', "bash")
        return int(self.cluster.run("login", *shell, *command, options=options).stdout)

    def edit_header(self, alternative: str) -> str:
        """Take the header's alternative that stands commented under a line; return the script."""
        live, _, rest = self.cluster.read(f"{self.scripts}/{SCRIPT}").partition("\nset -euo")
        found = re.search(rf"^# {alternative}.*\n((?:##SBATCH.*\n)+)", live, re.MULTILINE)
        assert found, f"the header says nothing about: {alternative}"
        if "without --gpus-per-task" in found[0]:
            live = re.sub(r"^#SBATCH --gpus-per-task.*\n", "", live, flags=re.MULTILINE)
        for line, name in re.findall(r"^#(#SBATCH --([\w-]+)=.*)$", found[1], re.MULTILINE):
            live = re.sub(rf"^#SBATCH --{name}=.*$", line, live, flags=re.MULTILINE)
        path = self.cluster.shared / self.scripts.lstrip("/") / "edited.sh"
        path.write_text(f"{live}\nset -euo{rest}")
        return path.name

    def insert(self, line: str, before: str, script: str = "optuna_mnist.py") -> None:
        """Insert a line into this copy's script, before every line that begins so."""
        path = self.cluster.shared / self.scripts.lstrip("/") / script
        edited, times = re.subn(
            rf"^( +)({re.escape(before)})", rf"\1{line}\n\1\2", path.read_text(), flags=re.MULTILINE
        )
        assert times, before
        path.write_text(edited)

    def hold(self, first: int) -> None:
        """Let all trials from this one on wait for `go`: a job is in their middle until then."""
        wait = f"while trial.number >= {first} and not os.path.exists('go'): time.sleep(0.1)"
        for line in ("import os, time", wait):
            self.insert(line, before="loss, _ = evaluate(")

    def go(self) -> None:
        """End the wait of `hold`."""
        (self.cluster.shared / self.scripts.lstrip("/") / "go").touch()

    def meet(self, name: str) -> None:
        """Let every trial wait until trials of two different names are there: `name` is Python."""
        met = f'open(f"met-{{{name}}}", "w").close(), [time.sleep(0.2) for _ in range(1500)'
        both = 'if len(glob.glob("met-*")) < 2]'
        self.insert(f"import glob, os, time; {met} {both}", before="loss, _ = evaluate(")

    def log(self, job: int, worker: int | None = None) -> str:
        """Return the log of a job, or of one of its workers."""
        name = f"{job}.out" if worker is None else f"{job}.{worker}.out"
        return self.cluster.read(f"{self.folder}/logs/{name}")

    def finish(self, job: int, timeout: float = 600) -> None:
        """Wait for a job that must succeed."""
        state = self.cluster.wait_end(job, timeout)
        assert state == "COMPLETED", f"job {job}: {state}\n{self.log(job)}"

    def asked(self, query: str, study: str = "study.db") -> list[tuple[Any, ...]]:
        """Return what the study in that file answers; nothing before there is one."""
        path = self.cluster.shared / self.scripts.lstrip("/") / study
        if not path.exists():
            return []
        if self.cluster.file_system != "bind":  # SQLite does not follow the machine's way to it
            given = (f"{self.scripts}/{study}", query)
            done = self.cluster.run("login", "python3", "-", *given, stdin=ASK)
            return [tuple(row) for row in json.loads(done.stdout)]
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=30)) as database:
            return database.execute(query).fetchall()

    def trials(self, study: str = "study.db") -> list[tuple[int, str]]:
        """Return number and state of every trial of the one study in that file."""
        return self.asked("SELECT number, state FROM trials ORDER BY number", study)

    def epochs_of(self, number: int) -> list[int]:
        """Return the epochs that the program of a trial has told, in its log."""
        log = self.cluster.read(f"{self.folder}/logs/mnist_hpo.trial-{number:05d}.out")
        return [int(epoch) for epoch in re.findall(r"^epoch (\d+):", log, re.MULTILINE)]

    def wait_finished(self, least: int, timeout: float = 600) -> None:
        """Wait until at least so many trials are finished, while others run."""

        def enough() -> str:
            states = [state for _, state in self.trials()]
            return "yes" * (sum(state in FINISHED for state in states) >= least)

        self.cluster.wait(enough, timeout, f"{least} finished trials")

    def workers(self, job: int) -> dict[int, str]:
        """Return each worker that wrote a log, with the hosts that it ran on."""
        logs = self.cluster.shared / self.folder.lstrip("/") / "logs"
        names = (path.name.split(".") for path in logs.glob(f"{job}.*.out"))
        numbers = sorted(int(name[1]) for name in names if name[1].isdecimal())
        found = {}
        for number in numbers:
            hosts = re.findall(rf"worker {number} on (\w+): trial", self.log(job, number))
            found[number] = ",".join(dict.fromkeys(hosts))
        return found

    def done(
        self, name: str, jobs: list[int], start: float, total: int = 12, study: str = "study.db"
    ) -> None:
        """Check that each trial was finished once, and add the scenario to the table."""
        trials = self.trials(study)
        states = Counter(state for _, state in trials)
        workers = [host for job in jobs for host in self.workers(job).values()]
        hosts = ",".join(sorted(set(",".join(workers).split(",")) - {""}))
        text = ", ".join(f"{states[state]} {state.lower()}" for state in FINISHED)
        self.record(Scenario(name, len(workers), hosts, text, time.monotonic() - start))
        assert [number for number, _ in trials] == list(range(total))
        logs = [self.log(job, worker) for job in jobs for worker in self.workers(job)]
        assert set(states) <= {"COMPLETE", "PRUNED"}, "\n".join(logs)
        told = re.findall(r"trial (\d+) (?:complete|pruned)", "\n".join(logs))
        # Of a worker that is killed between the database and its log the last line may be missing.
        assert len(told) == len(set(told)), f"finished twice: {Counter(told).most_common(3)}"


@pytest.fixture(scope="session")
def with_optuna(cluster: Cluster) -> Cluster:
    """Install Optuna, and all the rest, with README.txt's command; another module may have."""
    requirements = "requirements-container.txt"
    here, there = BUNDLE / "code_and_slurm-scripts", cluster.shared / cluster.work.lstrip("/")
    shutil.copy(here / requirements, there / requirements)
    shutil.copytree(here / "hpo", there / "hpo", dirs_exist_ok=True)
    install = readme_command("in_image pip install", requirements)
    if "image.txt" in install:  # what pip must not replace
        install = f"{readme_command('in_image python -s', 'image.txt')}\n{install}"
    command = typed(install)
    options = ["--online", "--cd", cluster.work]
    done = cluster.run("login", *command, options=options, timeout=600)
    there_now = ("Successfully installed", "Requirement already satisfied: optuna==")
    assert any(line in done.stdout for line in there_now), done.stdout
    return cluster


@pytest.fixture
def bundle(
    with_optuna: Cluster, request: pytest.FixtureRequest, record: Callable[[Scenario], None]
) -> Iterator[Bundle]:
    """Copy the bundle to /work/groupe/chercheur; end what is left of its jobs afterwards."""
    cluster = with_optuna
    folder = f"{cluster.work}/{re.sub(r'[^a-z]+', '-', request.node.name.lower()).strip('-')}"
    place = cluster.shared / folder.lstrip("/")
    place.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(BUNDLE), "archive", "HEAD"], capture_output=True, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(place)], input=archive.stdout, check=True)
    subprocess.run(["chown", "-R", "1000:1000", str(place)], check=True)
    yield Bundle(cluster, folder, record)
    cluster.run("login", "scancel", "--user", cluster.user)
    cluster.wait(
        lambda: "" if cluster.run("login", "squeue", "--noheader").stdout else "empty",
        60,
        "an empty queue",
    )
    shutil.rmtree(place)


def files(cluster: Cluster) -> set[Path]:
    """Return every file on the cluster, but for Slurm's own, and the file server's."""
    folders = [cluster.shared / name for name in ("work", "tmpdir", "users")]
    roots = [*folders, *STATE.glob("*/upper")]
    slurm = re.compile(r"/upper/(var/(log|spool|lib/glusterd)|run|etc)/")
    found = (path for root in roots for path in root.rglob("*"))
    return {path for path in found if not slurm.search(str(path)) and not path.is_dir()}


@pytest.fixture(params=["bind", "gluster", "gluster-stale"])
def file_system(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """Let the hosts share each kind of file system in turn; FILE_SYSTEM names one alone."""
    name = str(request.param)
    if os.environ.get("FILE_SYSTEM", name) != name:
        pytest.skip(f"FILE_SYSTEM={os.environ['FILE_SYSTEM']}")
    with cluster.on(name):
        yield name


def test_guide(file_system: str, bundle: Bundle) -> None:
    """2 nodes × 2 GPUs: four workers, one study, logs where README says, the best model.

    On GlusterFS, too: whose locks hold, and whose caches do, or are found to be stale.
    """
    before, start = files(bundle.cluster), time.monotonic()
    job = bundle.submit()
    bundle.finish(job, timeout=600)
    bundle.done(f"the guide: 2 nodes × 2 GPUs, {file_system}", [job], start)
    served = "The nodes cannot share the file: one process on" in bundle.log(job)
    assert served == (file_system == "gluster-stale"), bundle.log(job)
    if not served:
        assert "100 of 100 increments by 4 tasks arrived" in bundle.log(job)
    workers = bundle.workers(job)
    assert list(workers) == [0, 1, 2, 3]
    assert Counter(workers.values()) == {"n1": 2, "n2": 2}
    assert "best_value" in bundle.log(job)
    preflight = re.search(r"^Preflight of 4 tasks: (\d+) s$", bundle.log(job), re.MULTILINE)
    assert preflight, bundle.log(job)
    bundle.record(Scenario("  … of which preflight", 4, "n1,n2", "", float(preflight[1])))

    command = "in_image python check_best_model.py"
    assert f"\n    {command}\n" in README
    best = typed(command)
    shown = bundle.cluster.run("login", *best, options=["--cd", bundle.scripts]).stdout
    assert "\n12 of 12 trials" in shown, shown
    assert re.search(r"^best_value +\d", shown, re.MULTILINE), shown
    assert re.search(r"^test accuracy +0", shown, re.MULTILINE), shown

    allowed = tuple(
        str(bundle.cluster.shared / folder.lstrip("/"))
        for folder in (bundle.folder, bundle.cluster.home)
    )
    new = [str(path) for path in files(bundle.cluster) - before]
    assert [path for path in new if not path.startswith(allowed)] == []


@pytest.mark.parametrize(
    ("alternative", "host"), [("One GPU of a shared node", "n1"), ("A slice of a GPU", "m1")]
)
def test_one_worker(bundle: Bundle, alternative: str, host: str) -> None:
    """One worker on half a node, and on a MIG slice: the header's own alternatives."""
    start = time.monotonic()
    job = bundle.submit(script=bundle.edit_header(alternative), TOTAL_TRIALS="3")
    bundle.finish(job)
    bundle.done(alternative, [job], start, total=3)
    assert bundle.workers(job) == {0: host}


def test_twelve_gpus(bundle: Bundle) -> None:
    """Six nodes: Slurm takes the header as it stands in the script."""
    script = bundle.edit_header("Twelve GPUs")
    command = ("sbatch", "--test-only", script)
    done = bundle.cluster.run("login", *command, options=["--cd", bundle.scripts])
    assert "480 processors on nodes n[1-6] in partition small" in done.stderr


def test_two_jobs_share_a_study(bundle: Bundle) -> None:
    """A second job of the same study makes it faster, and nothing else."""
    start = time.monotonic()
    jobs = [bundle.submit(), bundle.submit()]
    for job in jobs:
        bundle.finish(job)
    bundle.done("two jobs at once, one study", jobs, start)


def test_two_users_of_a_group(bundle: Bundle) -> None:
    """OTHER_SITE.txt's way to share a study: both work at once, and take nothing from each other.

    No trial goes on before both have one.
    """
    start, cluster = time.monotonic(), bundle.cluster
    homes = cluster.shared / "users" / "groupe"
    packages = (str(homes / "chercheur" / ".local"), str(homes / "collegue" / ".local"))
    subprocess.run(["cp", "--archive", "--link", *packages], check=True)
    bundle.meet("os.getuid()")
    page = cluster.read(f"{bundle.scripts}/OTHER_SITE.txt")
    commands = "\n".join(re.findall(r"^    (chgrp .*|find .*)$", page, re.M))
    assert commands.count("\n") == 1, page
    commands = commands.replace("mygroup", "groupe")
    cluster.run("login", "bash", "-ec", commands, options=["--cd", bundle.folder])
    jobs = [bundle.submit_as(user, TOTAL_TRIALS="10") for user in ("chercheur", "collegue")]
    for job in jobs:
        bundle.finish(job)
    bundle.done("two users of a group, one study", jobs, start, total=10)
    assert [list(bundle.workers(job)) for job in jobs] == [[0, 1], [0, 1]]
    logs = [bundle.log(job, worker) for job in jobs for worker in (0, 1)]
    assert "back to the queue" not in "".join(logs)
    find = ("find", ".", "-not", "-type", "l", "-not", "-perm", "-g+w")
    closed = cluster.run("login", *find, options=["--cd", bundle.folder]).stdout
    assert closed == ""


def test_broken_locks(bundle: Bundle) -> None:
    """Where locks hold on one host only, the job serves the study."""
    start = time.monotonic()
    with bundle.cluster.broken_locks():
        job = bundle.submit()
        bundle.finish(job)
    assert "The nodes cannot share the file: one process on" in bundle.log(job)
    bundle.done("locks that hold on one host only", [job], start)


def put_another_study(bundle: Bundle) -> list[float]:
    """Put one beside the scripts, other.db; return the learning rates of its best, in order."""
    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(storage=f"sqlite:///{folder}/other.db", study_name="old")
        for value in (9, 3, 7, 1, 5, 2, 4):
            lr = trial_rate(value)
            space = {"lr": FloatDistribution(lr, lr), "epochs": IntDistribution(2, 2)}
            params = {"lr": lr, "epochs": 2}
            study.add_trial(
                optuna.create_trial(value=value, params=params, distributions=dict(space))
            )
        shutil.copy(f"{folder}/other.db", bundle.cluster.shared / bundle.scripts.lstrip("/"))
    return [trial_rate(value) for value in (1, 2, 3, 4, 5)]


def trial_rate(value: int) -> float:
    """Return the learning rate of the other study's trial with this value."""
    return 1e-3 + 1e-5 * value


RATES = """
SELECT number, param_value FROM trials JOIN trial_params USING (trial_id) WHERE param_name = 'lr'
"""
VALUES = "SELECT number, value FROM trials JOIN trial_values USING (trial_id)"
REPEATS = """
SELECT number, value_json FROM trials JOIN trial_user_attributes USING (trial_id)
WHERE key = 'final_of' ORDER BY number
"""


def check_known_and_finals(bundle: Bundle, known: list[float]) -> None:
    """Check that a study of 12 began with these rates, and ended with its best five again."""
    rates, values = dict(bundle.asked(RATES)), dict(bundle.asked(VALUES))
    assert [rates[number] for number in range(1, 6)] == known  # trial 0 is known_good's
    repeats = {number: int(text) for number, text in bundle.asked(REPEATS)}
    assert list(repeats) == [7, 8, 9, 10, 11], repeats
    best = sorted(range(7), key=lambda number: values[number])[:5]
    assert sorted(repeats.values()) == sorted(best), (repeats, values)
    assert all(rates[number] == rates[of] for number, of in repeats.items()), (repeats, rates)


@pytest.mark.parametrize("killed", [False, True])
def test_scancel_and_submit_again(killed: bool, bundle: Bundle) -> None:
    """After scancel the same command completes the study, also if SIGTERM kills the workers.

    So it does where a worker needs a part of the image that has gone; and among the final runs of
    a study that began with another one's best.
    """
    start, settings, known = time.monotonic(), {}, []
    if killed:
        die = "import signal; signal.signal(signal.SIGTERM, signal.SIG_DFL)"
        bundle.insert(die, before="config = search_space(trial)")
    else:
        known = put_another_study(bundle)
        settings = {"FROM_STUDY": "other.db:old", "FINAL_SEEDS": "2", "PRUNER": "none"}
    held, least = (6, 2) if killed else (9, 8)
    bundle.hold(held)
    first = bundle.submit(**settings)
    bundle.wait_finished(least)
    bundle.cluster.run("login", "scancel", str(first))
    assert bundle.cluster.wait_end(first, 600) == "CANCELLED"
    logs = [bundle.log(first), *(bundle.log(first, worker) for worker in bundle.workers(first))]
    assert "RUNNING" not in [state for _, state in bundle.trials()], "\n\n".join(logs)
    scripts = bundle.cluster.shared / bundle.scripts.lstrip("/")
    assert not list(scripts.glob("core*"))  # of a worker that needs what has gone
    if killed:
        assert re.search(r"^trial \d+ back to the queue$", "\n".join(logs), re.MULTILINE), logs
    bundle.go()
    second = bundle.submit(**settings)
    bundle.finish(second)
    bundle.done("  … and it kills the workers" if killed else SCANCEL, [first, second], start)
    if not killed:
        check_known_and_finals(bundle, known)


CURVES = """
import json, sys
import optuna
import optuna_mnist

class Recorder(optuna.trial.FixedTrial):
    def report(self, value, step):
        self.curve.append(value)

study = optuna.load_study(study_name="mnist_hpo", storage="sqlite:///study.db")
for number in json.loads(sys.argv[1]):
    stored = study.trials[number]
    trial = Recorder(stored.params, number=number)
    trial.curve = []
    optuna_mnist.train_model(optuna_mnist.search_space(trial), trial)
    known = [stored.intermediate_values[step] for step in sorted(stored.intermediate_values)]
    print(number, known == trial.curve[:len(known)], known, trial.curve)
"""


def test_deadline_and_chain(bundle: Bundle) -> None:
    """Before the time limit the workers stop by themselves, and the job submits its successor.

    So does one that would be in an epoch for longer.  A trial that was interrupted has the curve of
    one that never was, to the last bit.  What sbatch is given holds for all jobs, and all tasks.
    """
    start = time.monotonic()
    # Too long for one job on any machine, since one epoch would never end; and four minutes are
    # enough for a slow one to be in that epoch when they are over.
    seconds = 'open("long", "w") and 600 if not trial.number and not os.path.exists("long") else 6'
    bundle.insert(f"import os, time; time.sleep({seconds})", before="loss, _ = evaluate(")
    settings = {"TOTAL_TRIALS": "9", "TRAIN_IMAGES": "2000", "PRUNER": "none"}
    given = {**QUICK, **settings, "CHAIN_JOBS": "99"}
    export = "--export=" + ",".join(f"{name}={value}" for name, value in given.items())
    jobs = [bundle.submit("--time=4", "--mem=100G", "--exclude=n3", export)]
    bundle.finish(jobs[0])
    first = "".join(bundle.log(jobs[0], worker) for worker in range(4))
    assert "the job ends in 45 s: the running epoch is interrupted" in first, first
    assert "trial 0 back to the queue" in first
    # Where nodes are free the successor runs already.
    held = "SELECT number FROM leases JOIN trials USING (trial_id) WHERE owner IS NOT NULL"
    assert bundle.asked(f"{held} AND state = 'RUNNING' AND job_id LIKE '{jobs[0]}@%'") == []
    assert "FAIL" not in [state for _, state in bundle.trials()]
    assert "The study is complete." not in bundle.log(jobs[0])
    while "The study is complete." not in bundle.log(jobs[-1]):
        found = re.search(r"^Submitted batch job (\d+)$", bundle.log(jobs[-1]), re.MULTILINE)
        assert found, bundle.log(jobs[-1])
        jobs.append(int(found[1]))
        has = bundle.cluster.job(jobs[-1])  # as the first
        assert (has["TimeLimit"], has["MinMemoryNode"]) == ("00:04:00", "100G")
        assert (has["ExcNodeList"], has["NumNodes"]) == ("n3", "2"), has
        bundle.finish(jobs[-1])
    assert "Submitted" not in bundle.log(jobs[-1])
    bundle.done(f"time limit, chain of {len(jobs)} jobs", jobs, start, total=9)

    logs = "".join(bundle.log(job, worker) for job in jobs for worker in bundle.workers(job))
    returned = sorted({int(n) for n in re.findall(r"trial (\d+) back to the queue", logs)})
    assert returned, "the time limit has interrupted no trial"
    quick = [f"{name}={value}" for name, value in {**QUICK, **settings}.items()]
    python = ("apptainer", "exec", "--bind", "/tmpdir,/work", bundle.cluster.image, "python", "-")
    command = ("env", *quick, "STUDY_NAME=again", *python, str(returned[:3]))
    options = ("--cd", bundle.scripts)
    curves = bundle.cluster.run("login", *command, options=options, stdin=CURVES, timeout=600)
    compared = curves.stdout.splitlines()
    assert len(compared) == len(returned[:3])
    assert all(line.split()[1] == "True" for line in compared), curves.stdout


def test_larger_model(bundle: Bundle) -> None:
    """The same script runs optuna_t5.py: a worker per GPU, then a trial on both GPUs of a node."""
    start = time.monotonic()
    scripts = bundle.cluster.shared / bundle.scripts.lstrip("/")
    (scripts / "pairs.tsv").write_text("".join(f"{n}\t{n:b}\n" for n in range(1000)))
    names = {"PY_SCRIPT": "optuna_t5.py", "SMALL": "1", "DATA": "pairs.tsv", "TOTAL_TRIALS": "4"}
    single = bundle.submit(**names)
    bundle.finish(single)
    bundle.done("optuna_t5.py: 2 nodes × 2 GPUs", [single], start, total=4)
    assert Counter(bundle.workers(single).values()) == {"n1": 2, "n2": 2}
    assert re.search(r"^exact match +\d", bundle.log(single), re.MULTILINE)

    start = time.monotonic()
    script = bundle.edit_header("Each trial on both GPUs")
    both = bundle.submit(script=script, GPUS_PER_TRIAL="2", STUDY_DB="sqlite:///both.db", **names)
    bundle.finish(both)
    bundle.done("  … each trial on both GPUs of a node", [both], start, total=4, study="both.db")
    assert bundle.workers(both) == {0: "n1", 1: "n2"}


@contextmanager
def no_room_at_home(cluster: Cluster, full: str, read_only: str) -> Iterator[None]:
    """HOME has no room for a byte on one host, and is read-only on another, within this context."""
    fill = f"""
        mkdir -p /srv/home
        mount -t tmpfs -o size=64k tmpfs /srv/home
        mkdir /srv/home/upper /srv/home/work
        chown {cluster.user} /srv/home/upper
        ! cat /dev/zero >/srv/home/filler
        layers=lowerdir={cluster.home},upperdir=/srv/home/upper,workdir=/srv/home/work
        mount -t overlay overlay -o $layers {cluster.home}
    """
    lock = f"mount --bind {cluster.home} {cluster.home}; mount -o remount,bind,ro {cluster.home}"
    options = ["--user", "root", "--cd", "/"]
    write = ("bash", "-c", "echo text >~/note")
    try:
        for host, made, said in ((full, fill, "No space"), (read_only, lock, "Read-only file")):
            cluster.run(host, "bash", "-ec", made, options=options)
            assert said in cluster.run(host, *write, check=False).stderr
        yield
    finally:
        cluster.run(full, "umount", "-l", cluster.home, "/srv/home", options=options)
        cluster.run(read_only, "umount", "-l", cluster.home, options=options)


def test_another_site(bundle: Bundle) -> None:
    """The header of OTHER_SITE.txt, on two nodes, and a module's Python in place of a container.

    No file is for others to read, the site sets a TMPDIR that is not there, and HOME is full on one
    node, and read-only on the other.
    """
    start = time.monotonic()
    bundle.meet("os.uname().nodename")
    here = bundle.cluster.shared / bundle.scripts.lstrip("/")
    header = re.findall(r"^    (#SBATCH .*)$", (here / "OTHER_SITE.txt").read_text(), re.M)
    old, _, rest = (here / SCRIPT).read_text().partition("\nset -euo")
    kept = [line for line in old.splitlines() if re.match(r"#SBATCH --(job|out|open|sig)", line)]
    module = f"PATH={bundle.folder}/bin:$PATH; umask 077; export TMPDIR=/none"
    body = rest.replace("# module load …", module, 1)
    assert module in body
    (here / "ours.sh").write_text("\n".join(["#!/bin/bash", *kept, *header, f"set -euo{body}"]))
    python = here.parent / "bin" / "python3"
    python.parent.mkdir()
    command = f"exec apptainer exec --bind /work {bundle.cluster.image} python"
    python.write_text(f'#!/bin/bash\n{command} "$@"\n')
    python.chmod(0o755)
    with no_room_at_home(bundle.cluster, full="n1", read_only="n2"):
        given = {"CONTAINER": "", "TOTAL_TRIALS": "3", "BINDS": "/none"}
        job = bundle.submit("--nodes=2", script="ours.sh", **given)
        bundle.finish(job)
    bundle.done("another site, without a container", [job], start, total=3)
    assert bundle.cluster.job(job)["Partition"] == "gpu"
    assert list(bundle.workers(job)) == [0, 1, 2, 3]
    assert {*bundle.workers(job).values(), ""} == {"n1", "n2", ""}
    assert (here / "study.db").stat().st_mode & 0o077 == 0


UNINTERRUPTED = """
import json, subprocess, sys
import optuna

study = optuna.load_study(study_name="mnist_hpo", storage="sqlite:///study.db")
for number in json.loads(sys.argv[1]):
    trial = study.trials[number]
    values = {**trial.params, "epochs": 10, "seed": number}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "example_program.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
    known = [trial.intermediate_values[step] for step in range(1, 11)]
    print(number, known == losses and trial.value == losses[-1], known, losses)
"""


def test_any_program(bundle: Bundle) -> None:
    """optuna_command.py: scancel in mid-trial; a job on another node goes on with the trials.

    To the values of programs that nobody has interrupted, to the last bit.
    """
    start = time.monotonic()
    slower = "import time; time.sleep(0.7 * bool(options.folder))"
    bundle.insert(slower, before="loss = sum(", script="example_program.py")
    settings = {"PY_SCRIPT": "optuna_command.py", "FIX": "epochs=10", "PRUNER": "none"}
    settings["TOTAL_TRIALS"] = "2"
    first = bundle.submit("--nodes=1", **settings)
    epochs = "SELECT count(*) FROM trial_intermediate_values GROUP BY trial_id"
    bundle.cluster.wait(lambda: "yes" * (len(bundle.asked(epochs)) == 2), 600, "two trials at work")
    bundle.cluster.run("login", "scancel", str(first))
    assert bundle.cluster.wait_end(first, 600) == "CANCELLED"
    returned = [number for number, state in bundle.trials() if state == "WAITING"]
    assert returned, bundle.trials()
    done = {number: bundle.epochs_of(number)[-1] for number in returned}

    second = bundle.submit("--nodes=1", "--exclude=n1", **settings)
    bundle.finish(second)
    bundle.done("optuna_command.py, scancel, another node", [first, second], start, total=2)
    assert set(bundle.workers(first).values()) == {"n1"}
    assert set(bundle.workers(second).values()) - {""} == {"n2"}
    for number in returned:
        told = bundle.epochs_of(number)
        assert told == [*range(1, done[number] + 1), *range(told[done[number]], 11)], told
        assert told[done[number]] in (done[number], done[number] + 1)  # not from the start
    python = ("apptainer", "exec", "--bind", "/tmpdir,/work", bundle.cluster.image, "python", "-")
    options = ("--cd", bundle.scripts)
    compared = bundle.cluster.run(
        "login", *python, str(returned), options=options, stdin=UNINTERRUPTED
    ).stdout.splitlines()
    assert len(compared) == len(returned)
    assert all(line.split()[1] == "True" for line in compared), compared


def test_estimate(bundle: Bundle) -> None:
    """What the job will cost, before and after there are trials to learn from."""
    command = readme_command("bash run-optuna-multinode_Turpan.sh --estimate").split()
    options = ("--cd", bundle.scripts)
    shown = bundle.cluster.run("login", *command, options=options).stdout
    assert "2 (small), 4 tasks, 4 workers" in shown
    assert "assumed: none finished" in shown
    assert re.search(r"billed +about \d+\.\d core-hours \(160 cores\)", shown), shown


def test_requeue(bundle: Bundle) -> None:
    """`scontrol requeue` starts the job again, and it goes on with the study."""
    start = time.monotonic()
    bundle.hold(6)
    job = bundle.submit()
    bundle.wait_finished(2)
    bundle.cluster.run("login", "scontrol", "requeue", str(job))
    bundle.cluster.wait_state(job, {"PENDING"}, 600)
    bundle.go()
    bundle.finish(job)
    bundle.done("scontrol requeue", [job], start)


def test_killed_worker(bundle: Bundle) -> None:
    """A worker dies: the others go on, it is started again, and its trial is run again."""
    start = time.monotonic()
    bundle.hold(6)
    job = bundle.submit()
    bundle.wait_finished(2)
    kill = ("pkill", "--oldest", "--signal=KILL", "--full", "^[^ ]*python -u .*optuna_mnist")
    bundle.cluster.run("n1", *kill)
    bundle.go()
    bundle.finish(job)
    bundle.done("a worker is killed", [job], start)


def test_dead_node(bundle: Bundle) -> None:
    """A node dies in mid-trial: Slurm starts the job again, and the study completes."""
    start = time.monotonic()
    bundle.hold(6)
    job = bundle.submit()
    bundle.wait_finished(2)
    bundle.cluster.script("crash", "n2")
    try:
        bundle.cluster.wait_state(job, {"PENDING"}, 600)
        bundle.go()
        bundle.finish(job)
    finally:
        bundle.cluster.script("restart", "n2")
    bundle.done("a node dies in mid-trial", [job], start)
