#!/usr/bin/env bash
# Write checkpoints with torchrec itself and export them, in an environment of their own: .venv-torchrec. Where torchrec
# cannot be installed (it has no build for every Python), say so and do nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
# torchrec goes in without its dependencies, which the extra names: pip would bring a CUDA build into the same folder
if ! bash scripts/make_env.sh .venv-torchrec test,torchrec ||
  ! .venv-torchrec/bin/python -m pip install -qq --disable-pip-version-check --no-deps 'torchrec==1.8.0'; then
  echo "torchrec cannot be installed here; its tests are skipped" >&2
  exit 0
fi
OMP_NUM_THREADS=1 DIST_EXPORT_REQUIRE_TORCHREC=1 .venv-torchrec/bin/python -m pytest -q tests/with_torchrec "$@"
