# shellcheck shell=bash disable=SC2154 # $scripts and USER CONFIG come from the batch script
# The phases of run-optuna-multinode_Turpan.sh, which sources this file and calls them in turn.
# Uses its USER CONFIG and $scripts, the folder with the scripts.  Sets $status, srun's exit status.

status=0
server=      # pid of the process that serves the study, where locks do not hold
before=(0 0) # finished and missing trials when the job started
in_container=(apptainer exec --nv --bind "/tmpdir,/work" "$CONTAINER")

die() {
    echo "error: $1" >&2
    exit 2
}

# Everything that can be wrong without asking a compute node, each with one sentence.
check_settings() {
    command -v apptainer >/dev/null || die "there is no apptainer on $(hostname)"
    [[ -f $CONTAINER ]] || die "the image CONTAINER=$CONTAINER does not exist: ls /work/conteneurs"
    [[ -f $scripts/$PY_SCRIPT ]] || die "PY_SCRIPT=$PY_SCRIPT is not in $scripts"
    [[ ${CHAIN_JOBS:=0} =~ ^[0-9]{1,3}$ ]] || die "CHAIN_JOBS=$CHAIN_JOBS is not a number of jobs"
    cd "$scripts" || die "no way into $scripts"
    if [[ $STUDY_DB == sqlite:///[!/]* ]]; then # absolute: the workers may stand elsewhere
        STUDY_DB=sqlite:///$scripts/${STUDY_DB#sqlite:///}
    fi
    export WORKERS_PER_GPU="${WORKERS_PER_GPU:-1}"        # a task per GPU; each starts so many workers
    export PYTHONPATH=$scripts${PYTHONPATH:+:$PYTHONPATH} # hpo, for a script in a subfolder
    export CONTAINER PY_SCRIPT STUDY_DB STUDY_NAME TOTAL_TRIALS SAMPLER PRUNER
    "${in_container[@]}" python -m hpo.packages ||
        die "the tested Optuna is not installed in the image; on the login node, once:
    in_image() { apptainer exec --bind /tmpdir,/work $CONTAINER \"\$@\"; }
    in_image python -s -m hpo.packages image > image.txt
    in_image pip install --user -c image.txt -r requirements-container.txt"
}

# What Slurm knows and the container cannot ask: it has no squeue.
ask_slurm() {
    logs=$(cd "$scripts/../logs" && pwd)
    tasks=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
    on_every_gpu=(
        srun --ntasks="$tasks" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
        --kill-on-bad-exit=0 --wait=0 --open-mode=append
    )
    local end
    if [[ -z ${SLURM_JOB_END_TIME:-} ]] && end=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e); then
        SLURM_JOB_END_TIME=$(date --date="$end" +%s)
        export SLURM_JOB_END_TIME
    fi
    # Trials of jobs that are not in this list go back to the queue at once.
    ALIVE_JOBS=$(squeue --noheader --me --format=%A | tr '\n' ' ') || unset ALIVE_JOBS
    export ALIVE_JOBS
    # With what it was submitted, on the command line or by its header: for a successor.
    read -r time_limit nodes partition batch_script < <(
        squeue --noheader --jobs="$SLURM_JOB_ID" --format="%l %D %P %o"
    ) || true
    echo "Job $SLURM_JOB_ID: $tasks workers on $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)"
}

create_study() {
    "${in_container[@]}" python init_optuna_db.py
    read -r -a before < <("${in_container[@]}" python -m hpo.job.count)
}

# The preflight; status 3 means that all is well but for the locks between the nodes.
check_nodes() {
    local result=0 begin=$SECONDS
    "${on_every_gpu[@]}" "${in_container[@]}" python check_cluster.py || result=$?
    echo "Preflight of $tasks tasks: $((SECONDS - begin)) s"
    case $result in
        0) ;;
        3) serve_study ;;
        *) die "check_cluster.py has found what the table above says; no trial was started" ;;
    esac
}

# One process on this node owns study.db; the workers reach it over the network.
serve_study() {
    echo "Locks do not hold between the nodes: one process on $(hostname) serves the study."
    "${in_container[@]}" python -m hpo.study.server \
        $((tasks * WORKERS_PER_GPU)) >>"$logs/$SLURM_JOB_ID.server.out" 2>&1 &
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
    "${on_every_gpu[@]}" --output="$logs/%j.%t.out" "${several[@]}" \
        bash hpo/job/keep_running.sh "$PY_SCRIPT" "${in_container[@]}" python -u &
    local step=$!
    while true; do # in the background, because bash obeys a trap between commands only
        status=0
        wait "$step" || status=$?
        kill -0 "$step" 2>/dev/null || break # otherwise the signal has ended the wait
    done
    rm -f "$DRAIN_FILE"
    if ((status != 0)); then
        echo "A worker ended with status $status; the reason is at the end of its log:" >&2
        echo "    tail -n 20 $logs/$SLURM_JOB_ID.*.out" >&2
    fi
    if [[ -n $server ]]; then
        kill -TERM "$server" && wait "$server" || echo "the server ended with status $?" >&2
    fi
}

# The report, how many trials are left, and the one command that goes on.
print_report() {
    "${in_container[@]}" python check_best_model.py --report || true # it says what is wrong
    local after
    read -r -a after < <("${in_container[@]}" python -m hpo.job.count)
    if ((after[1] == 0)); then
        echo "The study is complete."
        return
    fi
    echo "${after[1]} trials are left; this job finished $((after[0] - before[0])). To go on:"
    local settings
    settings=$("${in_container[@]}" python -m hpo.settings given)
    echo "    cd $scripts && $settings sbatch ${batch_script##*/}"
    if ((CHAIN_JOBS > 0 && status == 0 && after[0] > before[0])); then
        # All settings of this job are exported, and so are its successor's.
        env -u SLURM_JOB_END_TIME CHAIN_JOBS=$((CHAIN_JOBS - 1)) sbatch --time="$time_limit" \
            --nodes="$nodes" --partition="$partition" "$batch_script"
    elif ((CHAIN_JOBS > 0)); then
        echo "No successor is submitted: this job has finished no trial, or failed."
    fi
}

# --estimate: before anything is submitted.  Reads this script's own header.
estimate() {
    header() { # header NAME: the value of its #SBATCH line
        sed -n "s/^#SBATCH --$1=\([^ ]*\).*/\1/p" "$scripts/${0##*/}"
    }
    local nodes per_node hours minutes seconds
    nodes=$(header nodes) per_node=$(header ntasks-per-node)
    IFS=: read -r hours minutes seconds < <(header time)
    "${in_container[@]}" python -m hpo.job.estimate "$(header partition)" "$nodes" \
        $((nodes * per_node)) "$(header cpus-per-task)" \
        $((10#$hours * 3600 + 10#$minutes * 60 + 10#$seconds))
}
