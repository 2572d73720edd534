#!/usr/bin/env bash
# Starts, or continues, one training run on every host of a Cloud TPU slice, from any machine with gcloud:
# `bash scripts/launch_gcloud_tpu.sh TPU_NAME ZONE CONFIG [section.key=value ...]`.
# Each host holds this checkout in REMOTE (default: specjax in the home folder) with specjax installed in its .venv.
# output_dir must be a folder that all hosts share. The run lives as long as this command: start it in tmux.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash $0 TPU_NAME ZONE CONFIG [section.key=value ...]" >&2
    exit 2
fi
name=$1 zone=$2
shift 2
remote="cd ${REMOTE:-specjax} && exec .venv/bin/python -m specjax.train$(printf ' %q' "$@") --distributed --resume"
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$remote"
