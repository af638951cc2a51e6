#!/usr/bin/env bash
# One worker, started again if it dies (bash keep_running.sh SCRIPT PYTHON…, where PYTHON… is the
# command that runs a Python script).
#
# A worker that ends by itself (status 0, 1, 2, 75; 74 at the job's end) is not started again.  One
# that dies is, at most three times in a row: killed by a signal, crashed in a library, gone in the
# middle of a trial, whatever its status, or failed by its GPU or an import that an outage has cut
# off (70, hpo/gpu.py, hpo/site.py).  Its trial goes back to the queue at once.  A worker that had
# finished a trial, or lived for ten minutes, starts a new row.  Status 71 is no death: the next one
# shall record no CUDA graph; nor is the end of a worker whose script cannot be read any more: that
# is waited for.  A signal is passed on to the worker.
set -uo pipefail

NO_CAPTURE=71  # hpo/gpu.py
INTERRUPTED=74 # hpo/drain.py

SITE_SECONDS=300 # that a file server may be away

stopping=0
worker=
signal=
# shellcheck disable=SC2329 # the traps below call it
forward() { # forward SIGNAL: the worker takes no harm from a second one, which Slurm may send it
    stopping=1 signal=$1
    [[ -z $worker ]] || kill -"$1" "$worker" 2>/dev/null
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM INT

# Python acts on a signal in its main thread alone.  If the kernel has given it to another thread, or
# just before a long call begins, that call goes on as if nothing had been: it needs a second one.
send_again() {
    local tenth
    for ((tenth = 0; tenth < 30; tenth++)); do
        kill -0 "$worker" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -"$signal" "$worker" 2>/dev/null
}

# The file server may be away: a worker that has died of it could not help that, nor could the next.
# Returns 1 where nothing is wrong.
wait_for_site() {
    local since=$SECONDS
    ! cat "$script" >/dev/null 2>&1 || return 1
    echo "$script cannot be read: waiting for the file server" >&2
    until ((stopping || SECONDS - since > SITE_SECONDS)) || cat "$script" >/dev/null 2>&1; do
        sleep 2
    done
}

main() { # a function, so that bash has read all of it before a file server can go away
    local script=$1 deaths=0 began status how returned away
    shift
    while ((! stopping)); do
        began=$SECONDS
        WORKER_TOKEN=$(</proc/sys/kernel/random/uuid) # by which its leases are known
        export WORKER_TOKEN
        "$@" "$script" &
        worker=$!
        ((! stopping)) || kill -TERM "$worker" # the signal came a moment before there was one
        while true; do
            wait "$worker"
            status=$?
            kill -0 "$worker" 2>/dev/null || break # else a signal has interrupted the wait
            ((! stopping)) || send_again
        done
        worker=
        if ((status == INTERRUPTED)); then # as it was to: the job's end has come
            stopping=1 status=0
        fi
        away=0
        if ((status != 0)); then
            wait_for_site && away=1
        fi
        how=crashed
        if ((stopping || away)); then
            how=ended
        fi
        returned=0 # 10: it has left a trial; 11: and had finished others before
        "$@" -m hpo.job.return_trials "$WORKER_TOKEN" "$how" $((SECONDS - began)) || returned=$?
        if ((stopping)); then
            exit "$status"
        fi
        ((! away)) || continue
        if [[ ! $returned =~ ^1[01]$ && $status =~ ^(0|1|2|75)$ ]]; then
            exit "$status"
        fi
        if ((status == NO_CAPTURE)) && [[ -z ${NO_CUDA_GRAPHS:-} ]]; then
            export NO_CUDA_GRAPHS=1
            continue
        fi
        if ((SECONDS - began > 600 || returned == 11)); then
            deaths=0
        fi
        deaths=$((deaths + 1))
        if ((deaths > 3)); then
            echo "the worker died $deaths times in a row (status $status): giving up" >&2
            exit "$((status == 0 ? 1 : status))"
        fi
        echo "the worker died with status $status: starting it again ($deaths of 3)" >&2
        sleep 1
    done
}

main "$@"
exit
