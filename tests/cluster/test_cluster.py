"""The rehearsal cluster itself: is it enough of a Turpan for what test_bundle.py shows on it?

pytest tests/cluster/test_cluster.py       (as root; see conftest.py)
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from cluster.rehearsal import HERE, Cluster

# The header of the site's guide.
GUIDE_HEADER = """\
#!/bin/bash
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --gres=gpu:2
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=4
#SBATCH --time=00:10:00
#SBATCH --mem=16G
#SBATCH --partition=small
"""

TAKE_LOCK = """
import fcntl, time
file = open("/work/groupe/chercheur/lock", "a+")
try:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    print("taken", flush=True)
    time.sleep({seconds})
except BlockingIOError:
    print("refused")
"""


def test_exec_passes_everything_on(cluster: Cluster) -> None:
    """The user, his HOME, the folder, standard input, arguments and the exit status."""
    code = 'read -r line; echo "$(id -un) $HOME $PWD $(hostname) $line $1"; exit 7'
    done = cluster.run(
        "n1", "bash", "-c", code, "bash", "two  words",
        options=["--cd", "/tmpdir"], check=False, stdin="hello\n",
    )  # fmt: skip
    assert done.stdout == f"chercheur {cluster.home} /tmpdir n1 hello two  words\n"
    assert done.returncode == 7


def test_hosts_share_folders_and_nothing_else(cluster: Cluster) -> None:
    """/work, /tmpdir and HOME are shared; /tmp, processes and the network are each host's own."""
    for folder in (cluster.work, "/tmpdir/chercheur", cluster.home):
        cluster.run("n1", "tee", f"{folder}/note", stdin="from n1")
        assert cluster.run("n2", "cat", f"{folder}/note").stdout == "from n1"
        cluster.run("n1", "rm", f"{folder}/note")
    cluster.run("n1", "touch", "/tmp/note")
    assert "note" not in cluster.run("n2", "ls", "/tmp").stdout.split()
    assert cluster.run("n2", "pgrep", "slurmctld", check=False).returncode == 1
    addresses = cluster.run("n2", "ip", "-4", "-brief", "address").stdout
    assert re.findall(r"^(\w+)", addresses, re.MULTILINE) == ["lo", "eth0"]


def test_each_task_has_its_own_gpu(cluster: Cluster) -> None:
    """The guide's header: four tasks on two hosts, each with one GPU, which it sees as number 0."""
    code = 'echo "$SLURM_PROCID $(hostname) $REHEARSAL_DEVICE $CUDA_VISIBLE_DEVICES"'
    job = cluster.sbatch("--output=gpus.out", stdin=f"{GUIDE_HEADER}srun bash -c '{code}'\n")
    assert cluster.wait_end(job, timeout=600) == "COMPLETED"
    lines = sorted(cluster.read(f"{cluster.work}/gpus.out").splitlines())
    tasks, hosts, gpus, numbers = zip(*(line.split() for line in lines), strict=True)
    assert tasks == ("0", "1", "2", "3")
    assert set(numbers) == {"0"}
    assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
    assert set(zip(hosts, gpus, strict=True)) == {(h, g) for h in hosts for g in ("0", "1")}


def test_mig_slice(cluster: Cluster) -> None:
    """A job on the MIG partition gets one slice."""
    options = ("--partition=3g.40gb", "--gres=gpu:3g.40gb", "--output=mig.out")
    code = "#!/bin/bash\nsrun bash -c 'echo $(hostname) $CUDA_VISIBLE_DEVICES'\n"
    job = cluster.sbatch(*options, stdin=code)
    assert cluster.wait_end(job, timeout=600) == "COMPLETED"
    assert cluster.read(f"{cluster.work}/mig.out") == "m1 0\n"


def test_image_on_a_compute_node(cluster: Cluster) -> None:
    """The ordinary user runs the site's image, which has torch and torchvision but no Optuna."""
    code = "import os, torch, torchvision; print(os.getuid(), torch.ones(2).sum().item())"
    assert cluster.python("n1", code) == "1000 2.0\n"
    assert cluster.python("n1", "from importlib.util import find_spec as f; print(f('optuna'))")


def locks(cluster: Cluster) -> list[str]:
    """Take a lock on n1; return how n1 and n2 fare when they ask for it meanwhile."""
    image = ("apptainer", "--silent", "exec", "--bind", "/work", cluster.image)
    holder = subprocess.Popen(
        ["bash", HERE / "cluster.sh", "exec", "n1", "--", *image, "python", "-c",
         TAKE_LOCK.format(seconds=600)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout
    assert holder.stdout.readline() == "taken\n"
    answers = [cluster.python(host, TAKE_LOCK.format(seconds=0)) for host in ("n1", "n2")]
    cluster.run("n1", "pkill", "-u", cluster.user, "python")
    holder.communicate(timeout=600)
    return [answer.strip() for answer in answers]


def test_locks(cluster: Cluster) -> None:
    """A lock excludes the other host; with broken-locks only the same host."""
    assert locks(cluster) == ["refused", "refused"]
    with cluster.broken_locks():
        assert locks(cluster) == ["refused", "taken"]
    assert locks(cluster) == ["refused", "refused"]


def test_usr1_reaches_python_in_the_container(cluster: Cluster) -> None:
    """Slurm's signal passes srun and apptainer on every node."""
    code = (
        "import os, signal; signal.signal(signal.SIGUSR1, lambda *_: os._exit(0)); "
        'print("ready", flush=True); signal.pause()'
    )
    body = f"srun apptainer --silent exec {cluster.image} python -c '{code}'\n"
    job = cluster.sbatch("--output=usr1.out", stdin=GUIDE_HEADER + body)
    log = f"{cluster.work}/usr1.out"
    cluster.wait(lambda: "yes" * (cluster.read(log).count("ready") == 4), 600, "four tasks")
    cluster.run("login", "scancel", "--signal=USR1", str(job))
    assert cluster.wait_end(job, timeout=600) == "COMPLETED"


def test_usr1_takes_the_image_away(cluster: Cluster) -> None:
    """Slurm signals every process of a step, and the one that mounts the image dies of USR1.

    So `#SBATCH --signal=USR1@90` without `B:` leaves Python with an image that it cannot read any
    more: what is not in memory by then is an I/O error or a bus error, even at exit.
    """
    code = (
        "import os, signal, time; signal.signal(signal.SIGUSR1, lambda *_: None); "
        'print("ready", flush=True); signal.pause(); time.sleep(1); os.listdir("/usr/lib")'
    )
    body = f"srun -n1 apptainer --silent exec {cluster.image} python -c '{code}'\n"
    job = cluster.sbatch("--output=image.out", stdin=GUIDE_HEADER + body)
    log = f"{cluster.work}/image.out"
    # srun's own warning comes before.
    cluster.wait(lambda: "yes" * ("ready" in cluster.read(log)), 600, "the task")
    cluster.run("login", "scancel", "--signal=USR1", str(job))
    assert cluster.wait_end(job, timeout=600) == "FAILED"
    assert re.search("Transport endpoint is not connected|Bus error", cluster.read(log))


def test_requeue(cluster: Cluster) -> None:
    """`scontrol requeue` starts the job again, with SLURM_RESTART_COUNT."""
    body = 'echo "restart ${SLURM_RESTART_COUNT:-0}"; [[ -v SLURM_RESTART_COUNT ]] || sleep 600\n'
    options = ("--output=requeue.out", "--open-mode=append")
    job = cluster.sbatch(*options, stdin=f"{GUIDE_HEADER}{body}")
    log = f"{cluster.work}/requeue.out"
    cluster.wait(lambda: cluster.read(log), 600, "the first start")
    cluster.run("login", "scontrol", "requeue", str(job))
    assert cluster.wait_state(job, {"COMPLETED"}, timeout=600)
    assert cluster.read(log).splitlines()[0] == "restart 0"
    assert cluster.read(log).splitlines()[-1] == "restart 1"


def test_a_dead_node(cluster: Cluster) -> None:
    """A node dies in mid-job: the job starts again on living nodes; the dead one comes back."""
    body = "scontrol show hostnames; [[ -v SLURM_RESTART_COUNT ]] || srun sleep 600\n"
    options = ("--output=dead.out", "--open-mode=append")
    job = cluster.sbatch(*options, stdin=f"{GUIDE_HEADER}{body}")
    log = f"{cluster.work}/dead.out"
    cluster.wait(lambda: cluster.read(log), 600, "the first start")
    dead = cluster.read(log).split()[1]
    cluster.script("crash", dead)
    assert "not running" in cluster.run(dead, "true", check=False).stderr
    assert cluster.wait_state(job, {"COMPLETED"}, timeout=600)
    assert dead not in cluster.read(log).split()[-2:]
    cluster.script("restart", dead)
    assert cluster.run(dead, "hostname").stdout == f"{dead}\n"
    sinfo = ("sinfo", "--noheader", "--format=%T", "--partition=small", f"--nodes={dead}")
    assert cluster.run("login", *sinfo).stdout == "idle\n"


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ("-p shared -N 1 -n 1 --gres=gpu:1 --cpus-per-task=40 --mem=64G", "40 processors"),
        ("-p shared -N 2 --gres=gpu:1", "not available|limit"),
        ("-p small -N 6 --ntasks-per-node=2 --gres=gpu:2 --gpus-per-task=1", "480 processors"),
        ("-p small -N 7 --gres=gpu:2", "not available|limit"),
        ("-p big -N 13 --gres=gpu:2 --time=2:00:00", "1040 processors"),
        ("-p full -N 14 --gres=gpu:2", "1120 processors"),
        ("-p 3g.40gb -N 1 -n 1 --gres=gpu:3g.40gb", "nodes m1"),
        ("-p 2g.20gb -N 1 -n 1 --gres=gpu:2g.20gb", "nodes m1"),
    ],
)
def test_partitions_and_their_limits(cluster: Cluster, options: str, answer: str) -> None:
    """`sbatch --test-only` answers as Turpan's partitions would."""
    command = ["sbatch", "--test-only", *options.split(), "--wrap=hostname"]
    done = cluster.run("login", *command, check=False)
    assert re.search(answer, done.stderr), done.stderr


@pytest.mark.parametrize("after", [0.3, 0.6, 0.9, 1.2])
def test_up_that_was_killed(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    """`up` works after one that was killed half way, and `down` ends what both have started."""
    monkeypatch.setenv("CLUSTER_STATE", str(tmp_path / "state"))
    killed = subprocess.Popen(
        ["bash", HERE / "cluster.sh", "up"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    time.sleep(after)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    try:
        cluster.script("up")
        assert cluster.run("login", "hostname").stdout == "controller\n"
        pids = [path.read_text().split()[0] for path in tmp_path.glob("state/*/pid")]
        assert len(pids) == 9
    finally:
        cluster.script("down")
    # A process that has ended may be waiting for the machine's init, but runs no command any more.
    commands = [Path("/proc", pid, "cmdline") for pid in pids]
    assert not any(path.exists() and path.read_text() for path in commands)
    assert not (tmp_path / "state").exists()
