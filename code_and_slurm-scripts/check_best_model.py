#!/usr/bin/env python3
"""How far the study is, its best parameters, and the test score of its best weights.

    python check_best_model.py             at any time, from any folder, also while workers run
    python check_best_model.py --watch     one line whenever something changes, until all is done

You should see:

    study mnist_hpo in sqlite:////…/code_and_slurm-scripts/study.db
    500 of 500 trials: 212 complete, 285 pruned, 3 failed, 0 running, 0 waiting
    best_value  0.0251 (trial 341)
    best_params
      lr              0.00094
      …
    test accuracy   0.9938

Without torch (a login node, a laptop) everything is shown but the test score.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from hpo.checkpoint import weights_path
from hpo.settings import SCRIPTS, Settings, run_script
from hpo.storage import open_study

POLL_SECONDS = 2.0


def main() -> int:
    """Print the state of the study of the environment; return the exit status."""
    parser = argparse.ArgumentParser(
        description="The study's progress, its best parameters and the score of its best weights.",
        epilog="STUDY_DB, STUDY_NAME and TOTAL_TRIALS come from the environment, as for a job.",
    )
    parser.add_argument("--watch", action="store_true", help="follow the study until it is done")
    watch = parser.parse_args().watch
    settings = Settings.from_env()
    study = open_study(settings)
    if watch:
        follow(study, settings.total_trials)
        return 0
    print(f"study {study.study_name} in {settings.study_db}")
    trials = study.get_trials(deepcopy=False)
    print(counts(trials, settings.total_trials))
    for reason, number in fail_reasons(trials):
        print(f"  {number} × {reason}")
    if not any(trial.state == TrialState.COMPLETE for trial in trials):
        print("no trial has finished yet")
        return 0
    print_best(study)
    print_test_scores(study, settings)
    return 0


def counts(trials: list[FrozenTrial], total: int) -> str:
    """Return one line: how many trials are in which state."""
    number = Counter(trial.state for trial in trials)
    done = sum(number[state] for state in TrialState if state.is_finished())
    return (
        f"{done} of {max(total, len(trials))} trials: {number[TrialState.COMPLETE]} complete, "
        f"{number[TrialState.PRUNED]} pruned, {number[TrialState.FAIL]} failed, "
        f"{number[TrialState.RUNNING]} running, {number[TrialState.WAITING]} waiting"
    )


def fail_reasons(trials: list[FrozenTrial]) -> list[tuple[str, int]]:
    """Return why trials failed, the most frequent reason first."""
    failed = [trial for trial in trials if trial.state == TrialState.FAIL]
    return Counter(t.user_attrs.get("fail_reason", "unknown") for t in failed).most_common()


def print_best(study: optuna.Study) -> None:
    """Print the guide's `best_value` and `best_params`."""
    print(f"best_value  {study.best_value:.4f} (trial {study.best_trial.number})")
    print("best_params")
    for name, value in study.best_params.items():
        print(f"  {name:15} {value:.4g}" if isinstance(value, float) else f"  {name:15} {value}")


def print_test_scores(study: optuna.Study, settings: Settings) -> None:
    """Score the best weights with the `test_model` function of the study's own script."""
    path = weights_path(settings, study.best_trial.number)
    script = Path(study.user_attrs.get("py_script", settings.py_script)).stem
    if not path.exists():
        print(f"test score: the weights of the best trial are not here ({path})")
    elif not importlib.util.find_spec("torch"):
        print(f"test score: needs torch, which this Python has not; weights: {path}")
    elif not (SCRIPTS / f"{script}.py").exists():
        print(f"test score: {script}.py is not in {SCRIPTS}; weights: {path}")
    else:
        import torch

        objective = importlib.import_module(script)
        weights = torch.load(path, map_location="cpu", weights_only=True)
        config = objective.search_space(study.best_trial)
        for name, score in objective.test_model(config, weights).items():
            print(f"{name:15} {score:.4f}")
        print(f"weights         {path}")


def follow(study: optuna.Study, total: int) -> None:
    """Print a line whenever a trial starts or ends, until `total` trials are finished."""
    begin, first, last = time.monotonic(), -1, ""
    while True:
        trials = study.get_trials(deepcopy=False)
        done = sum(trial.state.is_finished() for trial in trials)
        first = done if first < 0 else first
        line = counts(trials, total)
        if line != last:
            rate = (done - first) / max(time.monotonic() - begin, 1e-9)
            print(f"{time.strftime('%H:%M:%S')} {line}; {outlook(study, total - done, rate)}")
            sys.stdout.flush()
            last = line
        if done >= total:
            return
        time.sleep(POLL_SECONDS)


def outlook(study: optuna.Study, left: int, rate: float) -> str:
    """Return the best value so far and the time left at `rate` trials per second."""
    try:
        best = f"best {study.best_value:.4f} (trial {study.best_trial.number})"
    except ValueError:  # Optuna's word for: no trial is complete
        best = "no trial has finished yet"
    return f"{best}, about {left / rate / 60:.0f} min left" if rate and left else best


if __name__ == "__main__":
    run_script(main)
