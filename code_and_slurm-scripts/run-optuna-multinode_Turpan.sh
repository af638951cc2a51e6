#!/bin/bash
# One study over several nodes of Turpan: one apptainer worker per GPU, one shared study.
#
#   sbatch run-optuna-multinode_Turpan.sh                    500 trials on 2 nodes × 2 GPUs
#   TOTAL_TRIALS=50 sbatch run-optuna-multinode_Turpan.sh    every name of USER CONFIG works so
#   squeue --me        placement --checkme                   the queue; who uses which GPU
#
# Submit it from this folder or from the one above.  The batch log is logs/JOBID.out, the log of
# worker 0, 1, … is logs/JOBID.0.out, logs/JOBID.1.out, …  The batch log ends with the best model.
# Not finished in time?  The same command goes on with the same study.

#SBATCH --job-name=optuna-mnist
#SBATCH --output=logs/%j.out
#SBATCH --partition=small            # exclusive nodes, at most 6, at most 4 h
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2          # one worker per GPU
#SBATCH --gres=gpu:2                 # GPUs per node
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=40           # the node has 80 and is billed whole
#SBATCH --mem=0                      # all of the node's memory
#SBATCH --time=00:10:00
#SBATCH --signal=USR1@90             # 90 s before the end: finish the epoch, return the trial
#
# One GPU of a shared node (replace the lines of the same name above):
##SBATCH --partition=shared
##SBATCH --nodes=1
##SBATCH --ntasks-per-node=1
##SBATCH --gres=gpu:1
##SBATCH --mem=64G
#
# Twelve GPUs:
##SBATCH --nodes=6
#
# A slice of a GPU (MIG); without --gpus-per-task:
##SBATCH --partition=3g.40gb
##SBATCH --nodes=1
##SBATCH --ntasks-per-node=1
##SBATCH --gres=gpu:3g.40gb
##SBATCH --mem=64G

set -euo pipefail

# ---------- USER CONFIG: EDIT ----------
CONTAINER="${CONTAINER:-/work/conteneurs/sessions-interactives/pytorch-24.02-py3-calmip-si.sif}"
PY_SCRIPT="${PY_SCRIPT:-optuna_mnist.py}"  # the script with your objective, in this folder
STUDY_DB="${STUDY_DB:-sqlite:///study.db}" # relative to this folder
STUDY_NAME="${STUDY_NAME:-mnist_hpo}"
TOTAL_TRIALS="${TOTAL_TRIALS:-500}" # in the whole study, over all workers and all jobs
SAMPLER="${SAMPLER:-tpe}"           # see README.txt
PRUNER="${PRUNER:-median}"
# ---------------------------------------

die() {
    echo "error: $1" >&2
    exit 2
}

# sbatch runs a copy of this script, so the bundle is where the job was submitted, not at $0.
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a batch script: sbatch ${BASH_SOURCE[0]##*/}"
scripts=$SLURM_SUBMIT_DIR
[[ -f $scripts/init_optuna_db.py ]] || scripts=$SLURM_SUBMIT_DIR/code_and_slurm-scripts
[[ -f $scripts/init_optuna_db.py ]] ||
    die "submitted from $SLURM_SUBMIT_DIR, which is not the bundle: cd code_and_slurm-scripts first"
[[ -f $scripts/$PY_SCRIPT ]] || die "PY_SCRIPT=$PY_SCRIPT is not in $scripts"
[[ -f $CONTAINER ]] || die "the image CONTAINER=$CONTAINER does not exist: ls /work/conteneurs"
command -v apptainer >/dev/null || die "there is no apptainer on $(hostname)"

# Inside the container the names above are environment variables; the study's URL is absolute.
if [[ $STUDY_DB == sqlite:///[!/]* ]]; then
    STUDY_DB=sqlite:///$scripts/${STUDY_DB#sqlite:///}
fi
export PY_SCRIPT STUDY_DB STUDY_NAME TOTAL_TRIALS SAMPLER PRUNER
export WORKERS_PER_GPU="${WORKERS_PER_GPU:-1}" # tasks stay one per GPU; each starts so many workers
logs=$(cd "$scripts/../logs" && pwd)
tasks=${SLURM_NTASKS:-$((SLURM_NNODES * ${SLURM_NTASKS_PER_NODE:-1}))}
in_container=(apptainer exec --nv --bind "/tmpdir,/work" "$CONTAINER")

"${in_container[@]}" python -c 'import sys, optuna; sys.exit(optuna.__version__[:2] != "5.")' ||
    die "Optuna 5 is not installed in the image; on the login node, once:
    apptainer exec --bind /tmpdir,/work $CONTAINER pip install --user optuna==5.0.0"

echo "Job $SLURM_JOB_ID: $tasks workers on $SLURM_NNODES nodes ($SLURM_JOB_NODELIST)"
"${in_container[@]}" python "$scripts/init_optuna_db.py"

# One worker per task.  A worker that dies leaves the others alone (--kill-on-bad-exit=0, --wait=0);
# srun does not take --cpus-per-task over from the header.
several=()
if [[ $WORKERS_PER_GPU != 1 ]]; then
    several=(bash "$scripts/hpo/mps.sh")
fi
workers=(
    srun --ntasks="$tasks" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}"
    --kill-on-bad-exit=0 --wait=0 --open-mode=append --output="$logs/%j.%t.out"
    "${several[@]}" "${in_container[@]}" python -u "$scripts/$PY_SCRIPT"
)
status=0
"${workers[@]}" || status=$?
if ((status != 0)); then
    echo "A worker ended with status $status; the reason is at the end of its log:" >&2
    echo "    tail -n 20 $logs/$SLURM_JOB_ID.*.out" >&2
fi

"${in_container[@]}" python "$scripts/check_best_model.py" || true
echo "To go on with this study (all names as above): sbatch run-optuna-multinode_Turpan.sh"
exit "$status"
