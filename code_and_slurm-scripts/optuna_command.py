#!/usr/bin/env python3
"""Hyperparameter optimisation of any program: one worker.  COPY AND EDIT THIS FILE.

    python optuna_command.py                       one worker, until the study is complete
    PY_SCRIPT=optuna_command.py STUDY_NAME=my_program bash run-optuna-local.sh
    PY_SCRIPT=optuna_command.py STUDY_NAME=my_program sbatch run-optuna-multinode_Turpan.sh

The program may be written in any language, and is not changed: it takes its parameters from its
command line, and says in its output, or in a file, how good they are.  Copy this file
(my_program.py) and edit the two parts below.  The output of trial 12 is
../logs/my_program.trial-00012.out.

As it stands, the program is example_program.py, which needs nothing but Python.
"""

from __future__ import annotations

from typing import Any

import optuna

from hpo import run_script, run_worker
from hpo.loops.command import Command

# ---------- 1. The search space: EDIT ----------


def search_space(trial: optuna.Trial | optuna.trial.FrozenTrial) -> dict[str, Any]:
    """Return one configuration: each name in it stands in the command below, as {name}."""
    return {
        "lr": trial.suggest_float("lr", 1e-3, 0.5, log=True),
        "degree": trial.suggest_int("degree", 1, 9),
        "epochs": trial.suggest_categorical("epochs", [5, 10, 20]),
    }


def known_good() -> list[dict[str, Any]]:
    """What is known to do well: the study's first trials.  Any part of a configuration will do."""
    return [{"lr": 0.01, "degree": 5, "epochs": 10}]


# ---------- 2. The program, and where its metric is: EDIT ----------

# {folder} is the trial's own: a program that finds its last state there goes on from it, also on
# another node.  Leave it out where the program cannot: an interrupted trial then begins anew.
# {seed}, {trial} and {gpu} are there, too; all about it: hpo/loops/command.py.
COMMAND = (
    "python example_program.py --lr {lr} --degree {degree} --epochs {epochs}"
    " --seed {seed} --folder {folder}"
)
# The group `value` of each match is reported to Optuna, and the last one is the trial's value.
PATTERN = r"epoch (?P<step>\d+): validation loss (?P<value>\S+)"

program = Command(COMMAND, pattern=PATTERN)
# Or from a file with {"step": 1, "loss": 0.5, "size": 10} on each line, for one or more objectives:
# OBJECTIVES = ("loss", "size")
# program = Command(COMMAND, results="{folder}/results.jsonl", objectives=OBJECTIVES)

# ---------- Plumbing ----------


def prepare() -> None:
    """Check the command and the program, before the first trial."""
    program.check(search_space)


def objective(trial: optuna.Trial) -> float | tuple[float, ...]:
    """Return what the program says of one configuration."""
    return program.run(trial, search_space(trial))


if __name__ == "__main__":
    run_script(lambda: run_worker(objective))
