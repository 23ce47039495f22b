"""Cut output files into the parts of an upload to S3: bytes that a rank sends, and ranges that the store itself copies. Pure.

A part has at least 5 MiB, except the last part of a file. A file has at most 10,000 parts (Amazon's S3 API reference,
"Multipart upload limits"). The layout of a shard puts blocks without a copied run of 5 MiB first (:func:`find_large`), so
that the header and the small runs fill one part together. It does so on every storage, so that the bytes are the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta
from dist_export.errors import PlanError
from dist_export.plan.census import Census

if TYPE_CHECKING:
    from dist_export.plan.plan import SparsePlan

MIN_PART_BYTES = 5 << 20
MAX_PARTS = 10_000

_REMOTE_BYTES = 256 << 20
"""Bytes of one copy within the store. S3 allows 5 GiB, but several copies at a time are faster than a long one."""
_MOST_GRID_BYTES = 64 << 20
"""The most bytes of a part that a rank sends. A work unit is a run of chunks of this size, and no part may cross its end."""


class Part(NamedTuple):
    """Bytes ``begin`` to ``end`` of an output file. If the store copies them, they begin at a byte of a source file."""

    begin: int
    end: int
    source_file: int = -1
    """-1 for bytes that a rank sends."""
    source_offset: int = 0

    @property
    def is_remote(self) -> bool:
        """Whether the store copies this part."""
        return self.source_file >= 0


@dataclass(frozen=True, slots=True)
class FileParts:
    """The parts of one file, in order. An upload numbers them from 1."""

    parts: tuple[Part, ...]
    has_remote: bool
    """Whether the store copies any part. Then each part has its own digest."""
    is_built: bool = False
    """Whether rows are gathered into the file. Then the bytes that ranks send are built on a disk first."""


def plan_parts(
    plan: SparsePlan, *, part_bytes: int, may_copy: bool, most_parts: int = MAX_PARTS
) -> dict[int, FileParts]:
    """Return the parts of each output file, except files that are built as a whole on a disk before the upload.

    Rows are gathered into those files, and the store can copy no range of them.

    Args:
        plan: the plan of the export.
        part_bytes: size of a part that a rank sends, at least 8 MiB. A part may have nearly twice as many bytes.
        may_copy: whether source and target are in one store.
        most_parts: of an upload.

    Raises:
        PlanError: a shard that is too large for an upload in parts.
    """
    gathered = set(np.unique(plan.files_of_runs).tolist())
    found = {}
    for number, file in enumerate(plan.files):
        parts = _cut_remote(plan, number, part_bytes, most_parts) if may_copy else None
        if parts is None and number in gathered:
            continue
        if parts is None:
            grid = _grid_bytes(file.num_bytes, part_bytes, most_parts, file.name)
            starts = range(0, file.num_bytes, grid)
            parts = [Part(begin, min(begin + grid, file.num_bytes)) for begin in starts]
        has_remote = any(part.is_remote for part in parts)
        found[number] = FileParts(tuple(parts), has_remote, is_built=number in gathered)
    return found


def count_client_bytes(plan: SparsePlan, parts: dict[int, FileParts]) -> tuple[int, int]:
    """Return the bytes of shards that the ranks read from the source, and those that they send to the target."""
    header = {number: len(file.header) for number, file in enumerate(plan.files)}
    sent = read = 0
    for number, file in enumerate(plan.files):
        if number in parts and parts[number].has_remote:
            here = sum(part.end - part.begin for part in parts[number].parts if not part.is_remote)
        else:
            here = file.num_bytes
        sent += here
        read += max(0, here - header[number])
    return read, sent


def _cut_remote(plan: SparsePlan, number: int, part_bytes: int, most_parts: int) -> list[Part] | None:
    """Return parts in which the store copies the long runs; None if there is no long run, or no allowed cut."""
    size = plan.files[number].num_bytes
    least = MIN_PART_BYTES
    while least <= size:
        parts = _cut_at(plan, number, part_bytes, least)
        if not any(part.is_remote for part in parts):
            return None
        if len(parts) <= most_parts:
            return parts
        least *= 2  # too many parts: the ranks send the shorter runs, several in one part
    return None


def _cut_at(plan: SparsePlan, number: int, part_bytes: int, least: int) -> list[Part]:
    copies = plan.copies
    first, last = np.searchsorted(copies.file, [number, number + 1])
    rows = first + np.flatnonzero(copies.num_bytes[first:last] >= least)
    parts: list[Part] = []
    cursor = 0
    for row in rows.tolist():
        run_begin, run_bytes = int(copies.offset[row]), int(copies.num_bytes[row])
        end = run_begin + run_bytes
        # the bytes before the run must fill a part; if they are too few, bytes of the run are added
        begin = run_begin if run_begin == cursor else max(run_begin, cursor + MIN_PART_BYTES)
        if end - begin < MIN_PART_BYTES:
            continue
        parts += _cut_evenly(cursor, begin, max(1, (begin - cursor) // part_bytes))
        shift = int(copies.source_offset[row]) - run_begin
        source = int(copies.source_file[row])
        parts += [
            Part(part.begin, part.end, source, part.begin + shift)
            for part in _cut_evenly(begin, end, -(-(end - begin) // _REMOTE_BYTES))
        ]
        cursor = end
    size = plan.files[number].num_bytes
    return parts + _cut_evenly(cursor, size, max(1, (size - cursor) // part_bytes))


def _cut_evenly(begin: int, end: int, count: int) -> list[Part]:
    if begin == end:
        return []
    edges = [begin + (end - begin) * number // count for number in range(count + 1)]
    return [Part(*edge) for edge in itertools.pairwise(edges)]


def _grid_bytes(size: int, part_bytes: int, most_parts: int, name: str) -> int:
    while -(-size // part_bytes) > most_parts:
        part_bytes *= 2
    if part_bytes > _MOST_GRID_BYTES:
        raise PlanError(
            f"{name} would have {size:,} bytes, more than an S3 store takes in {most_parts:,} parts of "
            f"{_MOST_GRID_BYTES >> 20} MiB; raise num_shards"
        )
    return part_bytes


def find_large(
    checkpoint: Checkpoint,
    kept: Sequence[Sequence[SlotMeta]],
    census: Census,
    num_targets: Sequence[int],
) -> np.ndarray:
    """Return which blocks (bool) hold a run of bytes that a store could copy as a separate part.

    The blocks are ordered by table, slot and target, as in ``SparsePlan.blocks``.

    Args:
        checkpoint: the source.
        kept: the slots that are kept, by table.
        census: the counts of the kept rows.
        num_targets: the number of targets of each table.
    """
    found = [np.zeros(0, bool)]
    parts, source = checkpoint.parts, checkpoint.blocks
    table_of_run = parts.table[census.part] if len(census.part) else np.zeros(0, np.int64)
    for table, meta in enumerate(checkpoint.tables):
        first, last = np.searchsorted(table_of_run, [table, table + 1])
        count = num_targets[table]
        pair, place = np.unique(census.part[first:last] * count + census.target[first:last], return_inverse=True)
        rows = np.zeros(len(pair), np.int64)
        np.add.at(rows, place, census.rows[first:last])
        part, target = pair // max(count, 1), pair % max(count, 1)
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        lengths = np.diff(np.append(starts, len(part)))
        is_whole = np.zeros(len(part), bool)
        if len(starts):
            is_whole = np.repeat(np.add.reduceat(rows, starts) == parts.rows[part[starts]], lengths)
            if meta.is_hashed:  # if rows of a part go to several targets, they are gathered
                is_whole &= np.repeat(lengths == 1, lengths)
        for slot in kept[table]:
            is_copied = is_whole & (slot == meta.slots[slot.column]) & (source.file[part, slot.column] >= 0)
            longest = np.zeros(count, np.int64)
            np.maximum.at(longest, target[is_copied], rows[is_copied] * slot.row_bytes)
            found.append(longest >= MIN_PART_BYTES)
    return np.concatenate(found)
