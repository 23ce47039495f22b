#!/usr/bin/env bash
# Build the documentation site into docs/_build. A warning is an error, and so is a link to nothing.
# usage: scripts/docs.sh [OPTIONS OF sphinx-build]
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
scripts/make_env.sh .venv-test test,lint,docs
.venv-test/bin/python -m sphinx -W --keep-going -n -E -b html "$@" docs docs/_build
# No page may load a script, a font or a picture from elsewhere: the site must work where nothing else can be reached.
if grep -rlE '<(script|link|img|iframe|source)[^>]*(src|href)="(https?:)?//' docs/_build --include='*.html' ||
  grep -rlE '(url\(|@import )["'\'']?(https?:)?//' docs/_build/_static --include='*.css'; then
  echo "these pages load something from elsewhere" >&2
  exit 1
fi
