"""Two numbers for the batch script: how many trials are finished, and how many are left.

python -m hpo.job.count              212 288
"""

from __future__ import annotations

from hpo.settings import Settings, run_script
from hpo.study.opening import open_study
from hpo.study.trials import count


def main() -> int:
    """Print the numbers for the study of the environment; return the exit status."""
    settings = Settings.from_env()
    counts = count(open_study(settings), settings)
    print(counts.finished, counts.left)
    return 0


if __name__ == "__main__":
    run_script(main)
