#!/bin/sh
# Sets up the virtual environment: scripts/setup.sh [EXTRA]. EXTRA is one of pyproject.toml's: demo, dev (default), docs.
# `make` runs this when .venv is missing or pyproject.toml has changed.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
EXTRA=${1:-dev}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup: Python 3.11 or newer is needed, found $("$PYTHON" --version 2>&1): run make PYTHON=/path/to/python3.11" >&2
    exit 2
}
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV" || {
    echo "setup: python's venv module is missing: apt-get install python3-venv" >&2
    exit 2
}
# LOCKED=1: exactly the files of scripts/lock.txt, whose hashes pip checks.
if [ "${LOCKED:-}" = 1 ]; then
    "$VENV/bin/pip" install --quiet --require-hashes --no-deps --requirement scripts/lock.txt
fi
# PyTorch first and pinned: later resolution then keeps the build that is there (a CPU build where one is configured).
"$VENV/bin/python" -c 'import torch' 2>/dev/null || "$VENV/bin/pip" install --quiet torch==2.13.0
# Then what the tests have passed with, where that can be had: a new release of another project breaks nothing here.
"$VENV/bin/pip" install --quiet --editable ".[$EXTRA]" --constraint scripts/constraints.txt || {
    echo "setup: not all versions of scripts/constraints.txt can be had for this Python: taking the newest" >&2
    "$VENV/bin/pip" install --quiet --editable ".[$EXTRA]"
}

# Rendering without a screen needs EGL from the system. The documentation renders nothing.
[ "$EXTRA" = docs ] && exit 0
if ! MUJOCO_GL=egl "$VENV/bin/python" -c 'import mujoco; mujoco.GLContext(16, 16).make_current()' 2>/dev/null; then
    packages="libegl1 libgl1 libgl1-mesa-dri"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "setup: installing $packages for rendering"
        apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages
    else
        echo "setup: rendering needs EGL, which is not here: sudo apt-get install $packages" >&2
    fi
fi
