"""What is tried next, and which trial is stopped.  Outside, all of its modules may be imported.

samplers, pruners   SAMPLER and PRUNER → Optuna's objects;  guard: their errors are the site's
tpe, gp             SAMPLER=tpe: which trials are good;  gp: what stopped ones are worth
space, remembered   what search_space suggests, and that a study remembers it
known, finals       what a study begins with, and that it ends with its best again
given               trials whose parameters are known
objectives          several objectives
"""
