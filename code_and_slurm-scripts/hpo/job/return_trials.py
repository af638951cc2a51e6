"""Give back the trials of a worker process that has ended without doing so itself.

    python -m hpo.job.return_trials TOKEN crashed|ended SECONDS     hpo/job/keep_running.sh

TOKEN is the WORKER_TOKEN that the process had, SECONDS how long it has lived.  It may have crashed:
been killed, or left by a library's os._exit, whatever its status.  Or it was being `ended`: scancel
signals every process of a job, also the one that mounts the container's image, and a worker that
touches a part of the image which is not in memory after that dies of a bus error.  That is no crash
of the trial.

Exit status 0 if there was nothing to return, RETURNED if there was, RETURNED + 1 if the process had
finished other trials before: then it is this trial that has killed it.
"""

from __future__ import annotations

import sys
from datetime import datetime, timedelta

from hpo.settings import Settings, UserError, run_script
from hpo.study.opening import open_study
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.serving.served import Leased

RETURNED = 10


def main() -> int:
    """Return the trials, and print a line for each; return the exit status."""
    if len(sys.argv) != 4 or sys.argv[2] not in ("crashed", "ended"):
        raise UserError("usage: python -m hpo.job.return_trials TOKEN crashed|ended SECONDS")
    token, crashed, age = sys.argv[1], sys.argv[2] == "crashed", float(sys.argv[3]) + 1
    settings = Settings.from_env()
    study = open_study(settings)
    storage = storage_of(study)
    if not isinstance(storage, Leased):  # only here a trial has a holder
        return 0
    numbers = storage.return_trials_of(study_id(study), token, crashed=crashed)
    for number in numbers:
        print(f"trial {number} back to the queue", flush=True)
    if not numbers:
        return 0
    since = datetime.now() - timedelta(seconds=age)
    return RETURNED + any(
        trial.datetime_complete is not None
        and trial.datetime_complete > since
        and trial.user_attrs.get("worker") == settings.signature
        for trial in study.get_trials(deepcopy=False)
    )


if __name__ == "__main__":
    run_script(main)
