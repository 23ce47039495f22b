"""Cut rows into segments: byte ranges if they are stored as they are written, else gathers. Pure.

If all rows of a part go to one target, its slots are copied as byte ranges, whatever its slice is. A part is gathered if
its rows go to several targets, or if some of them are dropped or pruned. Merging shards therefore copies byte ranges.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, Parts, SlotMeta
from dist_export.plan.census import Census
from dist_export.plan.gathers import Gathers, join_gathers
from dist_export.plan.plan import Copies, SparsePlan


def plan_segments(plan: SparsePlan, census: Census) -> tuple[list[np.ndarray], Gathers]:
    """Return the byte ranges, int64 (5, n), and the gathers that move the rows of a census of kept rows.

    A byte range is a column of file, offset, source file, source offset and number of bytes.
    """
    parts, source = plan.checkpoint.parts, plan.checkpoint.blocks
    segments: list[np.ndarray] = []
    gathers: list[Gathers] = []
    table_of_run = parts.table[census.part] if len(census.part) else np.zeros(0, np.int64)
    for table in range(len(plan.checkpoint.tables)):
        first, last = np.searchsorted(table_of_run, [table, table + 1])
        part, granule, target, rows = (
            column[first:last] for column in (census.part, census.granule, census.target, census.rows)
        )
        if not len(part):
            continue
        base = _rows_before(target, rows)
        is_ordered = not plan.checkpoint.tables[table].is_hashed  # then the rows of a run are neighbours
        ranges, split = _tell_ranges(parts, part, target, rows, is_ordered=is_ordered)
        # the first row of a range in its part, and its rows. A whole part is one range, though it may have several runs
        begin = _rows_before(part, rows)[ranges]
        num_rows = rows[ranges] if is_ordered else parts.rows[part[ranges]]
        by_rows: dict[int, list[int]] = {}
        for slot in plan.slots_of(table):
            is_plain = _is_copied(plan.checkpoint, table, slot, part[ranges])
            chosen = ranges[is_plain]
            block = plan.blocks_of(table, slot.column)[target[chosen]]
            segments.append(
                np.stack(
                    [
                        plan.blocks.file[block],
                        plan.blocks.offset[block] + base[chosen] * slot.row_bytes,
                        source.file[part[chosen], slot.column],
                        source.offset[part[chosen], slot.column] + begin[is_plain] * slot.row_bytes,
                        num_rows[is_plain] * slot.row_bytes,
                    ]
                )
            )
            for number in np.unique(part[ranges[~is_plain]]).tolist():
                by_rows.setdefault(number, []).append(slot.column)
        every = [slot.column for slot in plan.slots_of(table)]
        by_rows |= dict.fromkeys(np.unique(part[split]).tolist(), every)
        moved = np.flatnonzero(np.isin(part, np.array(list(by_rows), np.int64)))
        edges = np.flatnonzero(np.diff(part[moved], prepend=-1) | np.diff(granule[moved], prepend=-1))
        number, first_row = part[moved[edges]], granule[moved[edges]] * census.granule_rows
        columns = tuple(dict.fromkeys(tuple(chosen) for chosen in by_rows.values()))
        columns_of_part = {of_part: columns.index(tuple(chosen)) for of_part, chosen in by_rows.items()}
        gathers.append(
            Gathers(
                part=number,
                first_row=first_row,
                num_rows=np.minimum(census.granule_rows, parts.rows[number] - first_row),
                columns=columns,
                columns_of=np.array([columns_of_part[of_part] for of_part in number.tolist()], np.int64),
                bounds=np.append(edges, len(moved)),
                targets=target[moved],
                counts=rows[moved],
                first_target_rows=base[moved],
            )
        )
    return segments, join_gathers(gathers)


def _tell_ranges(
    parts: Parts, part: np.ndarray, target: np.ndarray, rows: np.ndarray, *, is_ordered: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return which runs of a table's census begin a byte range, and which are gathered row by row."""
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    num_runs = np.diff(np.append(starts, len(part)))
    is_whole = np.add.reduceat(rows, starts) == parts.rows[part[starts]]
    if not is_ordered:
        is_whole &= np.minimum.reduceat(target, starts) == np.maximum.reduceat(target, starts)
    is_range = np.repeat(is_whole, num_runs)
    return np.flatnonzero(is_range) if is_ordered else starts[is_whole], np.flatnonzero(~is_range)


def _is_copied(checkpoint: Checkpoint, table: int, slot: SlotMeta, part: np.ndarray) -> np.ndarray:
    """Return for each of these parts (bool) whether the source stores the rows of a slot as they are written."""
    if slot != checkpoint.tables[table].slots[slot.column] or checkpoint.memory is not None:
        return np.zeros(len(part), bool)
    is_copied: np.ndarray = checkpoint.blocks.file[part, slot.column] >= 0
    return is_copied


def _rows_before(target: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return for each run the number of rows that earlier runs put into the same target."""
    order = np.argsort(target, kind="stable")
    sums = np.cumsum(rows[order]) - rows[order]
    first_of_target = np.flatnonzero(np.diff(target[order], prepend=-1))
    lengths = np.diff(np.append(first_of_target, len(order)))
    before = np.empty_like(rows)
    before[order] = sums - np.repeat(sums[first_of_target], lengths)
    return before


def join_ranges(segments: Sequence[np.ndarray]) -> Copies:
    """Sort byte ranges by file and offset in the output, and join ranges that are neighbours on both sides."""
    columns = np.concatenate([np.zeros((5, 0), np.int64), *segments], axis=1)
    columns = columns[:, columns[4] > 0]
    columns = columns[:, np.lexsort((columns[1], columns[0]))]
    file, offset, source_file, source_offset, num_bytes = columns
    is_first = np.ones(len(file), bool)
    is_first[1:] = (
        (file[1:] != file[:-1])
        | (source_file[1:] != source_file[:-1])
        | (offset[1:] != offset[:-1] + num_bytes[:-1])
        | (source_offset[1:] != source_offset[:-1] + num_bytes[:-1])
    )
    starts = np.flatnonzero(is_first)
    return Copies(
        file=file[starts],
        offset=offset[starts],
        source_file=source_file[starts],
        source_offset=source_offset[starts],
        num_bytes=np.add.reduceat(num_bytes, starts) if len(starts) else num_bytes,
    )
