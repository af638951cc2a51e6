#!/usr/bin/env bash
# One worker of a job, started again if it dies (bash keep_running.sh SCRIPT PYTHON…, where PYTHON…
# is the command that runs a Python script).
#
# A worker that ends by itself (status 0, 1, 2) is not started again; one that was killed by a
# signal, or crashed in a library, is: at most three times in a row.  A worker that had lived for
# ten minutes starts a new row.  Slurm's signals reach the worker directly, and this script too.
set -uo pipefail

stopping=0
trap 'stopping=1' USR1 TERM INT

script=$1
shift
deaths=0
while true; do
    began=$SECONDS
    "$@" "$script" &
    worker=$!
    wait "$worker"
    status=$?
    while kill -0 "$worker" 2>/dev/null; do # a signal has interrupted the wait: it still runs
        wait "$worker"
        status=$?
    done
    if ((stopping && status != 0)); then
        "$@" -m hpo.return_trials # which it may not have come to
    fi
    if ((stopping || status <= 2)); then
        exit "$status"
    fi
    if ((SECONDS - began > 600)); then
        deaths=0
    fi
    deaths=$((deaths + 1))
    if ((deaths > 3)); then
        echo "the worker died $deaths times in a row (status $status): giving up" >&2
        exit "$status"
    fi
    echo "the worker died with status $status: starting it again ($deaths of 3)" >&2
    sleep 1
done
