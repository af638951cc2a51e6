#!/usr/bin/env python3
"""How far the study is, its best parameters, and the test score of its best weights.

    python check_best_model.py                at any time, from any folder, also while workers run
    python check_best_model.py --watch        follow it until all trials are done
    python check_best_model.py --report       pictures: report-STUDY_NAME/report.html and PNGs
    python check_best_model.py --export DIR   the best model: weights, configuration, code
    python check_best_model.py --retrain 5    the best configuration on all images, five seeds

You should see:

    study mnist_hpo in sqlite:////…/code_and_slurm-scripts/study.db
    500 of 500 trials: 212 complete, 285 pruned, 3 failed, 0 running, 0 waiting
      3 × out of memory (…)
    top five
      trial 341   0.0251   lr=0.00094 batch_size=32 …
      …
    best_value  0.0251 (trial 341)
    best_params
      lr              0.00094
      …
    test accuracy   0.9938

Without torch (a login node, a laptop) everything is shown but the test score.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from hpo import packages
from hpo.checkpoint import folder_path, weights_path
from hpo.settings import Settings, UserError, run_script
from hpo.show.export import (
    chosen_trial,
    configuration,
    export,
    load_script,
    load_weights,
    mean_and_deviation,
    retrain,
    scores,
)
from hpo.show.progress import follow
from hpo.show.report import objective_names, write_report
from hpo.study.opening import open_study
from hpo.study.trials import best_trials, count, fail_reasons, without_best
from hpo.words import parameters, shown

TOP = 5


def main() -> int:
    """Print the state of the study of the environment; return the exit status."""
    options = arguments()
    settings = Settings.from_env()
    study = open_study(settings)
    if options.watch:
        try:
            follow(study, settings)
        except KeyboardInterrupt:  # ends the view, not the study
            print()
    elif options.report is not None:
        folder = Path(options.report).absolute() if options.report else None
        print(f"report          {write_report(study, settings, folder)}")
    elif options.export:
        trial = chosen_trial(study, options.trial)
        export(study, settings, trial, Path(options.export))
        print(f"trial {trial.number} is in {options.export}: python {options.export}/load_model.py")
    elif options.retrain:
        trial = chosen_trial(study, options.trial)
        for name, scores in retrain(study, settings, trial, options.retrain).items():
            print(f"{name:15} {mean_and_deviation(scores)}   ({options.retrain} seeds)")
    else:
        print_state(study, settings)
    return 0


def arguments() -> argparse.Namespace:
    """Return the command line's options; argparse exits with status 2 where one is wrong."""
    parser = argparse.ArgumentParser(
        description="The study's progress, its best parameters and the score of its best weights.",
        epilog="STUDY_DB, STUDY_NAME and TOTAL_TRIALS come from the environment, as for a job.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="follow the study until it is done")
    what.add_argument("--report", nargs="?", const="", metavar="DIR", help="write the pictures")
    what.add_argument("--export", metavar="DIR", help="write the best model into a new folder")
    what.add_argument("--retrain", type=seeds, metavar="K", help="train it anew with K seeds")
    parser.add_argument("--trial", type=int, metavar="N", help="take trial N, not the best one")
    return parser.parse_args()


def seeds(text: str) -> int:
    """Return K of --retrain K; raises argparse's error for what is no number of seeds."""
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seeds from 1 to 1000")
    return int(text)


def print_state(study: optuna.Study, settings: Settings) -> None:
    """Print how far the study is, what failed, the best trials, and their score."""
    print(f"study {study.study_name} in {settings.study_db}")
    print(count(study, settings))
    for reason, number in fail_reasons(study.get_trials(deepcopy=False)):
        print(f"  {number} × {reason}")
    best = best_trials(study)
    if not best:
        print(without_best(study))
    elif len(study.directions) > 1:
        print_front(study, best)
    else:
        print("top five")
        for trial in best[:TOP]:
            print(
                f"  trial {trial.number:<5} {shown(trial.values[0])}   {parameters(trial.params)}"
            )
        print(f"best_value  {shown(best[0].values[0])} (trial {best[0].number})")
        print("best_params")
        for name, value in best[0].params.items():
            print(f"  {name:15} {shown(value)}")
        print_test_scores(study, settings, best[0])


def print_front(study: optuna.Study, front: list[FrozenTrial]) -> None:
    """Print the trials that no other trial beats in all objectives, best of the first on top."""
    names = objective_names(study)
    print(f"Pareto front of {', '.join(names)}: {len(front)} trials")
    for trial in front:
        numbers = "  ".join(f"{shown(value):<10}" for value in trial.values)
        print(f"  trial {trial.number:<5} {numbers}  {parameters(trial.params)}")
    print("one of them: --export DIR --trial N, --retrain K --trial N")


def print_test_scores(study: optuna.Study, settings: Settings, trial: FrozenTrial) -> None:
    """Score the best weights with the `test_model` function of the study's own script."""
    path, folder = weights_path(settings, trial.number), folder_path(settings, trial.number)
    if folder.is_dir():
        print(f"folder          {folder}")
        if not path.exists():  # a program, or a framework, that saves by itself
            return
    try:
        if not path.exists():
            raise UserError(f"the weights of the best trial are not here ({path})")
        packages.need("it", "torch")
        script = load_script(study, settings)
        script.need("test_model", "it")
        weights = load_weights(settings, trial.number)
        found = scores(script, configuration(script, trial), weights)
    except UserError as error:  # everything else has been shown
        print(f"test score: {error}")
        return
    for name, score in found.items():
        print(f"{name:15} {shown(score)}")
    print(f"weights         {path}")


if __name__ == "__main__":
    run_script(main)
