# Sourced by run_train.sh and run_tests.sh: leaves in $PYTHON an interpreter that can run nanovl from this checkout.
# An active environment that has everything is used as it is; otherwise .venv is made, once. $1 = extras, such as dev.
# shellcheck shell=bash

nanovl_has_everything() { # interpreter, modules...
    local python=$1
    shift
    "$python" - "$@" <<'EOF' 2>/dev/null
import importlib.util, sys
sys.exit(sys.version_info < (3, 11) or any(importlib.util.find_spec(name) is None for name in sys.argv[1:]))
EOF
}

nanovl_environment() {
    local extras=$1 candidate wanted="torch torchtitan triton tokenizers tiktoken rustbpe pyarrow
        safetensors pydantic tensorboard rich huggingface_hub matplotlib numpy"
    [ "$(uname -s)" = Linux ] || wanted=${wanted/triton/}
    [ "$extras" = dev ] && wanted="$wanted pytest pytest_timeout hypothesis jsonschema ruff mypy importlinter transformers"
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    # shellcheck disable=SC2086
    if command -v python3 >/dev/null && nanovl_has_everything python3 $wanted; then
        PYTHON=$(command -v python3)
        return
    fi
    local venv="$ROOT/.venv" stamp
    PYTHON="$venv/bin/python"
    stamp="$venv/.ready-$extras-$(cksum <"$ROOT/pyproject.toml" | cut -d' ' -f1)"
    export PATH="$venv/bin:$PATH" # so that what is started from here finds it as the active environment
    [ -f "$stamp" ] && return
    for candidate in "${NANOVL_PYTHON:-python3}" python3.13 python3.12 python3.11; do
        command -v "$candidate" >/dev/null && nanovl_has_everything "$candidate" venv && break
        candidate=""
    done
    if [ -z "$candidate" ]; then
        echo "nanovl needs Python 3.11 or newer; install it, or name one with NANOVL_PYTHON=/path/to/python" >&2
        exit 1
    fi
    echo "setting up .venv (once, a few minutes)"
    [ -x "$PYTHON" ] || "$candidate" -m venv "$venv" || {
        echo "making $venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    # torch alone first: a range would pull the newest build with its CUDA packages onto a machine without a GPU
    "$PYTHON" -m pip install --quiet --disable-pip-version-check torch==2.13.0 || exit 1
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT${extras:+[$extras]}" || exit 1
    touch "$stamp"
}
