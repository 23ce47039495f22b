"""The command ``diff``: its options, and what it compares."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from dist_export.checkpoint.detect import AUTO, detect_format
from dist_export.config.byte_sizes import parse_bytes
from dist_export.config.describe import SETTINGS, Option
from dist_export.config.loader import PATH_OPTIONS, SOURCE_OPTIONS
from dist_export.diff.compare import diff, open_compared
from dist_export.diff.entries import PackageDiff
from dist_export.errors import ConfigError, DistExportError, UserError
from dist_export.manifest import MANIFEST
from dist_export.registry.base import resolve
from dist_export.runtime.ranks import Ranks
from dist_export.storage.urls import open_place

USAGE = (
    "usage: dist_export diff A B [--key value ...]\n\nCompare two packages: rows, dense parameters, inputs, outputs, and "
    "scores of A's sample. A delta package is compared with the rows of its base. One of the two may be a checkpoint: then rows "
    "and dense parameters are compared, and no scores. Exit code 0: serving gets the same from both; 1: not the same; 2: one "
    "cannot be read. Under torchrun the ranks share the rows."
)
OPTIONS = {
    **PATH_OPTIONS,
    "base_a": Option(
        hint=str | None,
        default=None,
        text="Where the base of A is, if A is a delta package. Null looks where it was at the export, and beside A.",
    ),
    "base_b": Option(hint=str | None, default=None, text="The same of B."),
    **SOURCE_OPTIONS,
    **{name: SETTINGS[name] for name in ("on_duplicate", "max_memory", "timeout")},
}
NAMES = ("A", "B")
_SETTINGS = ("on_duplicate", "max_memory", "storage_options")
"""Further settings with which a checkpoint is read."""


def compare(arguments: Mapping[str, Any], ranks: Ranks) -> PackageDiff:
    """Compare what ``arguments``, values of ``OPTIONS`` and ``NAMES``, name. All ranks.

    Raises as :func:`diff`; CheckpointError and PlanError for a checkpoint; UserError for two of them; ConfigError for options of
    a checkpoint without one.
    """
    paths = ranks.broadcast(
        "look for a checkpoint", lambda: {name: _find_checkpoint(arguments, name) for name in NAMES}
    )
    found = [name for name, path in paths.items() if path]
    if len(found) > 1:
        raise UserError(
            "A and B are checkpoints; export one of them, and compare its package with the other checkpoint"
        )
    if found:
        return _compare_checkpoint(arguments, ranks, found[0], paths[found[0]])
    if idle := [name for name in SOURCE_OPTIONS if arguments[name] != SOURCE_OPTIONS[name].default]:
        raise ConfigError(f"--{idle[0]} is for checkpoints, and A and B are packages")
    return diff(
        arguments["A"],
        arguments["B"],
        max_memory=parse_bytes(arguments["max_memory"], setting="max_memory"),
        ranks=ranks,
        **{name: arguments[name] for name in ("storage_options", "registry_options", "base_a", "base_b")},
    )


def _find_checkpoint(arguments: Mapping[str, Any], name: str) -> str:
    """Return where the checkpoint is, if a path is one; else an empty string. Rank 0."""
    path: str = resolve(arguments[name], arguments["registry_options"]).directory
    try:
        directory = open_place(path, arguments["storage_options"], follow_links=arguments["follow_links"])
        if directory.exists(MANIFEST):
            return ""
        asked = arguments["format"]
        return path if asked != AUTO or detect_format(directory, asked=asked) is not None else ""
    except (DistExportError, OSError):  # whoever opens it as a package says what is wrong with it
        return ""


def _compare_checkpoint(arguments: Mapping[str, Any], ranks: Ranks, name: str, path: str) -> PackageDiff:
    from dist_export.diff.checkpoint import compare_checkpoint  # two packages need nothing of an export

    other = "B" if name == "A" else "A"
    if arguments[f"base_{name.lower()}"] is not None:
        raise ConfigError(f"--base_{name.lower()} is for delta packages, and {name} is a checkpoint")
    options = {option: arguments[option] for option in ("storage_options", "registry_options")}
    given = {option: arguments[option] for option in (*SOURCE_OPTIONS, *_SETTINGS)}
    given = {option: value for option, value in given.items() if option != "treat_as_tables" or value}
    directory = open_place(path, arguments["storage_options"], follow_links=arguments["follow_links"])
    base = arguments[f"base_{other.lower()}"]
    with (
        contextlib.ExitStack() as held,
        ranks.run(f"open {other}", lambda: open_compared(arguments[other], base, **options, held=held)) as package,
    ):
        return compare_checkpoint(ranks, directory, package, given, is_first=name == "A")
