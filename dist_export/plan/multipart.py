"""Cut output files into the parts of an upload to S3: bytes that come from here, and ranges that the store itself copies. Pure.

A part has 5 MiB at least, but for the last of a file, and a file has 10,000 parts at most (Amazon's S3 API reference,
"Multipart upload limits"). The layout of a shard puts blocks first that hold no copied run as long as that, on every
storage (:func:`find_large`): so header and small runs fill one part together, and the bytes are the same everywhere.
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
"""Of one copy within the store: several at a time are faster than a long one, which may have 5 GiB."""
_MOST_GRID_BYTES = 64 << 20
"""A part may not reach over the end of a unit of work, which is a run of chunks of so many bytes."""


class Part(NamedTuple):
    """Bytes ``begin`` to ``end`` of an output file; where the store copies them, from a byte of a source file on."""

    begin: int
    end: int
    source_file: int = -1
    """-1 for bytes that are sent from here."""
    source_offset: int = 0

    @property
    def is_remote(self) -> bool:
        """Whether the store copies it."""
        return self.source_file >= 0


@dataclass(frozen=True, slots=True)
class FileParts:
    """The parts of one file, in order; numbered from 1 in an upload."""

    parts: tuple[Part, ...]
    has_remote: bool
    """Whether the store copies any of them; then each part has a digest of its own."""
    is_built: bool = False
    """Whether gathered rows fall into it: then what is sent from here is put together on a disk first."""


def plan_parts(plan: SparsePlan, *, part_bytes: int, may_copy: bool) -> dict[int, FileParts]:
    """Return the parts of each output file, but for those that are built on a disk as a whole before they go up.

    Those are files that gathered rows fall into and of which the store can copy nothing.

    Args:
        plan: of the export.
        part_bytes: of a part that is sent from here, 8 MiB at least; a part may have nearly twice as many.
        may_copy: whether source and target are one store.

    Raises:
        PlanError: a shard that is too large for an upload in parts.
    """
    gathered = _files_with_gathers(plan)
    found = {}
    for number, file in enumerate(plan.files):
        parts = _cut_remote(plan, number, part_bytes) if may_copy else None
        if parts is None and number in gathered:
            continue
        if parts is None:
            grid = _grid_bytes(file.num_bytes, part_bytes, file.name)
            starts = range(0, file.num_bytes, grid)
            parts = [Part(begin, min(begin + grid, file.num_bytes)) for begin in starts]
        has_remote = any(part.is_remote for part in parts)
        found[number] = FileParts(tuple(parts), has_remote, is_built=number in gathered)
    return found


def count_client_bytes(plan: SparsePlan, parts: dict[int, FileParts]) -> tuple[int, int]:
    """Return the bytes of shards that go through this side: read from the source, and sent to the target."""
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


def _cut_remote(plan: SparsePlan, number: int, part_bytes: int) -> list[Part] | None:
    """Return parts with the long runs copied by the store; None where there is no such run."""
    size = plan.files[number].num_bytes
    least = MIN_PART_BYTES
    while least <= size:
        parts = _cut_at(plan, number, part_bytes, least)
        if not any(part.is_remote for part in parts):
            return None
        if len(parts) <= MAX_PARTS:
            return parts
        least *= 2  # so many runs are not copied one by one: the shorter ones go through here, several in a part
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
        # what lies before the run must fill a part, if need be with bytes of the run
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


def _grid_bytes(size: int, part_bytes: int, name: str) -> int:
    while -(-size // part_bytes) > MAX_PARTS:
        part_bytes *= 2
    if part_bytes > _MOST_GRID_BYTES:
        raise PlanError(
            f"{name} would have {size:,} bytes, more than an S3 store takes in {MAX_PARTS:,} parts of "
            f"{_MOST_GRID_BYTES >> 20} MiB; raise num_shards"
        )
    return part_bytes


def _files_with_gathers(plan: SparsePlan) -> set[int]:
    found: set[int] = set()
    for gather in plan.gathers:
        table = int(plan.checkpoint.parts.table[gather.part])
        for column in gather.columns:
            found.update(plan.blocks.file[plan.blocks_of(table, column)[gather.targets]].tolist())
    return found


def find_large(
    checkpoint: Checkpoint,
    kept: Sequence[Sequence[SlotMeta]],
    census: Census,
    num_targets: Sequence[int],
) -> np.ndarray:
    """Return which blocks (bool) hold a run of bytes that a store could copy as a part of its own.

    Args:
        checkpoint: the source.
        kept: the slots that are kept, by table.
        census: of the kept rows.
        num_targets: of each table.

    The blocks are by table, slot and target, as ``SparsePlan.blocks`` has them.
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
            if meta.is_hashed:  # rows of a part that go to several targets are moved one by one
                is_whole &= np.repeat(lengths == 1, lengths)
        for slot in kept[table]:
            is_copied = is_whole & (slot == meta.slots[slot.column]) & (source.file[part, slot.column] >= 0)
            longest = np.zeros(count, np.int64)
            np.maximum.at(longest, target[is_copied], rows[is_copied] * slot.row_bytes)
            found.append(longest >= MIN_PART_BYTES)
    return np.concatenate(found)
