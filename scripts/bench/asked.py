"""The table of what is asked of a copy and of a gather, beside what was measured."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from scripts.bench.report import render_table


class Asked(NamedTuple):
    """The most that one rank of one thread may take, over the fastest plain copy of the same bytes."""

    work: str
    """The first word of the case."""
    contender: str
    most: dict[int, float]
    """By dim."""


_GATHERS = {64: 1.5, 16: 1.8, 8: 2.1}
ASKED = (
    Asked("filter", "1 rank, digests", {64: 1.10, 16: 1.20, 8: 1.40}),
    Asked("filter", "1 rank, no digests", {64: 1.08, 16: 1.20, 8: 1.40}),
    Asked("merge", "1 rank, digests", {64: 1.15, 16: 1.30, 8: 1.50}),
    Asked("split", "1 rank, digests", _GATHERS),
    Asked("reshard", "1 rank, digests", _GATHERS),
)


def render_asked(results: Sequence[dict[str, Any]]) -> str:
    """Return the table for the cases that were run on tmpfs, or nothing without any. ``results`` are those of ``Bench``."""
    lines = []
    for asked in ASKED:
        found = _find(results, asked)
        if found:
            cells = [f"{found[dim]:.2f} ({most:.2f})" if dim in found else "-" for dim, most in asked.most.items()]
            lines.append([f"{asked.work}, {asked.contender}", *cells])
    if not lines:
        return ""
    header = ["time / limit, median (asked)", *(f"dim {dim}" for dim in ASKED[0].most)]
    return "\n".join(
        ["\n### What is asked, tmpfs, row indexes and row fingerprints off\n", *render_table(header, lines)]
    )


def _find(results: Sequence[dict[str, Any]], asked: Asked) -> dict[int, float]:
    """Return the median over the limit by dim."""
    found = {}
    for result in results:
        dim = re.fullmatch(rf"{asked.work} \d+ -> \d+, dim (\d+)", result["case"])
        if dim is None or result["where"] != "tmpfs":
            continue
        for row in result["summary"]:
            if row["label"] == asked.contender and row["to_limit"] is not None:
                found[int(dim[1])] = row["to_limit"]["median"]
    return found
