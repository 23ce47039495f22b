"""The command ``diff``: its options, and what it compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_export.config.byte_sizes import parse_bytes
from dist_export.config.describe import SETTINGS, Option
from dist_export.config.loader import PATH_OPTIONS
from dist_export.diff.compare import diff
from dist_export.diff.entries import PackageDiff
from dist_export.runtime.ranks import Ranks

USAGE = (
    "usage: dist_export diff A B [--key value ...]\n\nCompare two packages: rows, dense parameters, inputs, outputs, and "
    "scores of A's sample. A delta package is compared with the rows of its base. Exit code 0: serving gets the same from "
    "both; 1: not the same; 2: one cannot be read. Under torchrun the ranks share the rows."
)
OPTIONS = {
    **PATH_OPTIONS,
    "base_a": Option(
        hint=str | None,
        default=None,
        text="Where the base of A is, if A is a delta package. Null looks where it was at the export, and beside A.",
    ),
    "base_b": Option(hint=str | None, default=None, text="The same of B."),
    **{name: SETTINGS[name] for name in ("max_memory", "timeout")},
}
NAMES = ("A", "B")


def compare(arguments: Mapping[str, Any], ranks: Ranks) -> PackageDiff:
    """Compare what ``arguments``, values of ``OPTIONS`` and ``NAMES``, name. All ranks. Raises as :func:`diff`."""
    return diff(
        arguments["A"],
        arguments["B"],
        max_memory=parse_bytes(arguments["max_memory"], setting="max_memory"),
        ranks=ranks,
        **{name: arguments[name] for name in ("storage_options", "registry_options", "base_a", "base_b")},
    )
