"""Give back the trials of a worker process that has ended without doing so itself.

    python -m hpo.job.return_trials TOKEN [ended]    hpo/job/keep_running.sh, after each worker

TOKEN is the WORKER_TOKEN that the process had.  It may have crashed: been killed, or left by a
library's os._exit, whatever its status.  Or it was being `ended`: scancel signals every process of
a job, also the one that mounts the container's image, and a worker that touches a part of the image
which is not in memory after that dies of a bus error.  That is no crash of the trial.

Exit status 0 if there was nothing to return, RETURNED if there was.
"""

from __future__ import annotations

import sys

from hpo.settings import Settings, UserError, run_script
from hpo.study.opening import open_study
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.storage import SQLiteStorage

RETURNED = 10


def main() -> int:
    """Return the trials, and print a line for each; return the exit status."""
    if len(sys.argv) not in (2, 3):
        raise UserError("usage: python -m hpo.job.return_trials TOKEN [ended]")
    token, crashed = sys.argv[1], sys.argv[2:] != ["ended"]
    study = open_study(Settings.from_env())
    storage = storage_of(study)
    if not isinstance(storage, SQLiteStorage):  # only here a trial has a holder
        return 0
    numbers = storage.return_trials_of(study_id(study), token, crashed=crashed)
    for number in numbers:
        print(f"trial {number} back to the queue", flush=True)
    return RETURNED if numbers else 0


if __name__ == "__main__":
    run_script(main)
