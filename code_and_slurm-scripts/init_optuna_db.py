#!/usr/bin/env python3
"""Create or open the shared study, and prepare the data.  Run once before the workers start.

    python init_optuna_db.py [STUDY_DB] [STUDY_NAME]
    python init_optuna_db.py sqlite:///study.db mnist_hpo
    python init_optuna_db.py --retry-failed     once the bug is mended: failed trials run again
    python init_optuna_db.py --retry-stuck      where no lease says that their worker has died
    python init_optuna_db.py --copy-from URL    a study of that name, and its checkpoints, from
                                                another database; while nobody runs it

Both launch scripts call it.  What is not given comes from the environment (hpo/settings.py).
You should see:

    study mnist_hpo is ready in sqlite:////…/code_and_slurm-scripts/study.db (0 of 500 trials)

It may be run again and again, and by several processes at once: a study that exists is opened and
never changed.  A study with another objective or direction is refused (exit status 2).
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from hpo import packages, script
from hpo.search.known import KNOWN, begin_with, known_for, offered
from hpo.search.objectives import check_objectives
from hpo.search.pruners import check_search
from hpo.search.remembered import plan_of
from hpo.settings import DEFAULTS, Settings, UserError, run_script
from hpo.study.copying import copy_study
from hpo.study.opening import create_or_open_study, reach, stuck
from hpo.study.optuna_private import storage_of, study_id
from hpo.study.serving.served import forget_dead_server
from hpo.study.storage import StudyStorage
from hpo.study.trials import count
from hpo.study.upkeep import LONGEST_SLEEP, return_stuck
from hpo.values import misspelt, without_password

USED = ("prepare", KNOWN)  # of the script, which is imported only for them


def main() -> int:
    """Create the study of the command line or the environment; return the exit status."""
    options = arguments()
    given = {"STUDY_DB": options.study_db, "STUDY_NAME": options.study_name}
    settings = Settings.from_env(**{name: value for name, value in given.items() if value})
    for text in misspelt(os.environ, list(DEFAULTS)):
        print(text, file=sys.stderr)
    packages.check_optuna()
    if options.copy_from:
        print(copy_study(settings, options.copy_from))
        return 0
    script.check(settings.py_script)
    check_objectives(settings)
    script.check_needs(settings.py_script)
    check_search(settings)
    forget_dead_server(settings)
    reach(settings)
    found = prepare(settings)
    study = create_or_open_study(settings)
    begin_with(study, found)
    storage = storage_of(study)
    if isinstance(storage, StudyStorage):
        # Jobs that have left Slurm's queue hold nothing any more; other workers have a grace.
        for number in storage.return_stale_trials(study_id(study), alive_jobs=settings.alive_jobs):
            print(f"trial {number} of a job that has ended goes back to the queue")
        if options.retry_failed:
            numbers = storage.retry_failed(study_id(study))
            print(f"{len(numbers)} failed trials go back to the queue")
    if options.retry_stuck:
        seconds = max(settings.lease_grace, 3 * LONGEST_SLEEP)
        print(f"looking for a sign of life, {seconds:.0f} s …", flush=True)
        print(f"{len(return_stuck(study, seconds))} stuck trials go back to the queue")
    counts = count(study, settings)
    print(
        f"study {study.study_name} is ready in {settings.shown_db} "
        f"({counts.total - counts.left + counts.running + counts.waiting} of {counts.total} trials)"
    )
    if text := stuck(study, counts):
        print(text)
    return 0


def prepare(settings: Settings) -> list[dict[str, Any]]:
    """Let the script prepare its data; return what its study begins with (hpo/search/known.py)."""
    known = settings.known_good or settings.from_study
    if not known and not any(script.defines(settings.py_script, name) for name in USED):
        return []
    loaded = script.load(settings.py_script)
    script.prepare(loaded)
    if not offered(settings, loaded):
        return []
    with script.as_if_launched(settings.py_script):
        return known_for(settings, loaded, plan_of(settings, loaded))


def arguments() -> argparse.Namespace:
    """Return the command line's options; argparse exits with status 2 where one is wrong."""
    parser = argparse.ArgumentParser(
        description="Create or open the shared study, and prepare the data.",
        epilog="What is not given comes from the environment: python -m hpo.settings lists it.",
    )
    parser.add_argument("study_db", nargs="?", metavar="STUDY_DB", help="sqlite:///study.db")
    parser.add_argument("study_name", nargs="?", metavar="STUDY_NAME", help="mnist_hpo")
    parser.add_argument(
        "--retry-failed", action="store_true", help="put the failed trials back into the queue"
    )
    parser.add_argument(
        "--retry-stuck",
        action="store_true",
        help="put the running trials back that show no sign of life for a while",
    )
    parser.add_argument("--copy-from", metavar="URL", help="copy the study from that database")
    options = parser.parse_args()
    for url in filter(None, (options.study_db, options.copy_from)):
        if without_password(url) != url:
            raise UserError(
                "everybody sees the password in the list of processes: set it in the environment, "
                "STUDY_DB=… (of PostgreSQL also in ~/.pgpass), in place of an argument"
            )
    return options


if __name__ == "__main__":
    run_script(main)
