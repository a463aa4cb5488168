#!/usr/bin/env bash
# One Slurm job per run of a matrix, without Ray:
#     sbatch --array=0-39 benchmark/slurm.sh benchmark/matrices/mujoco.toml
# from the root of the repository, on a file system that all nodes share. `benchmark/run.py MATRIX --dry-run` lists the
# indices. What is done is skipped and what was interrupted goes on, so submit the same line again after a failure.
#SBATCH --job-name=sprig
#SBATCH --output=slurm-%A_%a.out
#SBATCH --cpus-per-task=1          # the matrix's cpus
##SBATCH --gres=gpu:1              # if its gpus are not 0
#SBATCH --mem=4G
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300        # to this job's first process, five minutes before the time is up: it saves and stops
set -euo pipefail
exec .venv/bin/python benchmark/run.py "$1" --only "$SLURM_ARRAY_TASK_ID" "${@:2}"
