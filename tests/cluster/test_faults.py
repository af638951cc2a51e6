"""A file server that stops, and a disk that is full, in the middle of a job: on GlusterFS alone.

FILE_SYSTEM=gluster bash tests/run.sh cluster -k faults      3 minutes; not in CI
"""

from __future__ import annotations

import time

import pytest

from cluster.test_bundle import Bundle, bundle, with_optuna

__all__ = ["bundle", "with_optuna"]  # its fixtures

AWAY_SECONDS = 45.0


@pytest.mark.parametrize(
    ("fault", "begin", "end"), [("server", "stop", "start"), ("disk", "full", "free")]
)
def test_job_outlives(fault: str, begin: str, end: str, bundle: Bundle) -> None:
    """No trial is lost or run twice, and the job needs nobody.

    What the workers said meanwhile is lost: their logs are on the same disk.
    """
    start = time.monotonic()
    bundle.insert("import time; time.sleep(2)", before="loss, _ = evaluate(")  # it lasts
    job = bundle.submit()
    bundle.wait_finished(2)
    bundle.cluster.script(fault, begin)
    try:
        time.sleep(AWAY_SECONDS)  # that is how long the fault is
    finally:
        bundle.cluster.script(fault, end)
    bundle.finish(job, timeout=600)
    bundle.done(f"{fault} {begin} for {AWAY_SECONDS:.0f} s", [job], start)
    assert "The study is complete." in bundle.log(job)
    assert list(bundle.workers(job)) == [0, 1, 2, 3]
