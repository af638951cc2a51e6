"""Several objectives: OBJECTIVES=loss,parameters, of those that a script declares.

    OBJECTIVES = ("loss", "parameters")                        in the script: what it can measure
    return chosen({"loss": loss, "parameters": parameters})    in its objective(trial)

Without OBJECTIVES in the environment a study has one objective: the first.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import optuna

from hpo.settings import SCRIPTS, Settings, UserError


def declared_objectives(py_script: str) -> tuple[str, ...]:
    """Return the names in a script's line OBJECTIVES = (…); none without it.

    The script is read, not run: init_optuna_db.py must not wait for torch.
    """
    path = SCRIPTS / py_script
    if not path.exists():
        return ()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OBJECTIVES":
            return tuple(str(name) for name in ast.literal_eval(node.value))
    return ()


def check_objectives(settings: Settings) -> None:
    """Raise UserError for an objective that the script does not declare."""
    known = declared_objectives(settings.py_script)
    for name in settings.objectives:
        if name not in known:
            offer = f"offers {', '.join(known)}" if known else "declares none (OBJECTIVES = (…))"
            raise UserError(f"OBJECTIVES: {name!r} is unknown; {settings.py_script} {offer}")


def chosen(values: Mapping[str, float]) -> float | tuple[float, ...]:
    """Return those of `values` that OBJECTIVES names, in its order; by default the first."""
    names = Settings.from_env().objectives or tuple(values)[:1]
    picked = tuple(values[name] for name in names)
    return picked if len(picked) > 1 else picked[0]


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
