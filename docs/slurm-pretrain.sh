#!/bin/bash
# DiffMAE pre-training on 4 nodes of 8 GPUs. Continue after the time limit: submit it again, or let Slurm requeue it.
#SBATCH --job-name=diffmae
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -u
OUT=${OUT:?folder of the run, on a file system that all nodes see}
DATA=${DATA:?folder or URL of shards}
export OMP_NUM_THREADS=1

# srun sets the variables from which each task learns its rank; USR1 reaches every task two minutes before the limit
srun diffmae pretrain --video --recipe "${RECIPE:-video-base}" --data "$DATA" --out "$OUT" --set data.workers=10
code=$?
if [ "$code" -eq 75 ]; then # saved by a signal
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
