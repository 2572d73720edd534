#!/usr/bin/env bash
# The quickstart, set-up included: `bash scripts/quickstart.sh [section.key=value ...]`, from any folder.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$ROOT"

install() {
    pip_install -e '.[plots]'
}
prepare_environment quickstart install

exec "$VENV/bin/python" -m specjax.quickstart configs/quickstart.yaml "$@"
