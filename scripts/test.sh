#!/usr/bin/env bash
# Set up what is missing (on first use), then check everything: format, lint, types, tests.
#
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh -k loss -x ...       only pytest, with these arguments
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env liger dev

if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m ruff check .
    "$PYTHON" -m mypy
fi
# Tests are many small computations and, some of them, several processes: more threads would only get in each other's way.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" exec "$PYTHON" -m pytest "$@"
