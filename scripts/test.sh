#!/usr/bin/env bash
# Lint, types and tests, set-up included: `bash scripts/test.sh [pytest arguments]`, from any folder.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$ROOT"

# PyTorch is only a reference for parity. A version pinned first lets pip take a CPU build from whatever index or
# folder it is configured with; TORCH names another one, or the file of a build.
install() {
    if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
        pip_install "${TORCH:-torch==2.13.0}"
    fi
    pip_install -e '.[test]'
}
prepare_environment test install

python=$VENV/bin/python
export JAX_PLATFORMS=cpu
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
# A file's tests share their fixtures. A worker that crashed is not replaced: the new one can wait for tests for ever.
exec "$python" -m pytest -q -n 2 --dist loadfile --max-worker-restart=0 "$@"
