#!/usr/bin/env bash
# The four rows of FedIT's table on generated data, each time in a new folder.
set -euo pipefail
cd "$(dirname "$0")/.."
number=1
while [ -e "runs/demo-$number" ]; do number=$((number + 1)); done
exec .venv/bin/fedloom compare quickstart --out "runs/demo-$number"
