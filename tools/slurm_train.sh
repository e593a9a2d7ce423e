#!/usr/bin/env bash
# tools/slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS ...]: train with Slurm.
# GPUS (default 8) is the total number of GPUs, GPUS_PER_NODE (default 8) the number per node.
set -euo pipefail
PARTITION=${1:?usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS ...]}
JOB_NAME=${2:?usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS ...]}
CONFIG=${3:?usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG [ARGS ...]}
GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
exec srun --partition="$PARTITION" --job-name="$JOB_NAME" --ntasks="$GPUS" --ntasks-per-node="$GPUS_PER_NODE" \
    --gres=gpu:"$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 ${SRUN_ARGS:-} \
    "${PYTHON:-python}" "$(dirname "$0")/train.py" "$CONFIG" --launcher slurm "${@:4}"
