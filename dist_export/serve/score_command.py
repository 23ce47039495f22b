"""The command ``score``: what it needs, and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_export.errors import ConfigError
from dist_export.package.reader import open_package
from dist_export.reporting.printing import print_lines
from dist_export.reporting.terminal_display import counting_rows
from dist_export.serve.options import SCORE_OPTIONS, SCORE_USAGE
from dist_export.serve.score_file import score_file

USAGE = {"score": SCORE_USAGE}
OPTIONS = {"score": SCORE_OPTIONS}
NAMES = {"score": ("path",)}


def run(_: str, arguments: Mapping[str, Any]) -> None:
    """Score the rows of a file, and print how many. ConfigError if a file is not named; others as of the package."""
    for name in ("input", "output"):
        if arguments[name] is None:
            raise ConfigError(f"--{name} is missing; give a file")
    opening = {name: arguments[name] for name in ("storage_options", "registry_options", "cache_dir", "base")}
    scoring = {name: arguments[name] for name in ("batch_size", "keep")}
    with open_package(arguments["path"], **opening) as package, counting_rows() as note_rows:
        total = score_file(package, arguments["input"], arguments["output"], note_rows=note_rows, **scoring)
    print_lines([f"{arguments['output']}: {total:,} rows scored"])
