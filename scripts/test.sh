#!/usr/bin/env bash
# Make the test environment and run the tests, four at a time. Arguments go to pytest, such as -k name or -m "not distributed".
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-test test,lint,docs
export OMP_NUM_THREADS=1 # ranks and test workers share the cores already
# more workers than cores: more than a third of the time of a worker is waiting, for ranks, servers and time limits
exec .venv-test/bin/python -m pytest -n 4 --dist worksteal "$@"
