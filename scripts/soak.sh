#!/usr/bin/env bash
# Kill real exports at every place and at random moments, and look at what is left and what a rerun makes of it.
#   bash scripts/soak.sh [--kills 120] [--seed 0] [--only TEXT]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/make_env.sh .venv-test test,lint,docs
exec .venv-test/bin/python -m scripts.soak "$@"
