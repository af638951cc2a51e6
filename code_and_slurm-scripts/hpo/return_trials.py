"""Give back the trial of a worker that died while its job was being ended.

    python -m hpo.return_trials    hpo/keep_running.sh, with the environment of that worker

scancel signals every process of a job, also the one that mounts the container's image.  A worker
that touches a part of the image which is not in memory after that dies of a bus error, perhaps
before it has given its trial back.  This does so from a fresh mount.  Without it the trial would
wait for the next job, and count as crashed.
"""

from __future__ import annotations

from hpo.settings import Settings, run_script
from hpo.sqlite_storage import SQLiteStorage
from hpo.storage import open_study


def main() -> int:
    """Return the trials, and print a line for each; return the exit status."""
    study = open_study(Settings.from_env())
    if isinstance(study._storage, SQLiteStorage):  # only here a trial has a holder
        for number in study._storage.return_predecessors_trials(study._study_id):
            print(f"trial {number} back to the queue", flush=True)
    return 0


if __name__ == "__main__":
    run_script(main)
