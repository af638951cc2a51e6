# shellcheck shell=bash disable=SC2154 # $before, $after, $status: job.sh
# Sourced by job.sh: a job submits the next one with what it has itself, be it from its header or
# from sbatch's command line.

# What squeue knows of this job, and the options of sbatch for it.  Each has been there for long.
FIELDS=(%A %o %l %D %P %b %f %a %q %v %j %k %n %x %W)
OPTIONS=('' '' time nodes partition gres constraint account qos reservation job-name comment
    nodelist exclude licenses)
# What else Slurm tells a job, if it was asked for.
VARIABLES=(NTASKS NTASKS_PER_NODE CPUS_PER_TASK GPUS GPUS_PER_NODE GPUS_PER_TASK MEM_PER_NODE
    MEM_PER_CPU MEM_PER_GPU)

# Sets batch_script, its path, and successor_options.
look_at_job() {
    batch_script=
    successor_options=(--export=ALL) # all settings are exported
    local format values name value i
    format=$(printf '%s|' "${FIELDS[@]}")
    while IFS='|' read -r -a values; do # of an array Slurm shows all
        [[ ${values[0]} == "$SLURM_JOB_ID" ]] || continue
        batch_script=${values[1]}
        for i in "${!OPTIONS[@]}"; do
            name=${OPTIONS[i]} value=${values[i]:-}
            [[ -n $name && -n $value && ! $value =~ ^(\(null\)|N/A)$ ]] || continue
            if [[ $name == gres ]]; then
                [[ -z ${SLURM_GPUS_PER_NODE:-}${SLURM_GPUS:-} ]] || continue # it repeats them
                value=${value//gres[\/:]/}                                   # gres/gpu:2, gres:gpu:2
            fi
            successor_options+=("--$name=$value")
        done
    done < <(squeue --noheader --jobs="$SLURM_JOB_ID" --format="$format")
    if [[ -z ${SLURM_GPUS_PER_TASK:-} && ${SLURM_TRES_PER_TASK:-} =~ gres[/:]gpu[:=]([^,]+) ]]; then
        successor_options+=("--gpus-per-task=${BASH_REMATCH[1]/=/:}") # since Slurm 24.05
    fi
    for name in "${VARIABLES[@]}"; do
        value=SLURM_$name name=${name/MEM_PER_NODE/MEM} name=${name,,}
        [[ -z ${!value:-} ]] || successor_options+=("--${name//_/-}=${!value}")
    done
}

# Prints what sbatch says, or why there is none.
submit_successor() {
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
        echo "No successor is submitted: this is a job array."
    elif ((status != 0 || after[0] + after[2] == before[0] + before[2])); then
        echo "No successor is submitted: this job has advanced no trial by an epoch, or failed."
    else
        # What Slurm has told this job is not what the next one asks for.
        (
            local name
            for name in $(compgen -e | grep '^SLURM_'); do
                [[ $name == SLURM_CONF ]] || unset "$name"
            done
            CHAIN_JOBS=$((CHAIN_JOBS - 1)) sbatch "${successor_options[@]}" "$batch_script" 2>&1
        ) || echo "sbatch failed: no successor"
    fi
}
