"""Compare the rows of a table in two packages: run by run of B's parts, each id looked up in A.

Of deltas over one base, or of a delta and its base, only ids are read of which a delta says anything: all others are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.diff.entries import TableDiff
from dist_export.diff.layers import (
    check_sum,
    count_rows,
    has_own,
    has_shared_base,
    is_row_indexed,
    is_said,
    list_below,
    says_nothing,
)
from dist_export.errors import PackageError
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.manifest import PartEntry, SlotEntry, TableEntry
from dist_export.package.reader import Package
from dist_export.package.stored_rows import decode_rows, row_bytes_of

MOST_ROWS = 1 << 18
"""Of a run."""
COPIES = 6
"""How many times the bytes of a run are held at once: both sides, as they are stored, as values, and the difference."""


OWN, OF_BASE, OF_A, DELETED_IN_A = "own", "of_base", "of_a", "deleted_in_a"
"""Whose rows a run has: B's own; those below B that are its; A's own that B has not; ids that A deletes and B has not."""


class Run(NamedTuple):
    """Rows ``first`` to ``last`` - 1 of a part of B; or what else has to be compared."""

    table: str
    part: int
    """0 for deleted ids, in their order."""
    first: int
    last: int
    num_bytes: int
    is_same: bool
    """Whether A has the same bytes by the digests of both files: then nothing is read."""
    source: str = OWN
    layer: int = 0
    """The number of the package in ``layers`` of B."""


class RunCounts(NamedTuple):
    """What a run holds."""

    table: str
    same: int = 0
    changed: int = 0
    new: int = 0
    max_abs: float = 0.0


class PairedTable(NamedTuple):
    """A table that both packages have, and the slots whose rows can be compared."""

    a: TableEntry
    b: TableEntry
    slots: tuple[tuple[SlotEntry, SlotEntry], ...]
    others: tuple[str, ...]
    """How the slots differ."""
    not_compared: str = ""


def pair_tables(one: Package, two: Package) -> list[PairedTable]:
    """Return the tables that both packages have, in B's order."""
    by_name = {table.name: table for table in one.manifest.tables}
    return [
        _pair(
            by_name[table.name],
            table,
            is_of_one_kind=is_row_indexed(one, by_name[table.name]) == is_row_indexed(two, table),
        )
        for table in two.manifest.tables
        if table.name in by_name
    ]


def _pair(a: TableEntry, b: TableEntry, *, is_of_one_kind: bool) -> PairedTable:
    ours, theirs = ({slot.name: slot for slot in table.kept if slot.name != ID_SLOT} for table in (a, b))
    others = [f"slot {name!r} is only in A" for name in ours if name not in theirs]
    others += [f"slot {name!r} is only in B" for name in theirs if name not in ours]
    both = [(ours[name], theirs[name]) for name in ours if name in theirs]
    others += [
        f"slot {one.name!r} is {_say(one)} in A, {_say(two)} in B" for one, two in both if _say(one) != _say(two)
    ]
    reason = ""
    if not is_of_one_kind:
        reason = "one side has a hash table, the other a row-indexed table"
    slots = tuple(pair for pair in both if _width(pair[0]) == _width(pair[1]))
    if not slots and not reason:
        reason = "no slot has rows of one width in both"
    return PairedTable(a, b, slots, tuple(others), reason)


def _say(slot: SlotEntry) -> str:
    encoding = "" if slot.encoding is msgspec.UNSET else f" {slot.encoding}"
    return f"{slot.dtype}{encoding} {list(slot.shape)}"


def _width(slot: SlotEntry) -> tuple[int, ...]:
    """Return the shape of a row's values."""
    return slot.shape if slot.dim is msgspec.UNSET else (slot.dim,)


def cut_runs(paired: PairedTable, one: Package, two: Package, *, max_bytes: int) -> list[Run]:
    """Cut what has to be compared into runs of at most so many bytes at work."""
    width = max((row_bytes_of(slot) for pair in paired.slots for slot in pair), default=1)
    step = int(min(MOST_ROWS, max(1, max_bytes // (COPIES * (width + 8)))))
    name, above = paired.b.name, [paired.b]
    is_shared = has_shared_base(one, two)
    runs: list[Run] = []

    def cut(source: str, sizes: Sequence[int], same: Sequence[bool] = (), layer: int = 0) -> None:
        for part, rows in enumerate(sizes):
            is_same = bool(same) and same[part]
            for first in range(0, rows, max(1, rows) if is_same else step):
                last = rows if is_same else min(first + step, rows)
                runs.append(
                    Run(name, part, first, last, 0 if is_same else (last - first) * width, is_same, source, layer)
                )

    if two.is_delta or not is_shared:
        cut(OWN, [part.rows for part in paired.b.parts], _list_same(paired.b, two, paired.a, one))
    for layer, below in [] if is_shared else list_below(two, name):
        # of a part whose rows are not all B's, somebody has to count those that are
        same = _list_same(below, two.layers[layer], paired.a, one) if all(map(says_nothing, above)) else ()
        cut(OF_BASE, [part.rows for part in below.parts], same, layer)
        above.append(below)
    if one.is_delta and is_shared:
        cut(OF_A, [part.rows for part in paired.a.parts])
        cut(DELETED_IN_A, [len(one.deleted_ids(name))])
    return runs


def _list_same(theirs: TableEntry, two: Package, ours: TableEntry, one: Package) -> list[bool]:
    """Return by part of a table of B whether A has a part with the same bytes."""
    digests = [{file.path: file.digest for file in package.manifest.files} for package in (one, two)]
    return [any(_has_same_bytes(its, part, digests[0], digests[1]) for its in ours.parts) for part in theirs.parts]


def _has_same_bytes(a: PartEntry, b: PartEntry, digests_a: dict[str, str], digests_b: dict[str, str]) -> bool:
    digest = digests_a.get(a.file, "")
    return bool(digest) and digest == digests_b.get(b.file) and (a.slice, a.keys) == (b.slice, b.keys)


def compare_runs(a: Package, b: Package, pairs: dict[str, PairedTable], runs: Iterable[Run]) -> list[RunCounts]:
    """Return what each run holds. PackageError if a package is damaged or was replaced."""
    return [
        RunCounts(run.table, same=run.last - run.first) if run.is_same else _compare_run(a, b, pairs[run.table], run)
        for run in runs
    ]


def _compare_run(a: Package, b: Package, paired: PairedTable, run: Run) -> RunCounts:
    if run.source == DELETED_IN_A:
        ids = a.deleted_ids(run.table)[run.first : run.last]
        ids = ids[~has_own(b, run.table, ids)]
        return RunCounts(
            run.table, new=int(np.count_nonzero(b.lookup(run.table, ids, slot=paired.slots[0][1].name, raw=True)[1]))
        )
    has_row = is_in_b = np.zeros(0, bool)
    is_changed = np.zeros(run.last - run.first, bool)
    max_abs = 0.0
    for ours, theirs in paired.slots:
        found, rows, has_row, is_in_b = _read_both(a, b, run, ours.name, theirs.name)
        is_other, most = compare_slot(found, rows, ours, theirs, has_row & is_in_b)
        is_changed |= is_other
        max_abs = max(max_abs, most)
    num_rows, num_changed = int(np.count_nonzero(is_in_b)), int(np.count_nonzero(is_changed))
    num_new = int(np.count_nonzero(is_in_b & ~has_row))
    return RunCounts(run.table, num_rows - num_new - num_changed, num_changed, num_new, max_abs)


def _read_both(
    a: Package, b: Package, run: Run, ours: str, theirs: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the rows of A and B for a run, as they are stored, which A has (bool), and which are B's to compare (bool)."""
    if run.source == OF_A:
        ids, found = a.read_run(run.table, run.part, run.first, run.last, slot=ours)
        rows, is_in_b = b.lookup(run.table, ids, slot=theirs, raw=True)
        return found, rows, np.ones(len(ids), bool), is_in_b & ~has_own(b, run.table, ids)
    if run.source == OF_BASE:
        ids, rows = b.layers[run.layer].read_run(run.table, run.part, run.first, run.last, slot=theirs)
        is_in_b = ~np.any([is_said(above, run.table, ids) for above in b.layers[: run.layer]], axis=0)
    else:
        ids, rows = b.read_run(run.table, run.part, run.first, run.last, slot=theirs)
        is_in_b = np.ones(len(ids), bool)
    found, has_row = a.lookup(run.table, ids, slot=ours, raw=True)
    return found, rows, has_row, is_in_b


def compare_slot(
    found: np.ndarray, rows: np.ndarray, ours: SlotEntry, theirs: SlotEntry, has_row: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return which rows differ (bool, (n,)), and the largest change. Rows of one dtype are compared by their bytes."""
    if _say(ours) == _say(theirs):
        is_other = (found != rows).any(axis=1) & has_row if rows.shape[1] else np.zeros(len(rows), bool)
        if not is_other.any():
            return is_other, 0.0
        before, after = (decode_rows(side[is_other], slot) for side, slot in ((found, ours), (rows, theirs)))
        return is_other, largest_change(before, after)
    before, after = (decode_rows(side, slot) for side, slot in ((found, ours), (rows, theirs)))
    is_equal = (before == after) | ((before != before) & (after != after))  # noqa: PLR0124 -- NaN
    is_other = ~is_equal.reshape(len(rows), -1).all(axis=1) & has_row
    return is_other, largest_change(before[is_other], after[is_other])


def largest_change(before: np.ndarray, after: np.ndarray) -> float:
    """Return the largest difference of values that are finite on both sides."""
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(before.astype(np.float64) - after.astype(np.float64))
    return float(np.max(apart, initial=0.0, where=np.isfinite(apart)))


def add_counts(
    a: Package, b: Package, pairs: Sequence[PairedTable], counts: Iterable[RunCounts]
) -> tuple[TableDiff, ...]:
    """Return what is found of each table, A's own tables last."""
    sums = {paired.b.name: [0, 0, 0] for paired in pairs}
    largest = dict.fromkeys(sums, 0.0)
    for count in counts:
        sums[count.table] = [one + two for one, two in zip(sums[count.table], count[1:4], strict=True)]
        largest[count.table] = max(largest[count.table], count.max_abs)
    by_name = {paired.b.name: paired for paired in pairs}
    is_shared = has_shared_base(a, b)
    found = []
    for table in b.manifest.tables:
        paired = by_name.get(table.name)
        if paired is None:
            found.append(TableDiff(name=table.name, new=count_rows(table), slots=("the table is only in B",)))
        elif paired.not_compared:
            found.append(
                TableDiff(
                    name=table.name,
                    deleted=count_rows(paired.a),
                    new=count_rows(table),
                    slots=paired.others,
                    not_compared=paired.not_compared,
                )
            )
        else:
            same, changed, new = sums[table.name]
            same += check_sum(b, table, same + changed + new, is_whole=not is_shared)
            deleted = count_rows(paired.a) - same - changed
            if deleted < 0:
                raise PackageError(
                    f"{b.directory.url}: table {table.name!r} has ids that stand twice; `verify` names them"
                )
            found.append(
                TableDiff(
                    name=table.name,
                    same=same,
                    changed=changed,
                    new=new,
                    deleted=deleted,
                    max_abs=largest[table.name],
                    slots=paired.others,
                    default_row=_has_other_default(a, b, table.name),
                )
            )
    names = {table.name for table in b.manifest.tables}
    return (
        *found,
        *(
            TableDiff(name=table.name, deleted=count_rows(table), slots=("the table is only in A",))
            for table in a.manifest.tables
            if table.name not in names
        ),
    )


def _has_other_default(a: Package, b: Package, name: str) -> bool:
    rows = []
    for package in (a, b):
        slot = next((one for one in package.table(name).kept if one.name == EMBEDDING_SLOT), None)
        rows.append(None if slot is None else decode_rows(package.default_row(name)[None], slot))
    if rows[0] is None or rows[1] is None:
        return rows[0] is not rows[1]
    if rows[0].dtype == rows[1].dtype:
        return (rows[0].shape, rows[0].tobytes()) != (rows[1].shape, rows[1].tobytes())
    return not np.array_equal(rows[0], rows[1], equal_nan=True)  # rows of two dtypes are compared by their values, too
