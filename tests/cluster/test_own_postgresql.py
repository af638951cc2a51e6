"""STUDY_DB=postgresql:job on the rehearsal cluster, by the sbatch script unmodified.

    FILE_SYSTEM=bind bash tests/run.sh cluster -k own_postgresql    about 4 minutes
    FILE_SYSTEM=gluster-stale … -k own_postgresql                   and where locks do not hold

Not in CI: without FILE_SYSTEM nothing of it is collected.  This machine needs Debian's package
postgresql.
"""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path

import pytest

from cluster.rehearsal import HERE, Cluster
from cluster.test_bundle import Bundle, bundle, typed, with_optuna

__all__ = ["bundle", "with_optuna"]  # its fixtures

COPY = "postgresql-job.mnist_hpo.backup"
SHARE = r"""
cd /
ldd /usr/lib/postgresql/*/bin/{postgres,initdb} | grep -o '/[^ ]*\.so[^ ]*' | sort -u >"$0"
ls -d /usr/lib/postgresql/*/{bin/postgres,bin/initdb,lib} /usr/share/postgresql/[0-9]* >>"$0"
tar --create --dereference --exclude=bitcode --exclude='*jit*' --files-from="$0"
"""


@pytest.fixture
def with_postgresql(cluster: Cluster, tmp_path: Path) -> None:
    """Give the first node this machine's PostgreSQL, with those libraries that the node lacks."""
    command = ["bash", "-ec", SHARE, str(tmp_path / "names")]
    tar = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    command = ["bash", str(HERE / "cluster.sh"), "exec", "n1", "--user", "root", "--cd", "/", "--"]
    subprocess.run([*command, "tar", "--extract", "--skip-old-files"], input=tar, check=True)


def wait_for_copy(bundle: Bundle, finished: int) -> None:
    """Wait until the copy shows so many finished trials; with stale caches it may take some looks.

    A file that has been replaced meanwhile is a disk I/O error there, or the old one.
    """
    ended = "SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')"

    def shown() -> str:
        try:
            return "yes" * (bundle.asked(ended, COPY) == [(finished,)])
        except AssertionError as error:
            stale = bundle.cluster.file_system == "gluster-stale"
            if not stale or "disk I/O error" not in str(error):
                raise
            return ""

    bundle.cluster.wait(shown, 600, f"a copy of {finished} finished trials")


def test_own_postgresql(with_postgresql: None, bundle: Bundle) -> None:
    """STUDY_DB=postgresql:job: the first node's PostgreSQL has the study, also after scancel.

    The next job begins with the copy, which is a minute old at most; so does who looks at it.
    """
    start = time.monotonic()
    bundle.hold(6)
    settings = {"STUDY_DB": "postgresql:job"}
    jobs = [bundle.submit(**settings)]
    wait_for_copy(bundle, 6)
    bundle.cluster.run("login", "scancel", str(jobs[0]))
    assert bundle.cluster.wait_end(jobs[0], 600) == "CANCELLED"
    bundle.go()
    jobs.append(bundle.submit(**settings))
    bundle.finish(jobs[1])
    wait_for_copy(bundle, 12)
    bundle.done("postgresql:job, scancel, and again", jobs, start, study=COPY)
    begun = [re.search(r"on n1 for this job; (\d+) trials", bundle.log(job)) for job in jobs]
    assert begun[0]
    assert begun[1]
    assert int(begun[0][1]) == 0
    assert int(begun[1][1]) >= 6
    best = typed("export STUDY_DB=postgresql:job; in_image python check_best_model.py")
    shown = bundle.cluster.run("login", *best, options=["--cd", bundle.scripts]).stdout
    assert "\n12 of 12 trials" in shown, shown
    files = bundle.cluster.run("n1", "ls", "/tmp").stdout
    assert "optuna-postgresql" not in files, files
