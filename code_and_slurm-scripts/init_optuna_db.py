#!/usr/bin/env python3
"""Create or open the shared study, and prepare the data.  Run once before the workers start.

    python init_optuna_db.py [STUDY_DB] [STUDY_NAME]
    python init_optuna_db.py sqlite:///study.db mnist_hpo

Both launch scripts call it.  What is not given comes from the environment (hpo/settings.py).
You should see:

    study mnist_hpo is ready in sqlite:////…/code_and_slurm-scripts/study.db (0 of 500 trials)

It may be run again and again, and by several processes at once: a study that exists is opened and
never changed.  A study with another objective or direction is refused (exit status 2).
"""

from __future__ import annotations

import sys

from hpo import mnist, pairs
from hpo.objectives import check_needs, check_objectives
from hpo.progress import total_of
from hpo.samplers import check_packages
from hpo.served_storage import forget_dead_server
from hpo.settings import Settings, UserError, run_script
from hpo.sqlite_storage import SQLiteStorage
from hpo.storage import create_or_open_study


def main() -> int:
    """Create the study of the command line or the environment; return the exit status."""
    arguments = sys.argv[1:]
    if len(arguments) > 2:
        raise UserError("too many arguments; usage: init_optuna_db.py [STUDY_DB] [STUDY_NAME]")
    settings = Settings.from_env(**dict(zip(("STUDY_DB", "STUDY_NAME"), arguments, strict=False)))
    check_objectives(settings)
    check_needs(settings.py_script)
    check_packages(settings)
    if settings.py_script == "optuna_mnist.py":  # a script of your own prepares its own data
        mnist.prepare()
    if settings.py_script == "optuna_t5.py" or settings.data:
        pairs.prepare(settings)
    forget_dead_server(settings)
    study = create_or_open_study(settings)
    if isinstance(study._storage, SQLiteStorage):
        # Jobs that have left Slurm's queue hold nothing any more; other workers have a grace.
        alive = settings.alive_jobs
        for number in study._storage.return_stale_trials(study._study_id, alive_jobs=alive):
            print(f"trial {number} of a job that has ended goes back to the queue")
    print(
        f"study {study.study_name} is ready in {settings.study_db} "
        f"({len(study.get_trials(deepcopy=False))} of {total_of(study, settings)} trials)"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
