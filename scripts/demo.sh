#!/usr/bin/env bash
# The rows of FedIT's table on generated data, each time in a new folder: quickstart made as small as its claims allow.
set -euo pipefail
cd "$(dirname "$0")/.."
number=1
while [ -e "runs/demo-$number" ]; do number=$((number + 1)); done
exec .venv/bin/fedloom compare quickstart --out "runs/demo-$number" \
    compare.seeds=3 rounds=4 data.examples=320 data.hold_out=8 evaluation.every=2
