"""The contract between a user's script and the plumbing; nobody needs to edit anything in here.

A script imports what it needs in one line, and runs a worker:

    from hpo import Settings, checkpoint, run_script, run_worker
    …
    if __name__ == "__main__":
        run_script(lambda: run_worker(objective))

There are: Settings, UserError, checkpoint (what an interrupted trial goes on from), chosen (of
several objectives), ddp (several GPUs per trial), run_script, run_worker, space_form (which form of
the search space SAMPLER needs).

What a script may offer.  Only `objective` must be there, and it may be any callable:

    name           who calls it                          without it
    objective      a worker, for each trial              (needed)
    search_space   a worker, to know the space; export   no grid, FIX or qmc; a change of the space
                                                         is not noticed; no test score, no export
    finite_space   search_space, for grid and bruteforce  these take search_space itself
    numeric_space  search_space, for cmaes and gp        these take search_space itself
    known_good     the first trials of a study: a list   the study begins without any
                   of dicts of parameters, or parts
    prepare        init_optuna_db.py, the preflight, a   the data is not checked before the first
                   worker before its first trial         trial
    build_model    an exported load_model.py             no export but of a framework's own file
    export_model   --export: one more form of it   weights.pt and load_model.py are all
    train_model    the objective; --check watches it     --check proves less
    test_model     check_best_model.py, --retrain        no test score
    train_final    check_best_model.py --retrain         no final training on all data
    OBJECTIVES     words: OBJECTIVES=… may name them     one objective
    NEEDS          words: what pip must have installed   a missing package ends in a traceback
    NO_EPOCHS      --check: True, if it never reports    --check wants a report after each epoch

hpo/script.py finds out what a script offers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo import checkpoint as checkpoint
    from hpo.search.objectives import chosen as chosen
    from hpo.search.samplers import space_form as space_form
    from hpo.settings import Settings as Settings
    from hpo.settings import UserError as UserError
    from hpo.settings import run_script as run_script
    from hpo.train import ddp as ddp
    from hpo.worker import run_worker as run_worker

# Where each name is: a script loads what it uses and no more, since torch takes seconds.
_PLACES = {
    "Settings": "hpo.settings",
    "UserError": "hpo.settings",
    "chosen": "hpo.search.objectives",
    "run_script": "hpo.settings",
    "run_worker": "hpo.worker",
    "space_form": "hpo.search.samplers",
}
__all__ = [
    "Settings",
    "UserError",
    "checkpoint",
    "chosen",
    "ddp",
    "run_script",
    "run_worker",
    "space_form",
]


def __getattr__(name: str) -> Any:
    if name in ("checkpoint", "ddp"):
        return import_module("hpo.checkpoint" if name == "checkpoint" else "hpo.train.ddp")
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"hpo offers no {name!r}; it offers {', '.join(__all__)}")
