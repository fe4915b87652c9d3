#!/bin/bash
# A fit under SLURM, one task per GPU. Change the lines below as your cluster wants them; what stands behind is fit's.
#
#     sbatch scripts/slurm.sh --config colab_t4 --trainer.accumulate_grad_batches 32
#
# 120 s before the time is over, each process gets SIGUSR1: the run is saved behind its step, and its first process
# requeues the job, because #SBATCH --requeue asks for it; the same command then resumes. If a task fails, srun ends the
# others. A checkpoint is written by the first process alone, so the run folder need not be on a shared disk; after a
# requeue, which may choose other nodes, it must be there all the same: run this in a shared folder.

#SBATCH --job-name=lit-qlora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
exec srun --kill-on-bad-exit=1 python main.py fit "$@" \
    --trainer.num_nodes "$SLURM_JOB_NUM_NODES" --trainer.devices "$SLURM_NTASKS_PER_NODE"
