#!/usr/bin/env bash
# Style, types, import contracts: one line each, with details of whatever is wrong.
set -uo pipefail
cd "$(dirname "$0")/.."
failed=0
check() {
    local name=$1 said
    shift
    if said=$("$@" 2>&1); then
        echo "$name: ok"
    else
        printf '%s\n%s: FAILED (%s)\n' "$said" "$name" "$*"
        failed=1
    fi
}
check style .venv/bin/ruff check --no-cache .
check format .venv/bin/ruff format --no-cache --check .
check types .venv/bin/mypy
check imports .venv/bin/lint-imports --no-cache
exit $failed
