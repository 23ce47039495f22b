"""Check that the blocks of a directory form complete tables: equal lengths of slots, matching slices, unique names."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from dist_export.formats.dtypes import DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT, TENSORKEY
from dist_export.verify.blocks import Blocks
from dist_export.verify.report import Report

RECIS_SIZE = 65536
"""The slice size that all of RecIS's Python layer uses."""
_MAX_RECIS_ROWS = (1 << 31) - 1
"""RecIS counts the rows of a table on a rank in 32-bit integers."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FoundParts:
    """The parts of all tables: parallel columns, ordered by table and slice."""

    part: np.ndarray
    """int64 by row of the blocks: the part of a hash table's block; -1 for other blocks."""
    id_row: np.ndarray
    """int64: the row of the part's id block; -1 if there is none, or if blocks of two parts cannot be told apart."""
    table: np.ndarray
    """int64"""
    is_disjoint: np.ndarray
    """bool by table: whether no id can be in the slices of two of its parts."""


def check_parts(blocks: Blocks, report: Report, *, must_cover: bool) -> FoundParts:
    """Check kinds, lengths, names and slices of all blocks of hash tables.

    Args:
        blocks: all blocks. Blocks of row-indexed tables are not checked, because they have neither ids nor slices of ids.
        report: gets the findings.
        must_cover: whether a gap between slices is a finding. A checkpoint may omit a part without rows.
    """
    rows = np.flatnonzero((blocks.stem >= 0) & ~blocks.is_row_indexed)
    num_slices = max(len(blocks.slices), 1)
    by_value = np.lexsort(blocks.slices.T[::-1]) if len(blocks.slices) else np.zeros(0, np.int64)
    rank = np.empty(len(by_value), np.int64)
    rank[by_value] = np.arange(len(by_value))
    group = blocks.table[rows].astype(np.int64) * num_slices + rank[blocks.slice[rows]]
    groups, number = np.unique(group, return_inverse=True)
    part = np.full(len(blocks), -1, np.int64)
    part[rows] = number
    table = groups // num_slices
    edges = blocks.slices[by_value[groups % num_slices]] if len(groups) else np.zeros((0, 3), np.int64)

    is_sound = _check_kinds(blocks, rows, report)
    is_shared = _check_names(blocks, rows, number, len(groups), report)
    id_row = np.full(len(groups), -1, np.int64)
    is_id = blocks.is_slot(ID_SLOT)[rows] & is_sound
    id_row[number[is_id]] = rows[is_id]
    id_row[is_shared] = -1
    _check_lengths(blocks, rows[is_sound], number[is_sound], id_row, report)
    if blocks.is_whole:
        _check_complete(blocks, rows, number, table, edges, id_row, is_shared, report)
    is_disjoint = _check_slices(blocks, table, edges, report, must_cover=must_cover)
    twice = table[is_shared]
    is_disjoint[twice] = False
    return FoundParts(part=part, id_row=id_row, table=table, is_disjoint=is_disjoint)


def _check_kinds(blocks: Blocks, rows: np.ndarray, report: Report) -> np.ndarray:
    """Return which blocks have a possible dtype and shape for their slot (bool). Report others, and slots that differ by part."""
    stem = blocks.stem[rows]
    known = np.full(len(blocks.stems), -1, np.int64)
    known[stem[::-1]] = rows[::-1]  # the first block of each table and slot
    known = known[stem]
    is_flat = np.array([not shape for shape in blocks.inner_shapes] + [False], bool)[blocks.inner[rows]]
    is_id, is_embedding = blocks.is_slot(ID_SLOT)[rows], blocks.is_slot(EMBEDDING_SLOT)[rows]
    is_wrong = blocks.rows[rows] < 0
    is_wrong |= is_id & ~((blocks.dtype[rows] == I64) & is_flat)
    is_wrong |= is_embedding & is_flat
    is_other = (blocks.dtype[rows] != blocks.dtype[known]) | (blocks.inner[rows] != blocks.inner[known])
    for row in rows[is_wrong].tolist():
        wanted = (
            "I64 [rows]" if blocks.stems[blocks.stem[row]][1] == ID_SLOT else "[rows, ...], and embeddings [rows, dim]"
        )
        report.add(blocks.file_of(row), "shape", f"{blocks.key(row)!r} is {_kind(blocks, row)}; expected {wanted}")
    for row, first in zip(rows[is_other & ~is_wrong].tolist(), known[is_other & ~is_wrong].tolist(), strict=True):
        report.add(
            blocks.file_of(row),
            "shape",
            f"{blocks.key(row)!r} is {_kind(blocks, row)}, but {blocks.key(first)!r} of the same table and slot is "
            f"{_kind(blocks, first)}",
        )
    for row in rows[blocks.rows[rows] > _MAX_RECIS_ROWS].tolist():
        report.note(
            blocks.file_of(row),
            "shape",
            f"{blocks.key(row)!r} has more rows than the 32 bits in which RecIS counts them",
        )
    is_sound: np.ndarray = ~is_wrong
    return is_sound


def _kind(blocks: Blocks, row: int) -> str:
    return f"{DTYPES[blocks.dtype[row]].name} {list(blocks.shape(row))}"


def _check_names(blocks: Blocks, rows: np.ndarray, number: np.ndarray, num_parts: int, report: Report) -> np.ndarray:
    """Return which parts have two blocks for one slot (bool). Report internal names that are not unique."""
    num_stems = max(len(blocks.stems), 1)
    slot = number * num_stems + blocks.stem[rows]
    order = np.argsort(slot, kind="stable")
    is_twice = np.flatnonzero(slot[order][1:] == slot[order][:-1])
    is_shared = np.zeros(num_parts, bool)
    is_shared[number[order[is_twice]]] = True
    for place in is_twice.tolist():
        first, row = int(rows[order[place]]), int(rows[order[place + 1]])
        if blocks.text[first] == blocks.text[row]:
            report.add(
                TENSORKEY,
                "twice",
                f"{blocks.key(row)!r} and {blocks.key(first)!r} are one block {blocks.internal(row)!r}; RecIS keeps one "
                "and loses the rows of the other without a word",
            )
        else:
            report.note(
                TENSORKEY,
                "twice",
                f"{blocks.key(row)!r} and {blocks.key(first)!r} are one block {blocks.internal(row)!r} in two spellings",
            )
    return is_shared


def _check_lengths(blocks: Blocks, rows: np.ndarray, number: np.ndarray, id_row: np.ndarray, report: Report) -> None:
    its_ids = id_row[number]
    is_known = its_ids >= 0
    rows, its_ids = rows[is_known], its_ids[is_known]
    is_wrong = blocks.rows[rows] != blocks.rows[its_ids]
    for row, ids in zip(rows[is_wrong].tolist(), its_ids[is_wrong].tolist(), strict=True):
        report.add(
            blocks.file_of(row),
            "rows",
            f"{blocks.key(row)!r} has {blocks.rows[row]:,} rows, but {blocks.key(ids)!r} has {blocks.rows[ids]:,} ids; "
            "RecIS's reader does not see that and takes other bytes for rows",
        )


def _check_complete(
    blocks: Blocks,
    rows: np.ndarray,
    number: np.ndarray,
    table: np.ndarray,
    edges: np.ndarray,
    id_row: np.ndarray,
    is_shared: np.ndarray,
    report: Report,
) -> None:
    """Report parts without ids, and parts with rows that lack a slot which other parts of the table have."""
    slots_of_table: list[list[int]] = [[] for _ in blocks.tables]
    numbers = {name: place for place, name in enumerate(blocks.tables)}
    present = np.flatnonzero(np.bincount(blocks.stem[rows])).tolist()
    for stem in present:
        slots_of_table[numbers[blocks.stems[stem][0]]].append(stem)
    for place, stems in enumerate(slots_of_table):
        names = {blocks.stems[stem][1] for stem in stems}
        if stems and EMBEDDING_SLOT not in names:
            row = int(rows[blocks.table[rows] == place][0])
            report.add(blocks.file_of(row), "slots", f"table {blocks.tables[place]!r} has no {EMBEDDING_SLOT} block")
    num_slots = np.array([len(stems) for stems in slots_of_table] + [0], np.int64)[table]
    held = np.bincount(number, minlength=len(table))
    has_no_ids = np.bincount(number, weights=blocks.is_slot(ID_SLOT)[rows], minlength=len(table)) == 0
    rows_of_part = np.where(id_row >= 0, blocks.rows[id_row], 0)
    is_row_indexed = (held == 1) & (num_slots > 1) & ~has_no_ids
    is_shared = np.isin(table, table[is_shared])  # the missing block of one part may have the name of another part
    doubtful = has_no_ids | is_row_indexed | ((held < num_slots) & (rows_of_part > 0))
    for part in np.flatnonzero(doubtful & ~is_shared).tolist():
        its_rows = rows[number == part]
        file = blocks.file_of(int(its_rows[0]))
        what = f"the part of table {blocks.tables[table[part]]!r} with slice {edges[part][0]}:{edges[part][1]}"
        if has_no_ids[part]:
            report.add(file, "slots", f"{what} has no {ID_SLOT} block; RecIS's loader refuses the table")
            continue
        here = set(blocks.stem[its_rows].tolist())
        absent = ", ".join(blocks.stems[stem][1] for stem in slots_of_table[table[part]] if stem not in here)
        more = (
            "RecIS leaves these rows with whatever is in memory"
            if len(here) > 1
            else "RecIS's loader refuses the table"
        )
        report.add(
            file, "slots", f"{what} has {rows_of_part[part]:,} ids but no {absent}, which other parts have; {more}"
        )


def _check_slices(
    blocks: Blocks, table: np.ndarray, edges: np.ndarray, report: Report, *, must_cover: bool
) -> np.ndarray:
    """Return by table whether its slices are disjoint and of one size. Report sizes, gaps and overlaps."""
    is_disjoint = np.ones(len(blocks.tables), bool)
    starts = np.searchsorted(table, np.arange(len(blocks.tables) + 1)).tolist()
    begins, ends, sizes = (edges[:, column] for column in range(3))
    odd_sizes: dict[int, int] = {}
    for number, name in enumerate(blocks.tables):
        its = slice(starts[number], starts[number + 1])
        size = sizes[its]
        if not len(size):
            continue
        if (size != size[0]).any():
            is_disjoint[number] = False
            found = ", ".join(map(str, sorted(set(size.tolist()))[:4]))
            report.add(
                TENSORKEY,
                "slices",
                f"table {name!r} has slices of sizes {found}; RecIS's loader takes rows of one size only",
            )
            continue
        if size[0] != RECIS_SIZE:
            odd_sizes.setdefault(int(size[0]), number)
        reached = np.maximum.accumulate(ends[its])
        begin = begins[its]
        overlap = np.flatnonzero(begin[1:] < reached[:-1])
        if len(overlap):
            is_disjoint[number] = False
            at = int(overlap[0]) + 1
            report.note(
                TENSORKEY,
                "slices",
                f"slices of table {name!r} overlap, first at {begin[at]}; a row may be in either part",
            )
        gaps = np.flatnonzero(np.append(begin, size[0]) > np.insert(reached, 0, 0))
        if len(gaps) and blocks.is_whole:
            at = int(np.insert(reached, 0, 0)[gaps[0]])
            tell = report.add if must_cover else report.note
            tell(
                TENSORKEY, "slices", f"no part of table {name!r} has the slice from {at} on; ids of there have no shard"
            )
    for odd_size, number in odd_sizes.items():
        report.note(
            TENSORKEY,
            "slices",
            f"table {blocks.tables[number]!r} has slices of size {odd_size}; RecIS's own are of {RECIS_SIZE}, and a loader of "
            "another size finds no rows without a word",
        )
    return is_disjoint


def check_prefixes(blocks: Blocks, report: Report) -> None:
    """Report names that RecIS 1.0's CheckpointReader confuses, because it finds blocks by the beginning of their names."""
    names = sorted(
        {f"{table}@{slot}" for table, slot in blocks.stems}
        | {blocks.key(row).removesuffix("^ ") for row in np.flatnonzero(blocks.stem == -1).tolist()}
    )
    pairs = [(a, b) for a, b in itertools.pairwise(names) if b.startswith(a)]
    if pairs:
        report.note(
            TENSORKEY,
            "prefix",
            f"{pairs[0][0]!r} begins the name {pairs[0][1]!r} ({len(pairs)} pairs of names like that): the CheckpointReader of "
            "RecIS before 2025-11-03 returns both for the first; its Loader does not",
        )
