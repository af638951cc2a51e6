"""Three numbers for the batch script: trials that are finished, and left; and reported epochs.

python -m hpo.job.count              212 288 1690
"""

from __future__ import annotations

from hpo.settings import Settings, run_script
from hpo.study.opening import open_study
from hpo.study.trials import count


def main() -> int:
    """Print the numbers for the study of the environment; return the exit status."""
    settings = Settings.from_env()
    study = open_study(settings)
    counts = count(study, settings)
    reports = sum(len(trial.intermediate_values) for trial in study.get_trials(deepcopy=False))
    print(counts.finished, counts.left, reports)
    return 0


if __name__ == "__main__":
    run_script(main)
