#!/usr/bin/env bash
# tools/dist_train.sh CONFIG GPUS [ARGS ...]: train on several GPUs.
# GPUS is the number of GPUs per machine. Set NNODES to train on several machines.
set -euo pipefail
CONFIG=${1:?usage: tools/dist_train.sh CONFIG GPUS [ARGS ...]}
GPUS=${2:?usage: tools/dist_train.sh CONFIG GPUS [ARGS ...]}
NPROC_PER_NODE=$GPUS exec "${PYTHON:-python}" "$(dirname "$0")/train.py" "$CONFIG" "${@:3}"
