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
exec "$@"
