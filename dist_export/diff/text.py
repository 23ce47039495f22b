"""Render a comparison of two packages for people."""

from __future__ import annotations

from dist_export.diff.entries import DenseDiff, PackageDiff, TableDiff
from dist_export.humanize import count, few


def render_diff(found: PackageDiff) -> list[str]:
    """Return the comparison line by line."""
    lines = [f"A {found.a}", f"B {found.b}"]
    if found.is_equal:
        rows = sum(table.same for table in found.tables)
        what = "both have the same rows" if found.not_compared else "serving gets the same from both"
        lines.append(f"equal: {what} ({count(len(found.tables), 'table')}, {count(rows, 'row')})")
    lines += [line for table in found.tables if not table.is_equal for line in _render_table(table)]
    equal = [table for table in found.tables if table.is_equal]
    if equal and not found.is_equal:
        others = f"{count(len(equal), 'other table')} {'is' if len(equal) == 1 else 'are'} equal"
        lines.append(others if len(equal) < len(found.tables) else "all tables are equal")
    lines += [*_render_dense(found.dense), *found.others]
    scores = found.scores
    if any(scores.max_abs.values()):
        told = ", ".join(f"{name} by up to {value:.3g}" for name, value in scores.max_abs.items() if value)
        lines.append(f"scores of A's sample differ: {told}")
    lines += (
        [f"scores of A's sample have another shape, or are finite elsewhere: {few(list(scores.odd))}"]
        if scores.odd
        else []
    )
    if scores.not_compared and found.dense != DenseDiff():
        lines.append(f"scores were not compared: {scores.not_compared}")
    lines += [found.not_compared] if found.not_compared else []
    lines += [f"{name}: {one} in A, {two} in B" for name, (one, two) in found.settings.items()]
    return lines


def _render_table(table: TableDiff) -> list[str]:
    if table.not_compared:
        return [
            f"table {table.name}: {table.not_compared}; {table.deleted:,} rows in A, {table.new:,} in B",
            *_indent(table),
        ]
    change = f" by up to {table.max_abs:.3g}" if table.changed else ""
    told = (
        f"table {table.name}: {table.same:,} rows are the same, {table.changed:,} changed{change}, {table.new:,} are new, "
        f"{table.deleted:,} are deleted"
    )
    return [told, *_indent(table)]


def _indent(table: TableDiff) -> list[str]:
    told = [*table.slots, *(["the row of out-of-vocabulary ids differs"] if table.default_row else [])]
    return [f"  {text}" for text in told]


def _render_dense(dense: DenseDiff) -> list[str]:
    lines = []
    if dense.changed:
        worst = max(dense.changed, key=lambda name: dense.changed[name])
        lines.append(
            f"dense arch: {dense.same:,} parameters are the same, {len(dense.changed):,} changed, {worst} most, by up to "
            f"{dense.changed[worst]:.3g}"
        )
    for names, side in ((dense.only_in_a, "A"), (dense.only_in_b, "B")):
        if names:
            lines.append(f"dense arch: {few(list(names))} only in {side}")
    return lines + [f"dense arch: {text}" for text in dense.others]
