#!/usr/bin/env bash
# Starts, or continues, one training run on a Slurm cluster, one process a GPU; submit it from the checkout:
# `sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 scripts/launch_slurm.sh CONFIG [section.key=value ...]`.
# PYTHON names the interpreter (default: .venv/bin/python). output_dir must be a folder that all nodes share.
#SBATCH --job-name=specjax
#SBATCH --signal=TERM@300
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: sbatch [Slurm options] scripts/launch_slurm.sh CONFIG [section.key=value ...]" >&2
    exit 2
fi
# Slurm sends the SIGTERM above to the tasks 300 s before the time limit: the run saves and ends, to be continued by
# submitting the same command again.
exec srun --kill-on-bad-exit=1 "${PYTHON:-.venv/bin/python}" -m specjax.train "$@" --distributed --resume
