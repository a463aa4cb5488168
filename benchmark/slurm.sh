#!/usr/bin/env bash
# One Slurm job per run of a matrix, without Ray. From the root of the repository, on a file system that all nodes share:
#     sbatch --array=0-39 benchmark/slurm.sh benchmark/matrices/mujoco.toml
# `python benchmark/run.py MATRIX --dry-run` lists the indices. What is done is skipped and what was interrupted goes on,
# so submit the same line again after a failure or when the time was up.
#SBATCH --job-name=sprig
#SBATCH --output=slurm-%A_%a.out
#SBATCH --mem=4G
#SBATCH --time=24:00:00
# The matrix's cpus; if its gpus are not 0, remove one # of the second line:
#SBATCH --cpus-per-task=1
##SBATCH --gres=gpu:1
# Five minutes before the time is up run.py is told to stop; it lets the script save.
#SBATCH --signal=B:TERM@300
set -euo pipefail
exec .venv/bin/python benchmark/run.py "$1" --only "$SLURM_ARRAY_TASK_ID" "${@:2}"
