#!/usr/bin/env bash
# Make a virtual environment that holds this package, editable, at the pinned versions; do nothing where it is up to date.
# usage: scripts/make_env.sh DIR [EXTRA]     e.g. scripts/make_env.sh .venv-test test
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
env=$1
target=$root${2:+[$2]}
# What the environment was made from: kept inside it, written last, compared on the next run.
recipe=$(printf '%s\n' "$target" && cat "$root/constraints.txt" "$root/pyproject.toml")
if [[ -f $env/recipe && $(<"$env/recipe") == "$recipe" ]]; then
  exit 0
fi
echo "installing into $env ..."
"${PYTHON:-python3}" -m venv --clear "$env"
"$env/bin/python" -m pip install -qq --disable-pip-version-check \
  -c "$root/constraints.txt" 'torch==2.13.0' -e "$target"
printf '%s\n' "$recipe" >"$env/recipe"
