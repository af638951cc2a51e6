#!/usr/bin/env python3
"""How far the study is, its best parameters, and the test score of its best weights.

    python check_best_model.py                at any time, from any folder, also while workers run
    python check_best_model.py --trial N      one trial: its parameters, its test score
    python check_best_model.py --watch        follow it until all trials are done
    python check_best_model.py --report       a page: report-STUDY_NAME/report.html, and pictures
    python check_best_model.py --csv FILE     all trials, and FILE-curves.csv: what they reported
    python check_best_model.py --compare A B  studies A and B of STUDY_DB side by side, on a page
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
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial

from hpo.settings import Settings, UserError, run_script
from hpo.show.compare import compare
from hpo.show.export import ExportFailed, export, mean_and_deviation, retrain
from hpo.show.facts import objective_names
from hpo.show.progress import follow
from hpo.show.report import write_report
from hpo.show.results import chosen_trial, shown_score, tested
from hpo.show.trial_table import write_csv
from hpo.study.opening import backup_in_use, open_study, stuck
from hpo.study.trials import (
    Finalist,
    attributes,
    best_searched,
    best_trials,
    count,
    fail_reasons,
    finalists,
    without_best,
)
from hpo.words import cut, one_line, parameters, shown, values

TOP = 5


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    options = arguments()
    settings = Settings.from_env()
    if options.compare:
        print(f"report          {compare(options.compare, settings)}")
        return 0
    study = open_study(settings)
    if note := backup_in_use(study):
        print(note)
    try:
        return show(study, settings, options)
    except KeyboardInterrupt:  # ends this program, not the study
        print()
        return 0 if options.watch else 130


def show(study: optuna.Study, settings: Settings, options: argparse.Namespace) -> int:
    """Print or write what was asked for; return the exit status."""
    if options.watch:
        follow(study, settings)
    elif options.report is not None:
        folder = Path(options.report).absolute() if options.report else None
        scored = print_state(study, settings)
        print(f"report          {write_report(study, settings, folder, scored)}")
    elif options.csv is not None:
        for path in write_csv(study, settings, objective_names(study), Path(options.csv)):
            print(f"written         {path}")
    elif options.export is not None:
        return export_model(study, settings, options)
    elif options.retrain:
        trial = chosen_trial(study, options.trial)
        found = retrain(study, settings, trial, options.retrain)
        for name, numbers in found.items():
            print(f"{name:15} {mean_and_deviation(numbers)}   ({options.retrain} seeds)")
        if not found:
            print("no mean: none of the test scores is a number")
    elif options.trial is not None:
        print_trial(study, settings, chosen_trial(study, options.trial))
    else:
        print_state(study, settings)
    return 0


def export_model(study: optuna.Study, settings: Settings, options: argparse.Namespace) -> int:
    """Write the folder of --export; return the exit status."""
    trial = chosen_trial(study, options.trial)
    try:
        said = export(study, settings, trial, Path(options.export))
    except ExportFailed as error:
        print(f"check_best_model.py: error: {error}", file=sys.stderr)
        return 1
    print(f"loaded once in another Python process, in another folder: {said}")
    print(f"trial {trial.number} is in {options.export}: python {options.export}/load_model.py")
    return 0


def arguments() -> argparse.Namespace:
    """Return the command line's options; argparse exits with status 2 where one is wrong.

    Raises:
        UserError: --trial does not go with another of them.
    """
    parser = argparse.ArgumentParser(
        description="The study's progress, its best parameters and the score of its best weights.",
        epilog="STUDY_DB, STUDY_NAME and TOTAL_TRIALS come from the environment, as for a job.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--watch", action="store_true", help="follow the study until it is done")
    what.add_argument("--report", nargs="?", const="", metavar="DIR", help="write a page of it")
    what.add_argument("--csv", metavar="FILE", help="write all trials, and FILE-curves.csv")
    what.add_argument("--compare", nargs="+", metavar="STUDY", help="a page on several studies")
    what.add_argument("--export", metavar="DIR", help="write the best model into a new folder")
    what.add_argument("--retrain", type=seeds, metavar="K", help="train it anew with K seeds")
    parser.add_argument("--trial", type=int, metavar="N", help="take trial N, not the best one")
    options = parser.parse_args()
    others = (options.watch, options.report is not None, options.csv, options.compare)
    if options.trial is not None and any(others):
        raise UserError("--trial goes alone, with --export or with --retrain: not with the others")
    return options


def seeds(text: str) -> int:
    """Return K of --retrain K; raises argparse's error for what is no number of seeds."""
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seeds from 1 to 1000")
    return int(text)


def print_state(study: optuna.Study, settings: Settings) -> dict[str, str]:
    """Print how far the study is, what failed, the best trials; return the best one's scores."""
    print(f"study {study.study_name} in {settings.shown_db}")
    counts = count(study, settings)
    print(counts)
    if text := stuck(study, counts):
        print(f"  {text}")
    for reason, number in fail_reasons(study.get_trials(deepcopy=False)):
        print(f"  {number} × {cut(reason)}")
    best = best_trials(study)
    if not best:
        print(without_best(study))
    elif len(study.directions) > 1:
        print_front(study, best)
    else:
        if ranked := finalists(study):
            print_finalists(ranked, best_searched(study, 1)[0])
        else:
            print("top five")
            for trial in best[:TOP]:
                print_row(trial, shown(trial.values[0]))
            print(f"best_value  {shown(best[0].values[0])} (trial {best[0].number})")
        print_params("best_params", best[0])
        return print_test_scores(study, settings, best[0])
    return {}


def print_trial(study: optuna.Study, settings: Settings, trial: FrozenTrial) -> None:
    """Print one trial, and the score of its weights."""
    print(f"study {study.study_name} in {settings.shown_db}")
    print(f"value       {values(trial.values)} (trial {trial.number})")
    print_params("params", trial)
    print_test_scores(study, settings, trial)


def print_row(trial: FrozenTrial, numbers: str) -> None:
    """Print a trial on one line."""
    more = parameters(attributes(trial))
    print(
        f"  trial {trial.number:<5} {numbers}   {parameters(trial.params)}"
        + (f"   ({cut(one_line(more), 60)})" if more else "")
    )


def print_finalists(ranked: Sequence[Finalist], single: FrozenTrial) -> None:
    """Print the means of those that ran with several seeds, and what one run would have said."""
    print("best mean of several seeds")
    for finalist in ranked[:TOP]:
        print_row(finalist.trial, str(finalist))
    best = ranked[0]
    numbers = ", ".join(str(run.number) for run in best.runs)
    print(f"best_value  {best} (mean of trials {numbers})")
    its = [str(f) for f in ranked if single.number in [run.number for run in f.runs]]
    mean = f"; its mean is {its[0]}" if its else ""
    print(f"single best {shown(single.values[0])} (trial {single.number}{mean})")
    if best.deviation == 0:
        print("  the runs are alike to the last digit: seed the training with trial.number")


def print_params(title: str, trial: FrozenTrial) -> None:
    """Print the parameters of a trial, and what its objective has noted besides."""
    print_block(title, [(name, shown(value)) for name, value in trial.params.items()])
    if noted := attributes(trial):
        print_block("attributes", [(name, shown_score(value)) for name, value in noted.items()])


def print_block(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a title and names with their values."""
    print(title)
    for name, value in rows:
        print(f"  {name:15} {value}")


def print_front(study: optuna.Study, front: list[FrozenTrial]) -> None:
    """Print the trials that no other trial beats in all objectives, best of the first on top."""
    names = objective_names(study)
    print(f"Pareto front of {', '.join(names)}: {len(front)} trials")
    for trial in front:
        print_row(trial, "  ".join(f"{shown(value):<10}" for value in trial.values))
    print("one of them: --trial N, --export DIR --trial N, --retrain K --trial N")


def print_test_scores(
    study: optuna.Study, settings: Settings, trial: FrozenTrial
) -> dict[str, str]:
    """Print, and return, what the study's script says of the weights of a trial."""
    rows = tested(study, settings, trial)
    for name, text in rows.items():
        print(f"{name:15} {text}")
    return rows


if __name__ == "__main__":
    run_script(main)
