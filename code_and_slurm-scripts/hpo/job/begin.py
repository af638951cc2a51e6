"""What the batch script asks first: is the tested Optuna there, and are the settings legal?

python -m hpo.job.begin              export STUDY_DB=sqlite:////…  unset SEED  …, one a line

These lines give every task of the job the same settings (hpo/job/task.sh).  Exit status 3 where the
tested Optuna is missing, 2 for a wrong setting.  Whatever else it is, Python has not started.
"""

from __future__ import annotations

import os
import shlex
import sys

from hpo.packages import check_optuna
from hpo.settings import VARIABLES, Settings, UserError, run_script

NO_OPTUNA = 3


def main() -> int:
    """Print the settings; return the exit status."""
    try:
        check_optuna()
    except UserError as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return NO_OPTUNA
    Settings.from_env()
    for name in (variable.name for variable in VARIABLES):
        value = os.environ.get(name)
        print(f"unset {name}" if value is None else f"export {name}={shlex.quote(value)}")
    return 0


if __name__ == "__main__":
    run_script(main)
