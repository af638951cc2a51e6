# shellcheck shell=bash
# Several workers on one GPU (WORKERS_PER_GPU).  Through NVIDIA MPS their kernels run at the same
# time; where MPS cannot be started they take turns, which works, too.
#
#   source hpo/job/mps.sh; start_mps; …; stop_mps         what run-optuna-local.sh does
#   bash hpo/job/mps.sh COMMAND…                           one Slurm task: WORKERS_PER_GPU × COMMAND

# start_mps: the daemon for the GPUs that this shell sees; exports where its clients find it.
start_mps() {
    CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d "${TMPDIR:-/tmp}/mps-XXXXXX")
    export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
    if nvidia-cuda-mps-control -d >/dev/null 2>&1; then
        # The container's workers need the folder of the daemon's sockets.
        export APPTAINER_BIND=${APPTAINER_BIND:+$APPTAINER_BIND,}$CUDA_MPS_PIPE_DIRECTORY
        echo "$WORKERS_PER_GPU workers per GPU, through NVIDIA MPS"
    else
        rmdir "$CUDA_MPS_PIPE_DIRECTORY"
        unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
        echo "$WORKERS_PER_GPU workers per GPU, without NVIDIA MPS (it could not be started)"
    fi
}

stop_mps() {
    if [[ -n ${CUDA_MPS_PIPE_DIRECTORY:-} ]]; then
        echo quit | nvidia-cuda-mps-control >/dev/null 2>&1 || true
        rm -rf -- "$CUDA_MPS_PIPE_DIRECTORY"
    fi
}

# run_task COMMAND…: ranks PROCID × WORKERS_PER_GPU, … ; returns the status of a worker that failed.
run_task() {
    local slot pid result status=0 pids=()
    # A daemon that serves one GPU of several calls it number 0; its UUID is the same for all.
    if [[ ${CUDA_VISIBLE_DEVICES:-} =~ ^[0-9]+$ ]] && command -v nvidia-smi >/dev/null; then
        CUDA_VISIBLE_DEVICES=$(nvidia-smi --query-gpu=uuid --format=csv,noheader \
            -i "$CUDA_VISIBLE_DEVICES")
        export CUDA_VISIBLE_DEVICES
    fi
    # Slurm signals the workers, too, and they take no harm from a second one.
    trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1
    trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
    start_mps
    for ((slot = 0; slot < WORKERS_PER_GPU; slot++)); do
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
    stop_mps
    return "$status"
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    set -euo pipefail
    run_task "$@"
fi
