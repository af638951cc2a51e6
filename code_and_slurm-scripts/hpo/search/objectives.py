"""Several objectives: OBJECTIVES=loss,parameters, of those that a script declares.

    OBJECTIVES = ("loss", "parameters")                        in the script: what it can measure
    return chosen({"loss": loss, "parameters": parameters})    in its objective(trial)

Without OBJECTIVES in the environment a study has one objective: the first.
"""

from __future__ import annotations

from collections.abc import Mapping

from hpo.script import declared, defines
from hpo.settings import Settings, UserError


def declared_objectives(py_script: str) -> tuple[str, ...]:
    """Return the names in a script's line OBJECTIVES = (…); none without it."""
    return declared(py_script, "OBJECTIVES")


def check_objectives(settings: Settings) -> None:
    """Raise UserError for an objective, or several GPUs per trial, that the script has not."""
    known = declared_objectives(settings.py_script)
    for name in settings.objectives:
        if name not in known:
            offer = f"offers {', '.join(known)}" if known else "declares none (OBJECTIVES = (…))"
            raise UserError(f"OBJECTIVES: {name!r} is unknown; {settings.py_script} {offer}")
    knows = ("ddp", "together", "Command")  # a program gets all GPUs of its worker
    together = any(defines(settings.py_script, name) for name in knows)
    if settings.gpus_per_trial > 1 and not together:
        raise UserError(
            f"GPUS_PER_TRIAL: {settings.py_script} trains on one GPU (it imports no ddp; see "
            "hpo/train/ddp.py)"
        )


def chosen(values: Mapping[str, float]) -> float | tuple[float, ...]:
    """Return those of `values` that OBJECTIVES names, in its order; by default the first."""
    names = Settings.from_env().objectives or tuple(values)[:1]
    picked = tuple(values[name] for name in names)
    return picked if len(picked) > 1 else picked[0]
