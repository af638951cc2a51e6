#!/bin/bash
# One study over several nodes of Turpan: one apptainer worker per GPU, one shared study.
#
#   sbatch run-optuna-multinode_Turpan.sh                    500 trials on 2 nodes × 2 GPUs
#   TOTAL_TRIALS=50 sbatch run-optuna-multinode_Turpan.sh    every name of USER CONFIG works so
#   squeue --me        placement --checkme                   the queue; who uses which GPU
#
# Submit it from this folder or from the one above.  The batch log is logs/JOBID.out, the log of
# worker 0, 1, … is logs/JOBID.0.out, logs/JOBID.1.out, …  The batch log ends with the best model.
# Not finished in time?  The same command goes on with the same study; CHAIN_JOBS=3 sbatch … lets
# the job submit up to three successors itself.  What will it cost?
#
#   bash run-optuna-multinode_Turpan.sh --estimate

#SBATCH --job-name=optuna-mnist
#SBATCH --output=logs/%j.out
#SBATCH --open-mode=append           # a requeued job keeps its log
#SBATCH --partition=small            # exclusive nodes, at most 6, at most 4 h
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2          # one worker per GPU
#SBATCH --gres=gpu:2                 # GPUs per node
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=40           # the node has 80 and is billed whole
#SBATCH --mem=0                      # all of the node's memory
#SBATCH --time=00:10:00
#SBATCH --signal=B:USR1@90           # 90 s before the end: finish the epoch, return the trial
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
# Each trial on both GPUs of a node (GPUS_PER_TRIAL=2 PY_SCRIPT=optuna_t5.py sbatch …):
##SBATCH --ntasks-per-node=1
##SBATCH --gpus-per-task=2
##SBATCH --cpus-per-task=80
#
# A slice of a GPU (MIG); without --gpus-per-task:
##SBATCH --partition=3g.40gb
##SBATCH --nodes=1
##SBATCH --ntasks-per-node=1
##SBATCH --gres=gpu:3g.40gb
##SBATCH --mem=64G

set -euo pipefail

# ---------- USER CONFIG: EDIT ----------
# module load …                            # elsewhere than on Turpan: OTHER_SITE.txt
CONTAINER="${CONTAINER-/work/conteneurs/sessions-interactives/pytorch-24.02-py3-calmip-si.sif}"
BINDS="${BINDS-/tmpdir,/work}"             # folders that the container shall see, beside HOME
PY_SCRIPT="${PY_SCRIPT:-optuna_mnist.py}"  # the script with your objective, in this folder
STUDY_DB="${STUDY_DB:-sqlite:///study.db}" # relative to this folder
STUDY_NAME="${STUDY_NAME:-mnist_hpo}"
TOTAL_TRIALS="${TOTAL_TRIALS:-500}" # in the whole study, over all workers and all jobs
SAMPLER="${SAMPLER:-tpe}"           # see README.txt
PRUNER="${PRUNER:-halving}"
# ---------------------------------------

# sbatch runs a copy of this script, so the bundle is where the job was submitted, not at $0.
scripts=${SLURM_SUBMIT_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
[[ -f $scripts/hpo/job/job.sh ]] || scripts=$scripts/code_and_slurm-scripts
if [[ ! -f $scripts/hpo/job/job.sh ]]; then
    echo "error: submitted from $SLURM_SUBMIT_DIR, which is not the bundle: cd to it first" >&2
    exit 2
fi
# shellcheck source=hpo/job/job.sh
source "$scripts/hpo/job/job.sh" # the phases below

check_settings # fails early, with one sentence
if [[ ${1:-} == --estimate ]]; then
    estimate
    exit
fi
[[ -n ${SLURM_JOB_ID:-} ]] || die "this is a batch script: sbatch ${BASH_SOURCE[0]##*/}"
ask_slurm
create_study # init_optuna_db.py
check_nodes  # check_cluster.py on every task
run_workers  # python $PY_SCRIPT, one per GPU, until the study is complete or the time is up
print_report # check_best_model.py, pictures; and the successor, if CHAIN_JOBS says so
exit "$status"
