#!/bin/bash
# Train on 2 nodes with 8 GPUs each:
#     sbatch examples/cluster/slurm.sh \
#         spear train vla-pretrain --init runs/vlm-stage2 --episodes data/bridge
# All nodes must see the current folder. A job that is preempted or runs out of time is queued again. It
# continues from its last checkpoint, because it runs the same command.
#SBATCH --job-name=spear
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
set -euo pipefail
# shellcheck disable=SC1091
[ -f .venv/bin/activate ] && . .venv/bin/activate
export OMP_NUM_THREADS=8

# Five minutes before the time is over (--signal), queue the job again.
trap 'echo "The job is out of time and is queued again."; scontrol requeue "$SLURM_JOB_ID"' USR1

# Each node runs one torchrun, which starts one process per GPU. The first node is the rendezvous.
# torchrun restarts processes that fail, up to three times.
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
port=$((20000 + SLURM_JOB_ID % 20000))
srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$SLURM_JOB_ID" \
    --max-restarts=3 --no-python "$@" &
wait $!
