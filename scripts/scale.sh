#!/usr/bin/env bash
# The fleet by simulation: balance, control messages and the store's load of hundreds to 10,000 ranks. --help tells more.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/make_env.sh .venv-test test,lint,docs
export OMP_NUM_THREADS=1
exec .venv-test/bin/python -m scripts.scale "$@"
