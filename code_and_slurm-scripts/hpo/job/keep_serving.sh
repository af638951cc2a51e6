#!/usr/bin/env bash
# The process that serves the study, started again if it dies (bash keep_serving.sh LOG COMMAND…).
#
# It takes its workers up where it left them, and they wait for it (hpo/study/serving/server.py).  It is not
# started again if it ends by itself (status 0 or 2), after SIGTERM, or when it has died four times
# in a row; one that lived for a minute starts a new row.  Its output goes to LOG, and what happens
# to it is one line here, which is the job's log.
set -uo pipefail

stopping=0
server=
stop() {
    stopping=1
    [[ -z $server ]] || kill -TERM "$server" 2>/dev/null
}
trap stop TERM INT

log=$1
shift
deaths=0
while true; do
    began=$SECONDS
    "$@" >>"$log" 2>&1 &
    server=$!
    ((! stopping)) || kill -TERM "$server" # the signal came a moment before there was one
    wait "$server"
    status=$?
    while kill -0 "$server" 2>/dev/null; do # a signal has interrupted the wait: it still runs
        wait "$server"
        status=$?
    done
    if ((stopping)) || [[ $status =~ ^[02]$ ]]; then
        exit "$status"
    fi
    if ((SECONDS - began > 60)); then
        deaths=0
    fi
    deaths=$((deaths + 1))
    if ((deaths > 3)); then
        echo "the study's server died $deaths times in a row (status $status): giving up; see $log"
        exit "$status"
    fi
    echo "the study's server died with status $status: starting it again ($deaths of 3)"
    sleep 1
done
