#!/usr/bin/env bash
# The inner loop: format, lint, rooms, names, sizes, types (of scripts and of the tests' helpers too) and the unit tests. Arguments go to pytest in place of tests/unit.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-test test,lint,docs
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .
.venv-test/bin/lint-imports --no-logo
.venv-test/bin/python scripts/check_words.py
.venv-test/bin/python scripts/check_sizes.py
.venv-test/bin/mypy
(($#)) || set -- tests/unit
OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -q -n 2 --dist worksteal "$@"
