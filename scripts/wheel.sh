#!/usr/bin/env bash
# Build the wheel and the source archive, install the wheel into an environment of its own, and run its command there. The
# wheel's dependencies are those of the test environment; that they are declared, scripts/demo.sh shows.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-test test,lint,docs
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
pip=("$work/env/bin/python" -m pip install -qq --disable-pip-version-check -c constraints.txt)
"${pip[@]}" build
mkdir "$work/tree"
git archive --format=tar HEAD | tar -x -C "$work/tree" # nothing that lies about goes in
"$work/env/bin/python" -m build --outdir "$work/dist" "$work/tree" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
if tar -tf "$work"/dist/*.tar.gz | grep -E '/(tests|scripts|launch|\.ci)/|\.(pyc|so)$'; then
  echo "wheel.sh: the source archive holds what no user needs" >&2
  exit 1
fi
tar -tf "$work"/dist/*.tar.gz | grep '/dist_export/kernels/src/duplicates\.c$' >/dev/null # not -q, which ends tar
# With a compiler the wheel has the library and the name of the platform; without one it runs everywhere, with numpy.
if command -v "${CC:-cc}" >/dev/null; then expected='py3-none-linux_*' kernels=compiled; else expected='py3-none-any' kernels=numpy; fi
# shellcheck disable=SC2206,SC2086 # a pattern
wheels=("$work"/dist/dist_export-*-$expected.whl)
[[ -f ${wheels[0]} ]] || { ls "$work/dist" >&2; echo "wheel.sh: no wheel is named $expected" >&2; exit 1; }
"${pip[@]}" --no-deps "${wheels[0]}"
site=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
.venv-test/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"
cd "$work" # not in the repository, whose folder would be imported in place of the wheel
"$work/env/bin/dist_export" --version
DIST_EXPORT_KERNELS=$kernels "$work/env/bin/dist_export" --version | grep "^kernels: $kernels"
"$work/env/bin/dist_export" --help >/dev/null
"$work/env/bin/python" - <<'PYTHON'
import os
import dist_export

folder = os.path.dirname(dist_export.__file__)
assert folder.startswith(os.path.realpath("env")) or folder.startswith(os.path.abspath("env")), folder
assert os.path.exists(os.path.join(folder, "py.typed"))
assert os.path.exists(os.path.join(folder, "report", "page.js"))
PYTHON
