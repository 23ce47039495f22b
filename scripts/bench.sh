#!/usr/bin/env bash
# Make the environment of the benchmarks and run them. usage: scripts/bench.sh [--size GB] [--rounds N] [--only NAME,...]
#   [--where tmpfs,disk]      --help tells more. BENCH_EXTRA names another extra to install.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-bench "${BENCH_EXTRA:-bench}"
exec .venv-bench/bin/python -m scripts.bench "$@"
