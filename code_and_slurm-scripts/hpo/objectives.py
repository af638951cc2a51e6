"""Several objectives: OBJECTIVES=loss,parameters, of those that a script declares.

    OBJECTIVES = ("loss", "parameters")                        in the script: what it can measure
    return chosen({"loss": loss, "parameters": parameters})    in its objective(trial)
    NEEDS = ("transformers==4.57.6", "num2words")              packages beside torch and Optuna

Without OBJECTIVES in the environment a study has one objective: the first.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from importlib.util import find_spec

import optuna

from hpo.settings import SCRIPTS, Settings, UserError, pip_command


def declared_objectives(py_script: str) -> tuple[str, ...]:
    """Return the names in a script's line OBJECTIVES = (…); none without it."""
    return declared(py_script, "OBJECTIVES")


def declared(py_script: str, name: str) -> tuple[str, ...]:
    """Return the words in a script's line `name` = (…); none without it.

    The script is read, not run: init_optuna_db.py must not wait for torch.
    """
    path = SCRIPTS / py_script
    if not path.exists():
        return ()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return tuple(str(word) for word in ast.literal_eval(node.value))
    return ()


def check_objectives(settings: Settings) -> None:
    """Raise UserError for an objective, or several GPUs per trial, that the script has not."""
    known = declared_objectives(settings.py_script)
    for name in settings.objectives:
        if name not in known:
            offer = f"offers {', '.join(known)}" if known else "declares none (OBJECTIVES = (…))"
            raise UserError(f"OBJECTIVES: {name!r} is unknown; {settings.py_script} {offer}")
    script = SCRIPTS / settings.py_script
    if settings.gpus_per_trial > 1 and script.exists() and "ddp.together" not in script.read_text():
        raise UserError(f"GPUS_PER_TRIAL: {settings.py_script} trains on one GPU (no ddp.together)")


def chosen(values: Mapping[str, float]) -> float | tuple[float, ...]:
    """Return those of `values` that OBJECTIVES names, in its order; by default the first."""
    names = Settings.from_env().objectives or tuple(values)[:1]
    picked = tuple(values[name] for name in names)
    return picked if len(picked) > 1 else picked[0]


def check_needs(py_script: str) -> None:
    """Raise UserError, with the command that installs them, if packages in NEEDS are missing."""
    needs = declared(py_script, "NEEDS")
    missing = [package for package in needs if not find_spec(package.split("==")[0])]
    if missing:
        raise UserError(
            f"{py_script} needs {' and '.join(missing)}, which this Python has not; once:\n"
            f"    {pip_command(*missing)}"
        )


class SeveralObjectivesTrial(optuna.Trial):
    """A trial whose reports are stored, though nothing can be pruned by them.

    With several objectives Optuna refuses report() and should_prune().  The same training loop
    shall run all the same: curves are kept, the lease is renewed, and the worker can drain.
    """

    def report(self, value: float, step: int) -> None:
        """Store the value."""
        self.storage.set_trial_intermediate_value(self._trial_id, step, float(value))

    def should_prune(self) -> bool:
        """Ask the study's pruner, which does no more than to drain the worker."""
        return self.study.pruner.prune(self.study, self.storage.get_trial(self._trial_id))


def as_claimed(trial: optuna.Trial) -> optuna.Trial:
    """Return the trial, fit for the number of the study's objectives."""
    if len(trial.study.directions) > 1:
        # Not a second Trial: making one draws its parameters again.
        trial.__class__ = SeveralObjectivesTrial
    return trial
