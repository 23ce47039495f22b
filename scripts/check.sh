#!/usr/bin/env bash
# The inner loop: format, lint, rooms and types. Arguments go to pytest; without any, no test runs.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-test test,lint,docs
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .
.venv-test/bin/lint-imports --no-logo
.venv-test/bin/mypy
if (($#)); then
  OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -q -n 2 --dist worksteal "$@"
fi
