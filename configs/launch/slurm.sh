#!/usr/bin/env bash
# sbatch --nodes=4 configs/launch/slurm.sh --config configs/nanochat_d12.toml [...]   from the checkout
#
# The checkout and job.run_dir are on a file system that all machines share. What your site wants, such as a partition,
# goes on the command line of sbatch or here (take one # away):
##SBATCH --partition=
##SBATCH --account=
##SBATCH --gpus-per-node=
##SBATCH --cpus-per-task=
##SBATCH --time=
#SBATCH --job-name=nanovl
#SBATCH --output=%x_%j.log
#SBATCH --open-mode=append
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
# SIGUSR1 to this script three minutes before the time limit, or a pre-emption where the site sends it: time to save
#SBATCH --signal=B:USR1@180
set -euo pipefail

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export NNODES=$SLURM_JOB_NUM_NODES
export RDZV_ENDPOINT=${RDZV_ENDPOINT:-$first:$((20000 + SLURM_JOB_ID % 10000))}
export RDZV_ID=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
export MAX_RESTARTS=${MAX_RESTARTS:-3}

noticed=0
# all processes of the job but this one; the ranks save, and exit with 75. (srun itself would kill them at SIGTERM.)
trap 'noticed=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
trap : TERM # sent to all when the job is cancelled: the ranks save, this script waits for them

# shellcheck disable=SC2016 # SLURM_NODEID differs from task to task
srun --kill-on-bad-exit=0 bash -c 'NODE_RANK=$SLURM_NODEID exec "$0" "$@"' \
    "${NANOVL_ROOT:-$SLURM_SUBMIT_DIR}/run_train.sh" "$@" &
step=$!
code=0
wait "$step" || code=$?
while kill -0 "$step" 2>/dev/null; do # a signal ends wait, not the step
    code=0
    wait "$step" || code=$?
done
if [ "$code" = 75 ] && [ "$noticed" = 1 ]; then
    scontrol requeue "$SLURM_JOB_ID" # it goes on by itself: a rank knows its own run by the job's id
fi
exit "$code"
