#!/usr/bin/env bash
# The study on one machine, without Slurm and without a container.
#
#   bash run-optuna-local.sh                     real MNIST, TOTAL_TRIALS trials, best model
#   TOTAL_TRIALS=50 bash run-optuna-local.sh     adds trials to the same study
#
# Makes ../.venv if there is none, starts one worker per GPU (without a GPU: one per core, with one
# thread each), shows the progress, and ends with what check_best_model.py says.  The workers' logs
# are ../logs/local.RANK.out.  Ctrl-C, or closing the terminal, stops all workers; the same command
# goes on with the study.
case "${BASH_VERSION:-}:${SHELLOPTS:-}" in # sh run-optuna-local.sh
    :* | *posix*) exec bash "$0" "$@" ;;
esac
set -euo pipefail

# ---------- USER CONFIG: EDIT ----------
export PY_SCRIPT="${PY_SCRIPT:-optuna_mnist.py}"  # the script with your objective
export STUDY_DB="${STUDY_DB:-sqlite:///study.db}" # relative to this folder
export STUDY_NAME="${STUDY_NAME:-mnist_hpo}"
export TOTAL_TRIALS="${TOTAL_TRIALS:-8}" # in the whole study, over all runs
export SAMPLER="${SAMPLER:-tpe}"         # see README.txt
export PRUNER="${PRUNER:-halving}"
export SEED="${SEED-6}" # the same first trials on every machine; empty: never the same
# ---------------------------------------

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source code_and_slurm-scripts/hpo/job/venv.sh
source code_and_slurm-scripts/hpo/job/mps.sh
source code_and_slurm-scripts/hpo/job/own_server.sh
make_venv .venv run
python=$PWD/.venv/bin/python
logs=$PWD/logs
cd code_and_slurm-scripts
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} # hpo, for a script in a subfolder
run_python=("$python")
hidden=$("$python" -I hpo/job/hidden.py)
if [[ -n $hidden ]]; then
    echo "error: $hidden" >&2
    exit 2
fi
if [[ $STUDY_DB == postgresql:job ]]; then
    trap stop_own_server EXIT
    start_own_server "$logs/local.server.out"
fi
"$python" init_optuna_db.py

# Those of a preset CUDA_VISIBLE_DEVICES, else all; a slice (MIG) is one, too.
mapfile -t gpus < <("$python" -m hpo.gpu)
export WORKERS_PER_GPU="${WORKERS_PER_GPU:-1}"
per_trial=${GPUS_PER_TRIAL:-1} # processes; without a GPU each takes a core
workers=$((${#gpus[@]} ? ${#gpus[@]} * WORKERS_PER_GPU / per_trial : $(nproc) / per_trial))
if ((workers == 0)); then
    echo "error: GPUS_PER_TRIAL=$per_trial, but there are ${#gpus[@]} GPUs and $(nproc) cores" >&2
    exit 2
fi
if ((per_trial > 1)) && [[ ${gpus[*]} == *MIG-* ]]; then
    echo "error: GPUS_PER_TRIAL=$per_trial, but a process can use one slice (MIG) only" >&2
    exit 2
fi
if ((${#gpus[@]} && WORKERS_PER_GPU > 1)); then
    for i in "${!gpus[@]}"; do
        gpus[i]=$(uuid_of "${gpus[i]}")
    done
    trap 'stop_mps; stop_own_server' EXIT
    CUDA_VISIBLE_DEVICES=$(
        IFS=,
        echo "${gpus[*]}"
    )
    export CUDA_VISIBLE_DEVICES # for the daemon
    start_mps
fi
if ((${#gpus[@]} == 0)); then
    export OMP_NUM_THREADS=1 # two workers of one thread beat one worker of two
fi

echo "Starting $workers workers (${#gpus[@]} GPUs); logs: $logs/local.RANK.out"
pids=()
# shellcheck disable=SC2329 # called by the trap below
stop() {
    trap '' INT TERM HUP
    kill -TERM "${pids[@]}" "$watch" 2>/dev/null || true
    echo "Stopping; the running trials go back to the queue …" || true # the terminal may be closed
    wait "${pids[@]}" || true
    echo "Stopped. The same command goes on with the study." || true
    exit 130
}
trap '' HUP # of a closed terminal: this script alone hears it, and ends the others as with Ctrl-C
"$python" check_best_model.py --watch &
watch=$!
trap stop INT TERM
for ((rank = 0; rank < workers; rank++)); do
    # With Ctrl-C the terminal signals this script, which then ends the workers.
    device=-1
    if ((${#gpus[@]})); then # so many GPUs in a row
        device=$(
            IFS=,
            echo "${gpus[*]:rank*per_trial%${#gpus[@]}:per_trial}"
        )
    fi
    WORKER_RANK=$rank CUDA_VISIBLE_DEVICES=$device \
        bash hpo/job/keep_running.sh "$PY_SCRIPT" "$python" >>"$logs/local.$rank.out" 2>&1 &
    pids+=("$!")
done

trap stop HUP
status=0
for pid in "${pids[@]}"; do
    wait "$pid" || status=$?
done
kill "$watch" 2>/dev/null || true
wait "$watch" 2>/dev/null || true
if ((status != 0)); then
    echo "A worker ended with status $status; the reason is at the end of its log in $logs" >&2
fi
"$python" check_best_model.py
# What was given; TOTAL_TRIALS and SEED have other defaults here.
settings=$("$python" -m hpo.settings given | sed -E 's/ ?\b(TOTAL_TRIALS=[0-9]+|SEED=6\b)//g')
cat <<EOF

What next?  In $PWD:
    a page with pictures and all trials, and a file for the model:
        ${settings:+$settings }../.venv/bin/python check_best_model.py --report
        ${settings:+$settings }../.venv/bin/python check_best_model.py --export best
    more trials of the same study:
        ${settings:+$settings }TOTAL_TRIALS=$((2 * TOTAL_TRIALS)) bash run-optuna-local.sh
    your own model:
        OWN_MODEL.txt
EOF
exit "$status"
