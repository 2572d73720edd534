# Sourced by the scripts beside it: creates or reuses .venv in the checkout. Needs nothing but Python 3.11 or newer.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

# Settings of the caller's shell that would mix other installations into .venv.
unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER
export PIP_DISABLE_PIP_VERSION_CHECK=1

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# has_pip: also gives pip to an environment that was made without it.
has_pip() {
    "$1" -c 'import pip' 2>/dev/null || "$1" -m ensurepip >/dev/null 2>&1
}

# find_python: prints the first interpreter that is new enough; $PYTHON, if set, is the only candidate.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        set -- "$PYTHON"
    else
        set -- python3 python python3.13 python3.12 python3.11
    fi
    for candidate in "$@"; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    echo "error: ${PYTHON:-python3} is not Python 3.11 or newer; install one, or name it: PYTHON=/path/to/python bash $0" >&2
    return 1
}

# prepare_environment STAMP COMMAND...: makes .venv and runs the installing COMMAND, once for each pyproject.toml.
prepare_environment() {
    local stamp=$VENV/.installed-$1 python
    shift
    if ! { new_enough "$VENV/bin/python" && has_pip "$VENV/bin/python"; }; then
        python=$(find_python) || return 1
        echo "Creating $VENV" >&2
        "$python" -m venv --clear "$VENV" || {
            echo "error: $python cannot make a virtual environment; install its venv module (python3-venv)" >&2
            return 1
        }
    fi
    if ! cmp -s "$ROOT/pyproject.toml" "$stamp"; then
        echo "Installing specjax into $VENV (a few minutes the first time)" >&2
        "$@" || {
            echo "error: the installation failed; see pip's message above" >&2
            return 1
        }
        cp "$ROOT/pyproject.toml" "$stamp"
    fi
}

pip_install() {
    "$VENV/bin/python" -m pip install -qq "$@"
}
