#!/usr/bin/env bash
# Builds real TensorRT-RTX plans on a machine without a GPU, in an environment of its own: its packages replace nothing in
# .venv, and the CPU build of torch is enough. Downloads about 300 MB the first time.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON="${PYTHON:-python3}"
VENV=.venv-tensorrt
STAMP="$VENV/.installed"

if [[ ! -f "$STAMP" || pyproject.toml -nt "$STAMP" || scripts/test_tensorrt.sh -nt "$STAMP" ]]; then
    [[ -x "$VENV/bin/python" ]] || "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install -q --upgrade pip
    "$VENV/bin/python" -m pip install -q torch==2.13.0
    "$VENV/bin/python" -m pip install -q -e '.[dev]'
    # Without their dependencies: those name a package that only fetches from the vendor what these wheels hold.
    "$VENV/bin/python" -m pip install -q --no-deps \
        torch-tensorrt-rtx==2.13.0 tensorrt-rtx-cu13-libs==1.5.0.114 tensorrt-rtx-cu13-bindings==1.5.0.114
    "$VENV/bin/python" -m pip install -q dllist
    touch "$STAMP"
fi

exec "$VENV/bin/python" -m pytest -p no:cacheprovider --rootdir . -c pyproject.toml tests_tensorrt "$@"
