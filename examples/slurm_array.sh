#!/bin/bash
# One classifier per seed as a Slurm array; each job has four GPUs of one machine.
# A job that is cut short by its time limit is queued again and continues at its last checkpoint.
#SBATCH --job-name=pillsnap
#SBATCH --array=0-4
#SBATCH --nodes=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
set -euo pipefail
RUN="${RUN_ROOT:-_runs}/seed${SLURM_ARRAY_TASK_ID:-0}"
SEED=$((42 + ${SLURM_ARRAY_TASK_ID:-0}))
pillsnap run conversion --config two_stage --run-dir "$RUN" "train.seed=$SEED"
pillsnap run splits --config two_stage --run-dir "$RUN" "train.seed=$SEED"
pillsnap distributed classifier --config two_stage --run-dir "$RUN" --processes "${SLURM_GPUS_ON_NODE:-4}" "train.seed=$SEED"
pillsnap run all --config two_stage --run-dir "$RUN" "train.seed=$SEED"
