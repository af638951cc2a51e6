# shellcheck shell=bash
# Several workers on one GPU (WORKERS_PER_GPU).  Through NVIDIA MPS their kernels run at the same
# time; where MPS does not serve they take turns, which works, too, unless the GPU is exclusive.
#
#   source hpo/job/mps.sh; start_mps; …; stop_mps         what run-optuna-local.sh does
#   bash hpo/job/mps.sh COMMAND…                           one Slurm task: WORKERS_PER_GPU × COMMAND

# start_mps: the daemon for the GPUs that this shell sees; exports where its clients find it.
start_mps() {
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d "${TMPDIR:-/tmp}/mps-XXXXXX" 2>/dev/null ||
        mktemp -d /tmp/mps-XXXXXX)
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    if nvidia-cuda-mps-control -d >/dev/null 2>&1 && mps_serves; then
        # The container's workers need the folder of the daemon's sockets.
        export APPTAINER_BIND=${APPTAINER_BIND:+$APPTAINER_BIND,}$CUDA_MPS_PIPE_DIRECTORY
        type -P apptainer >/dev/null || export SINGULARITY_BIND=$APPTAINER_BIND
        echo "$WORKERS_PER_GPU workers per GPU, through NVIDIA MPS"
        return
    fi
    stop_mps
    echo "$WORKERS_PER_GPU workers per GPU, without NVIDIA MPS (it could not be started)"
    local modes
    modes=$(nvidia-smi --query-gpu=compute_mode --format=csv,noheader 2>/dev/null) || modes=
    if [[ $modes == *Exclusive* ]]; then
        echo "warning: the GPU is in exclusive compute mode: without MPS only one worker can use it"
    fi
}

# The daemon starts on any machine; whether it serves, only its server shows.
mps_serves() {
    local try state
    mps_order "start_server -uid $(id -u)" >/dev/null
    for ((try = 0; try < 50; try++)); do
        if [[ $(mps_order get_server_list) =~ [0-9]+ ]]; then
            state=$(mps_order "get_server_status ${BASH_REMATCH[0]}") # old daemons do not know it
            [[ $state != *FAULT* ]] || return 1
            [[ $state == *INITIALIZING* ]] || return 0
        fi
        sleep 0.2
    done
    return 1
}

mps_order() {
    echo "$1" | nvidia-cuda-mps-control 2>/dev/null || true
}

stop_mps() {
    if [[ -n ${CUDA_MPS_PIPE_DIRECTORY:-} ]]; then
        mps_order quit >/dev/null
        rm -rf -- "$CUDA_MPS_PIPE_DIRECTORY"
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    fi
}

# uuid_of GPU: the UUID of a number, if it is known.  A daemon that serves one GPU of several calls
# it number 0; its UUID is the same for all.
uuid_of() {
    local uuid
    if [[ $1 =~ ^[0-9]+$ ]] && uuid=$(nvidia-smi --query-gpu=uuid --format=csv,noheader \
        -i "$1" 2>/dev/null) && [[ $uuid == GPU-* ]]; then
        echo "$uuid"
    else
        echo "$1"
    fi
}

# run_task COMMAND…: ranks PROCID × WORKERS_PER_GPU, … ; returns the status of a worker that failed.
run_task() {
    local slot pid result status=0 pids=() stopping=0
    if [[ -n ${CUDA_VISIBLE_DEVICES:-} ]]; then
        CUDA_VISIBLE_DEVICES=$(uuid_of "$CUDA_VISIBLE_DEVICES")
        export CUDA_VISIBLE_DEVICES
    fi
    # Slurm signals the workers, too, and they take no harm from a second one.
    trap 'stopping=1; kill -USR1 "${pids[@]}" 2>/dev/null || true' USR1
    trap 'stopping=1; kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT
    trap stop_mps EXIT
    start_mps
    for ((slot = 0; slot < WORKERS_PER_GPU; slot++)); do
        ((! stopping)) || break # while MPS was starting
        WORKER_RANK=$((SLURM_PROCID * WORKERS_PER_GPU + slot)) "$@" &
        pids+=("$!")
    done
    for pid in "${pids[@]}"; do
        result=0
        wait "$pid" || result=$?
        # A signal ends `wait`, not the worker: wait for it again.
        while kill -0 "$pid" 2>/dev/null; do
            result=0
            wait "$pid" || result=$?
        done
        ((result == 0)) || status=$result
    done
    return "$status"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    run_task "$@"
fi
