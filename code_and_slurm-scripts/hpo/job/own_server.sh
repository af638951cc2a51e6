# shellcheck shell=bash disable=SC2154 # run_python is of the launch script
# STUDY_DB=postgresql:job: a PostgreSQL for this job alone, on its first node.  Sourced by job.sh and
# run-optuna-local.sh, in the scripts' folder; run_python is the command that runs Python.
#
# Its data is on the node's own disk (TMPDIR, else /tmp), and ends with the job; what stays is the
# study's copy beside the scripts, from which the next job begins.  It is started again if it dies.

own_server= # pid of what keeps it running
own_data=   # its folder

# Prints the folder of the programs.
# shellcheck disable=SC2016 # another shell expands it
own_programs='PATH=$PATH:$(printf "%s:" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin)
    command -v postgres >/dev/null && found=$(command -v initdb) && dirname "$found"'

# start_own_server LOG NODE…: returns when the study can be opened; 2 after one line that says why not
start_own_server() {
    local log=$1 programs address port place
    local image=("${run_python[@]:0:${#run_python[@]}-1}") # apptainer exec … IMAGE
    shift
    if ! programs=$("${image[@]}" sh -c "$own_programs" 2>/dev/null); then
        image=()
        programs=$(sh -c "$own_programs") || {
            echo "error: STUDY_DB=$STUDY_DB needs PostgreSQL's programs, postgres and initdb, on" \
                "$(hostname) or in the image: load its module, or STUDY_DB=sqlite:///study.db" >&2
            return 2
        }
    fi
    own_data=$(mktemp -d "${TMPDIR:-/tmp}/optuna-postgresql.XXXXXX") || return 2
    place=$("${run_python[@]}" -m hpo.study.serving.own_server begin "$own_data" "$@") || return
    read -r address port <<<"$place"
    if ! "${image[@]}" "$programs/initdb" --pgdata="$own_data/data" --username=optuna \
        --pwfile="$own_data/password" --auth=scram-sha-256 --encoding=UTF8 --locale=C --no-sync \
        >>"$log" 2>&1; then
        echo "error: PostgreSQL's initdb has failed: tail $log" >&2
        return 2
    fi
    echo "host all all all scram-sha-256" >>"$own_data/data/pg_hba.conf"
    # In a session of its own: the terminal's Ctrl-C is for the workers, which need it until they end.
    setsid bash hpo/job/keep_serving.sh "$log" "${image[@]}" "$programs/postgres" \
        -D "$own_data/data" -h "$address" -p "$port" -k '' -N 1000 &
    own_server=$!
    "${run_python[@]}" -m hpo.study.serving.own_server fill "$own_data"
}

stop_own_server() {
    [[ -n $own_data ]] || return 0
    if [[ -n $own_server ]]; then
        "${run_python[@]}" -m hpo.study.serving.own_server end ||
            echo "the study's copy is of a minute before the end" >&2
        kill -TERM "$own_server" 2>/dev/null || true
        # And at once, whoever is still connected.
        kill -INT "$(head -n 1 "$own_data/data/postmaster.pid" 2>/dev/null)" 2>/dev/null || true
        wait "$own_server" || true
    fi
    rm -rf "$own_data" || true
    own_server='' own_data=''
}
