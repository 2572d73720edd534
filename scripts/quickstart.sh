#!/usr/bin/env bash
# The quickstart, set-up included: `bash scripts/quickstart.sh [section.key=value ...]`, from any folder.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
cd -- "$ROOT"

install() {
    pip_install -e '.[plots]'
}
prepare_environment quickstart install

# XLA on CPU maps its temporaries anew every step; with huge pages (glibc 2.35 or newer) that costs a tenth less time.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
exec "$VENV/bin/python" -m specjax.quickstart configs/quickstart.yaml "$@"
