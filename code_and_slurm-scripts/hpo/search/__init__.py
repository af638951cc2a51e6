"""What is tried next, and which trial is stopped.  Outside, all of its modules may be imported.

samplers, pruners   SAMPLER and PRUNER → Optuna's objects;  guard: their errors are the site's
options             SAMPLER=tpe:n_startup_trials=20;  stopped: what tpe and gp learn from whom
space, remembered   what search_space suggests, and that a study remembers it
known, finals       what a study begins with, and that it ends with its best again
given               trials whose parameters are known
objectives          several objectives
"""
