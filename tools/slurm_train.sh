#!/usr/bin/env bash
# sbatch [OPTIONS] tools/slurm_train.sh CONFIG [ARGS ...]: train with Slurm, one task per GPU.
# OPTIONS, such as --partition=P --ntasks=16, replace those below. 90 seconds before its time is over, or when it is
# pre-empted, the job saves and is requeued; the next start resumes. Submit it from the folder of its work_dirs.
#SBATCH --job-name=diffengine
#SBATCH --ntasks=8
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=5
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@90
set -euo pipefail
CONFIG=${1:?usage: sbatch [OPTIONS] tools/slurm_train.sh CONFIG [ARGS ...]}
: "${SLURM_JOB_ID:?expected a job of Slurm; start it with: sbatch tools/slurm_train.sh CONFIG [ARGS ...]}"
shift
ARGS=()
if ((${SLURM_RESTART_COUNT:-0} > 0)); then # what begins a run gives way to --resume
    while (($#)); do
        case $1 in
        --overwrite | --init-from=*) ;;
        --init-from) shift ;;
        *) ARGS+=("$1") ;;
        esac
        shift
    done
    ARGS+=(--resume)
else
    ARGS=("$@")
fi
STATUS=0
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-5}" \
    "${PYTHON:-python}" -m diffengine train "$CONFIG" --launcher slurm "${ARGS[@]}" || STATUS=$?
if ((STATUS == 75)); then # every task saved and asks for another start
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS"
