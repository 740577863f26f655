#!/usr/bin/env bash
# Install into .venv whatever is missing; do nothing if it is complete.
#     scripts/setup.sh run|dev
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:?run or dev}

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.14 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    say "fedloom needs Python 3.11 or newer, and none was found. Install one, or name it: make demo PYTHON=/path/to/python3"
    exit 1
}

# The inputs of the environment: this folder and the exact requirements.
wanted() { { pwd; echo "$1"; cat pyproject.toml constraints.txt; } | cksum; }

current() { # is .venv set up for $1?
    [ -f ".venv/fedloom-$1" ] && [ "$(cat ".venv/fedloom-$1")" = "$(wanted "$1")" ] \
        && .venv/bin/python -c '' 2>/dev/null
}

if current "$what" || { [ "$what" = run ] && current dev; }; then
    exit 0
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "Making .venv with $("$python" --version) ..."
    if ! "$python" -m venv --clear .venv >&2; then
        say "Could not make a virtual environment. On Debian and Ubuntu: apt install python3-venv"
        exit 1
    fi
fi

if [ "$what" = run ]; then target=.; else target='.[dev]'; fi
say "Installing fedloom and what it needs into .venv (once; a few minutes, about 1.5 GB) ..."
if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input \
    --constraint constraints.txt --editable "$target" >.venv/install.log 2>&1 </dev/null; then
    tail -n 20 .venv/install.log >&2
    say "The installation failed; the lines above say why, and .venv/install.log holds all of them."
    exit 1
fi
wanted "$what" >".venv/fedloom-$what"
