#!/usr/bin/env bash
# One Slurm task (bash hpo/job/task.sh COMMAND…), with the settings of the batch script: whatever
# `sbatch --export` or a TaskProlog of the site have made of its environment.  Without them it would
# work on another study.
set -uo pipefail

if [[ -z ${JOB_SETTINGS:-} ]]; then
    echo "error: task ${SLURM_PROCID:-} on $(hostname) has not got the settings of its job, and" \
        "runs nothing: does a TaskProlog of this machine unset JOB_SETTINGS?" >&2
    exit 2
fi
eval "$JOB_SETTINGS"
unset JOB_SETTINGS
# Where scancel ends the container's mount first, Python dies of a bus error.  No core then, as large
# as its memory, in the scripts' folder; and no node that waits for it.
ulimit -S -c 0
exec "$@"
