"""Two numbers for the batch script: how many trials are finished, and how many are left.

python -m hpo.count              212 288
"""

from __future__ import annotations

from hpo.progress import total_of
from hpo.settings import Settings, run_script
from hpo.storage import open_study


def main() -> int:
    """Print the numbers for the study of the environment; return the exit status."""
    settings = Settings.from_env()
    study = open_study(settings)
    trials = study.get_trials(deepcopy=False)
    finished = sum(trial.state.is_finished() for trial in trials)
    print(finished, max(total_of(study, settings), len(trials)) - finished)
    return 0


if __name__ == "__main__":
    run_script(main)
