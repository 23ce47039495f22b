#!/usr/bin/env bash
# Make the test environment and run the tests, two at a time. Arguments go to pytest, such as -k name or -m "not distributed".
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-test test,lint,docs
export OMP_NUM_THREADS=1 # ranks and test workers share the cores already
exec .venv-test/bin/python -m pytest -n 2 --dist worksteal "$@"
