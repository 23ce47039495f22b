#!/usr/bin/env bash
# Let each system call of an export fail once and judge how it ends: hundreds of exports, minutes. Arguments are modes.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/make_env.sh .venv-test test,lint,docs
export OMP_NUM_THREADS=1
exec .venv-test/bin/python -m tests.support.faults.sweep "$@"
