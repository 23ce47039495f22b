"""Write docs/reference/manifest.schema.json from the manifest's own types: python -m scripts.docs.schema [--check]."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec

from dist_export.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "docs" / "reference" / "manifest.schema.json"


def render() -> str:
    """Return the JSON schema (draft 2020-12) of ``manifest.json``."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "manifest.json of dist_export"}
    return json.dumps(schema | msgspec.json.schema(Manifest), indent=1, sort_keys=True) + "\n"


def main() -> int:
    """Write the schema, or say with ``--check`` whether it is what it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the file is not up to date")
    is_check = parser.parse_args().check
    text = render()
    if not is_check:
        FILE.write_text(text)
    elif not FILE.is_file() or FILE.read_text() != text:
        print(f"{FILE.relative_to(ROOT)} is not up to date; run python -m scripts.docs.schema", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
