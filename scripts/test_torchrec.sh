#!/usr/bin/env bash
# Write checkpoints with torchrec itself and export them, in an environment of their own: .venv-torchrec.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/make_env.sh .venv-torchrec test,torchrec
# without its dependencies, which the extra names: pip would bring a CUDA build of fbgemm into the same folder
.venv-torchrec/bin/python -m pip install -qq --disable-pip-version-check --no-deps 'torchrec==1.8.0'
OMP_NUM_THREADS=1 DIST_EXPORT_REQUIRE_TORCHREC=1 .venv-torchrec/bin/python -m pytest -q tests/with_torchrec "$@"
