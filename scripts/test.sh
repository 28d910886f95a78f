#!/usr/bin/env bash
# Set up what is missing (on first use), then check everything: format, lint, types, tests.
#
#   ./scripts/test.sh                      everything
#   ./scripts/test.sh -k loss -x ...       only pytest, with these arguments; -n 0 runs the tests one after the other
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup_env.sh
setup_env liger dev

unset PYTHONDONTWRITEBYTECODE # or each of many processes compiles the package for itself
types=
if [ $# -eq 0 ]; then
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m ruff check .
    exec {said}< <("$PYTHON" -m mypy 2>&1) # beside the tests; what it says comes after them
    types=$!
fi
# As many tests at once as there are cores, each file's one after the other in one process, since they share what is
# costly to make; in the order of their names, which begins with the long ones. On a GPU there is one at a time: tests
# measure its memory and its speed.
workers=(-n 0)
if [ "$(count_gpus)" -eq 0 ]; then workers=(-n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder); fi
status=0
# Tests are many small computations and, some of them, several processes: more threads would only get in each other's way.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" "$PYTHON" -m pytest "${workers[@]}" "$@" || status=$?
if [ -n "$types" ]; then
    cat <&"$said"
    wait "$types" || status=1
fi
exit "$status"
