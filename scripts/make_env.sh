#!/usr/bin/env bash
# Make a virtual environment that holds this package, editable, at the pinned versions; do nothing where it is up to date.
# usage: scripts/make_env.sh DIR [EXTRA]     e.g. scripts/make_env.sh .venv-test test
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=$1
target=$root${2:+[$2]}
# What the environment was made from: kept inside it, written last, compared on the next run.
recipe=$(printf '%s\n' "$target" && cat "$root/constraints.txt" "$root/pyproject.toml" "$root/setup.py")
if [[ -f $env/recipe && $(<"$env/recipe") == "$recipe" ]]; then
  # The compiled kernels lie in the tree. They are built again if a source is newer; without a compiler numpy does their work.
  library=$root/dist_export/kernels/_compiled.so
  if command -v "${CC:-cc}" >/dev/null &&
    { [[ ! -f $library ]] || [[ -n $(find "$root/dist_export/kernels/src" "$root/setup.py" -newer "$library") ]]; }; then
    (cd "$root" && "$env/bin/python" setup.py -q build_ext --inplace --force)
  fi
  exit 0
fi
echo "installing into $env ..."
"${PYTHON:-python3}" -m venv --clear "$env"
"$env/bin/python" -m pip install -qq --disable-pip-version-check \
  -c "$root/constraints.txt" 'torch==2.13.0' -e "$target"
printf '%s\n' "$recipe" >"$env/recipe"
