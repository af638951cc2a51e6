# shellcheck shell=bash disable=SC2154 # $scripts and USER CONFIG come from the batch script
# The phases of run-optuna-multinode_Turpan.sh, which sources this file and calls them in turn.
# Uses its USER CONFIG and $scripts, the folder with the scripts.  Sets $status, srun's exit status.

# shellcheck source=code_and_slurm-scripts/hpo/job/successor.sh
source "$scripts/hpo/job/successor.sh"
# shellcheck source=code_and_slurm-scripts/hpo/job/own_server.sh
source "$scripts/hpo/job/own_server.sh"

status=0
server=        # pid of what keeps the study served, where the nodes cannot share the file
before=(0 0 0) # finished and missing trials, and reported epochs, when the job started

ulimit -S -c 0 # as task.sh

SITE_SECONDS=300 # that a disk or a file server may be full or away

die() {
    tell_slurm "$1"
    echo "error: $1" >&2 || true
    exit 2
}

# In the log; one on a full disk ends no job.
say() {
    echo "$*" || true
}

# Where squeue and sacct show it: the disk of the logs may be full, or away.
tell_slurm() {
    [[ -z ${SLURM_JOB_ID:-} ]] ||
        scontrol update "JobId=$SLURM_JOB_ID" "Comment=$1" 2>/dev/null || true
}

# give_up STATUS WHAT: has failed before there were workers, and has said why.
give_up() {
    tell_slurm "$2 ended with status $1$(meaning "$1")"
    exit "$1"
}

meaning() { # meaning STATUS
    (($1 != 75)) || echo ": a disk, a file server or the study could not be used for minutes"
}

# patiently COMMAND…: again, while a disk or a file server is full or away (status 75, or the bundle
# cannot be read), for minutes, but not beyond the job's end.
patiently() {
    local begin=$SECONDS pause=1 result
    while true; do
        result=0
        "$@" || result=$?
        if ((result == 0)) || { ((result != 75)) && cat "$scripts/hpo/job/job.sh" &>/dev/null; }; then
            return "$result"
        fi
        if ((SECONDS - begin + pause > SITE_SECONDS)) ||
            (($(date +%s) + pause + 20 > ${SLURM_JOB_END_TIME:-0} && ${SLURM_JOB_END_TIME:-0} > 0)); then
            return 75
        fi
        echo "A disk or a file server is full or away: trying again in $pause s" >&2 || true
        sleep "$pause"
        pause=$((pause < 16 ? 2 * pause : 30))
    done
}

# run_python: the command that runs Python in the container; where CONTAINER is empty, this
# machine's.  install: the one that installs what is missing.
choose_python() {
    local requirements=requirements-container.txt launcher
    if [[ -z $CONTAINER ]]; then
        launcher=$(type -P python3) ||
            die "there is no python3 on $(hostname): load its module, or activate a venv"
        run_python=("$launcher")
        install="is not installed for $launcher; once:
    $launcher -m pip install -r $scripts/$requirements"
        return
    fi
    launcher=$(type -P apptainer || type -P singularity) ||
        die "there is no apptainer on $(hostname), nor singularity: load a module (or CONTAINER=)"
    [[ -e $CONTAINER ]] || die "the image CONTAINER=$CONTAINER does not exist on $(hostname)"
    run_python=("$launcher" exec --nv ${BINDS:+--bind "$BINDS"} "$CONTAINER" python)
    install="is not installed in the image; on the login node, once:
    in_image() { ${launcher##*/} exec ${BINDS:+--bind $BINDS }$CONTAINER \"\$@\"; }
    in_image python -s -m hpo.packages > image.txt
    in_image pip install --user -c image.txt -r $requirements"
}

# Everything that can be wrong without asking a compute node, each with one sentence.
check_settings() {
    choose_python
    [[ -f $scripts/$PY_SCRIPT ]] || die "PY_SCRIPT=$PY_SCRIPT is not in $scripts"
    [[ ${CHAIN_JOBS:=0} =~ ^[0-9]{1,3}$ ]] || die "CHAIN_JOBS=$CHAIN_JOBS is not a number of jobs"
    cd "$scripts" || die "no way into $scripts"
    if [[ $STUDY_DB == sqlite:///[!/]* ]]; then # absolute: the workers may stand elsewhere
        STUDY_DB=sqlite:///$scripts/${STUDY_DB#sqlite:///}
    fi
    export WORKERS_PER_GPU="${WORKERS_PER_GPU:-1}"        # a task per GPU; each starts so many workers
    export PYTHONPATH=$scripts${PYTHONPATH:+:$PYTHONPATH} # hpo, for a script in a subfolder
    export CONTAINER BINDS PY_SCRIPT STUDY_DB STUDY_NAME TOTAL_TRIALS SAMPLER PRUNER
    local result=0 hidden
    hidden=$("${run_python[@]}" -I hpo/job/hidden.py 2>/dev/null) || true # the next one will tell
    [[ -z $hidden ]] || die "$hidden"
    job_settings=$("${run_python[@]}" -m hpo.job.begin) || result=$?
    case $result in
        0) ;;
        2) exit 2 ;; # a wrong setting; it has said which
        3) die "the tested Optuna $install" ;;
        *) die "Python does not start (status $result; why, is said above): ${run_python[*]}" ;;
    esac
    [[ $(unset STUDY_NAME && eval "$job_settings" && echo "$STUDY_NAME") == "$STUDY_NAME" ]] ||
        die "the container hides the environment: unset APPTAINER_CLEANENV, or its like"
}

# What Slurm knows and the container cannot ask: it has no squeue.
ask_slurm() {
    logs=$(cd "$scripts/../logs" && pwd)
    tasks=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
    local end
    if [[ -z ${SLURM_JOB_END_TIME:-} ]] &&
        end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e) && [[ $end == [0-9]* ]]; then
        SLURM_JOB_END_TIME=$(date --date="${end%%$'\n'*}" +%s) # of an array's first: all alike
        export SLURM_JOB_END_TIME
    fi # otherwise nothing ends the job: it has no limit
    # Trials of this user's jobs that are not in this list go back to the queue at once.
    ALIVE_JOBS=$(squeue --noheader --me --format=%A | tr '\n' ' ') || unset ALIVE_JOBS
    export ALIVE_JOBS
    look_at_job
    say "Job $SLURM_JOB_ID: $tasks workers on $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)"
}

# on_every_gpu COMMAND…: one task per GPU.  JOB_SETTINGS gives each what the batch script has,
# whatever `sbatch --export` and a TaskProlog of the site make of its environment (task.sh).
on_every_gpu() {
    local name options=()
    while [[ $1 == --* ]]; do
        options+=("$1")
        shift
    done
    JOB_SETTINGS=$job_settings
    for name in PYTHONPATH CONTAINER BINDS DRAIN_FILE ALIVE_JOBS SLURM_JOB_END_TIME PREFLIGHT; do
        [[ ! -v $name ]] || JOB_SETTINGS+=$(printf '\nexport %s=%q' "$name" "${!name}")
    done
    JOB_SETTINGS=$JOB_SETTINGS srun --export=ALL --ntasks="$tasks" \
        --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=0 --wait=0 \
        --open-mode=append "${options[@]}" bash hpo/job/task.sh "$@"
}

create_study() {
    if [[ $STUDY_DB == postgresql:job ]]; then
        local hosts
        mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
        trap stop_own_server EXIT
        start_own_server "$logs/$SLURM_JOB_ID.server.out" "${hosts[@]}" ||
            give_up $? "the study's server"
    fi
    patiently "${run_python[@]}" init_optuna_db.py || give_up $? init_optuna_db.py
    local counted
    counted=$(patiently "${run_python[@]}" -m hpo.job.count) || give_up $? hpo.job.count
    read -r -a before <<<"$counted"
}

preflight() { # each attempt meets in a folder of its own
    PREFLIGHT=$((${PREFLIGHT:-0} + 1))
    on_every_gpu "${run_python[@]}" check_cluster.py
}

# The preflight; status 3 means that all is well but for locks or caches between the nodes.
check_nodes() {
    local result=0 begin=$SECONDS
    patiently preflight || result=$?
    say "Preflight of $tasks tasks: $((SECONDS - begin)) s"
    case $result in
        0) ;;
        3) serve_study ;;
        75) give_up 75 check_cluster.py ;;
        *) die "check_cluster.py has found what the table above says; no trial was started" ;;
    esac
}

# One process on this node owns study.db; the workers reach it over the network.
serve_study() {
    say "The nodes cannot share the file: one process on $(hostname) serves the study."
    local hosts
    mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    bash hpo/job/keep_serving.sh "$logs/$SLURM_JOB_ID.server.out" "${run_python[@]}" \
        -m hpo.study.serving.server $((tasks * WORKERS_PER_GPU)) "${hosts[@]}" &
    server=$!
    local file=${STUDY_DB#sqlite:///}.server seconds
    for ((seconds = 0; seconds < 60; seconds++)); do
        [[ ! -f $file ]] || return 0
        kill -0 "$server" 2>/dev/null || break
        sleep 1
    done
    die "the server has not started: tail $logs/$SLURM_JOB_ID.server.out"
}

run_workers() {
    local several=()
    if ((WORKERS_PER_GPU > 1)); then
        several=(bash hpo/job/mps.sh)
    fi
    export DRAIN_FILE=$scripts/.drain-$SLURM_JOB_ID # the workers stop when it is there
    trap 'touch "$DRAIN_FILE"' USR1                 # from Slurm, 90 s before the time limit
    on_every_gpu --output="$logs/%j.%t.out" "${several[@]}" \
        bash hpo/job/keep_running.sh "$PY_SCRIPT" "${run_python[@]}" -u &
    local step=$!
    while true; do # in the background, because bash obeys a trap between commands only
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break # otherwise the signal has ended the wait
    done
    rm -f "$DRAIN_FILE"
    stop_own_server
    if [[ -n $server ]]; then
        kill -TERM "$server" 2>/dev/null || true # it may have given up
        wait "$server" || echo "the server ended with status $?" >&2
        rm -f "${STUDY_DB#sqlite:///}.server" # no worker is left that could open study.db itself
    fi
    ((status == 0)) || say_why
}

say_why() {
    local why
    why="a worker ended with status $status$(meaning "$status")"
    tell_slurm "$why"
    echo "${why^}; the reason is at the end of its log:
    tail -n 20 $logs/$SLURM_JOB_ID.*.out" >&2 || true
}

# The successor, if there is to be one; the report, and the one command that goes on.
print_report() {
    local after=() next='' counted
    counted=$(patiently "${run_python[@]}" -m hpo.job.count) || true
    read -r -a after <<<"$counted"
    if ((${#after[@]} == 3 && after[1] > 0 && CHAIN_JOBS > 0)); then # the report may take long
        next=$(submit_successor)
    fi
    if ((${#after[@]} < 3)); then
        echo "The study cannot be read." >&2 || true
        return
    fi
    # What it says is all there is to say.
    patiently "${run_python[@]}" check_best_model.py --report || true
    if ((after[1] == 0)); then
        say "The study is complete."
    else
        say "${after[1]} trials are left; this job finished $((after[0] - before[0])). To go on:"
        local settings
        settings=$("${run_python[@]}" -m hpo.settings given) || true
        printf '    cd %q && %s sbatch %q\n%s' \
            "$scripts" "$settings" "${batch_script##*/}" "${next:+$next$'\n'}" || true
    fi
}

# --estimate: before anything is submitted.  Reads this script's own header.
estimate() {
    "${run_python[@]}" -m hpo.job.estimate "$scripts/${0##*/}"
}
