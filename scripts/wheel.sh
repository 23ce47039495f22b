#!/usr/bin/env bash
# Build the wheel and the source archive, install the wheel into an environment of its own, and run its command.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
pip=("$work/env/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt)
"${pip[@]}" build
git archive --format=tar HEAD | tar -x -C "$(mkdir "$work/tree" && echo "$work/tree")" # nothing that lies about goes in
"$work/env/bin/python" -m build --outdir "$work/dist" "$work/tree" >/dev/null
if tar -tf "$work"/dist/*.tar.gz | grep -E '/(tests|scripts|launch|\.ci)/|\.(pyc|so)$'; then
  echo "wheel.sh: the source archive holds what no user needs" >&2
  exit 1
fi
"${pip[@]}" 'torch==2.13.0' "$work"/dist/*.whl
cd "$work" # not in the repository, whose folder would be imported in place of the wheel
"$work/env/bin/dist_export" --version
"$work/env/bin/dist_export" --help >/dev/null
"$work/env/bin/python" -c 'import dist_export, os; assert os.path.exists(os.path.join(os.path.dirname(dist_export.__file__), "py.typed"))'
