"""The second stage of planning: every header, offset and segment of the output, from headers and the census. Pure.

A part whose rows all go to one target is moved as byte ranges, whatever its slice says; only parts whose rows part ways
and parts that leave rows behind are gathered row by row. Merging shards is thus always copying.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import xxhash

from dist_export.checkpoint.reader import Checkpoint, SlotMeta
from dist_export.errors import PlanError
from dist_export.layout.recis import DENSE_SUFFIX, key_stem, row_key_stem, shard_name
from dist_export.layout.safetensors import encode_header
from dist_export.plan.census import GRANULE_ROWS, Census, count_rows_by_target
from dist_export.plan.dropped import DroppedRows, count_kept, drop_nothing
from dist_export.plan.parts import find_large
from dist_export.plan.selection import Selection
from dist_export.plan.targets import Targets


class OutputFile(NamedTuple):
    """One shard file to be written: ``header`` (may be empty), then the payload."""

    name: str
    num_bytes: int
    header: bytes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Copies:
    """Byte ranges that go over unchanged, as parallel int64 columns, ordered by file and place there."""

    file: np.ndarray
    offset: np.ndarray
    source_file: np.ndarray
    source_offset: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.file)


class Gather(NamedTuple):
    """Rows ``first_row`` to ``first_row + num_rows`` of a part that are moved row by row.

    They go to several targets, or are dropped in part, or some of their slots do not lie as they are to be written.

    ``targets``, ``counts`` and ``first_target_rows`` (int64) are parallel: how many rows each target gets, and the row
    of the target's block where they begin. The rest of ``num_rows`` stands in ``SparsePlan.dropped``.
    """

    part: int
    first_row: int
    num_rows: int
    targets: np.ndarray
    counts: np.ndarray
    first_target_rows: np.ndarray
    columns: tuple[int, ...]
    """The slots that are moved so, as in ``SlotMeta.column``; the others of these rows go over as byte ranges."""

    @property
    def num_kept(self) -> int:
        """The rows that are moved."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OutputBlocks:
    """The blocks of all tables in the output, as parallel columns; all int64 but ``key``."""

    key: tuple[str, ...]
    file: np.ndarray
    table: np.ndarray
    column: np.ndarray
    """The slot, as in ``SlotMeta.column``; 0 is the ids."""
    target: np.ndarray
    """The part within its table, counted from 0."""
    begin: np.ndarray
    end: np.ndarray
    size: np.ndarray
    """The slice of ids that the part holds."""
    rows: np.ndarray
    offset: np.ndarray
    """Absolute position in the file, in bytes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SparsePlan:
    """All that the ranks will write. The same on every rank, whatever their number."""

    checkpoint: Checkpoint
    selection: Selection
    targets: tuple[Targets, ...]
    """Of each table; empty in a copy."""
    num_shards: int
    is_copy: bool
    files: tuple[OutputFile, ...]
    blocks: OutputBlocks
    dense_files: tuple[tuple[str, int], ...]
    """(key, file) of each dense tensor among the sparse files of the output."""
    copies: Copies
    gathers: tuple[Gather, ...]
    dropped: DroppedRows
    """Rows that no shard gets; none in a copy."""
    digest: str

    @property
    def num_bytes(self) -> int:
        """The size of all output files."""
        return sum(file.num_bytes for file in self.files)

    def slots_of(self, table: int) -> tuple[SlotMeta, ...]:
        """Return the slots of a table that are kept."""
        return self.selection.kept[table]

    @functools.cached_property
    def _rows_of_blocks(self) -> dict[tuple[int, int], np.ndarray]:
        """For each (table, slot column), where the block of each target stands in ``blocks``."""
        order = np.lexsort((self.blocks.target, self.blocks.column, self.blocks.table))
        kinds = np.stack([self.blocks.table[order], self.blocks.column[order]], axis=1)
        starts = np.flatnonzero(np.any(np.diff(kinds, axis=0, prepend=-1) != 0, axis=1))
        pieces = np.split(order, starts[1:])
        return {(int(kinds[start, 0]), int(kinds[start, 1])): rows for start, rows in zip(starts, pieces, strict=True)}

    def blocks_of(self, table: int, column: int) -> np.ndarray:
        """Return the places in ``blocks`` of one slot of a table, by target."""
        return self._rows_of_blocks[table, column]


def plan_shards(
    checkpoint: Checkpoint,
    selection: Selection,
    targets: tuple[Targets, ...],
    census: Census,
    *,
    num_shards: int | None,
    dropped: DroppedRows | None = None,
) -> SparsePlan:
    """Lay out the output shards: one file a shard, tables in source order but small runs first, dense tensors in shard 0.

    Args:
        census: of all rows of the source.
        dropped: rows that are left behind; by default none.
        num_shards: as :func:`~dist_export.plan.targets.resolve_num_shards` gives it; None for the source's slices.
    """
    count = num_shards or max((len(target.slices) for target in targets), default=1)
    dropped = dropped or drop_nothing()
    census = count_kept(checkpoint, targets, census, dropped)
    blocks = _list_blocks(checkpoint, selection, targets, count_rows_by_target(checkpoint, targets, census))
    dense = [
        (tensor.name + DENSE_SUFFIX, tensor.dtype, tensor.shape, tensor.num_bytes) for tensor in selection.kept_dense
    ]
    _refuse_one_key_twice([*blocks.key, *(entry[0] for entry in dense)])
    files: list[OutputFile] = []
    dense_offsets: list[int] = []
    is_large = find_large(checkpoint, selection.kept, census, [len(target.slices) for target in targets])
    for shard, mine in enumerate(_split_by_shard(blocks, count, is_large)):
        entries = _list_entries(selection, blocks, mine) + (dense if shard == 0 else [])
        header = encode_header(entries)
        edges = np.cumsum([len(header), *(entry[3] for entry in entries)], dtype=np.int64)
        blocks.offset[mine] = edges[: len(mine)]
        if shard == 0:
            dense_offsets = edges[len(mine) : -1].tolist()
        if entries:  # like RecIS, a shard without a block leaves no file
            blocks.file[mine] = len(files)
            files.append(OutputFile(shard_name(shard, count), int(edges[-1]), header))
    plan = SparsePlan(
        checkpoint=checkpoint,
        selection=selection,
        targets=targets,
        num_shards=count,
        is_copy=False,
        files=tuple(files),
        blocks=blocks,
        dense_files=tuple((tensor.name + DENSE_SUFFIX, 0) for tensor in selection.kept_dense),
        copies=_join([]),
        gathers=(),
        dropped=dropped,
        digest="",
    )
    segments, gathers = _route(plan, census)
    segments += [
        np.array([[0], [offset], [tensor.file], [tensor.offset], [tensor.num_bytes]], np.int64)
        for tensor, offset in zip(selection.kept_dense, dense_offsets, strict=True)
    ]
    return _seal(plan, copies=_join(segments), gathers=tuple(gathers))


def plan_copy(checkpoint: Checkpoint, selection: Selection) -> SparsePlan:
    """Take every payload file over as it is."""
    parts, source = checkpoint.parts, checkpoint.blocks
    part, column = np.nonzero(source.file >= 0)
    first_part = np.searchsorted(parts.table, np.arange(len(checkpoint.tables)))
    numbers = np.arange(len(checkpoint.files), dtype=np.int64)
    zeros = np.zeros_like(numbers)
    plan = SparsePlan(
        checkpoint=checkpoint,
        selection=selection,
        targets=(),
        num_shards=int(np.bincount(parts.table).max(initial=0)),
        is_copy=True,
        files=tuple(OutputFile(file.name, file.size, b"") for file in checkpoint.files),
        blocks=OutputBlocks(
            key=tuple(source.key[part, column]),
            file=source.file[part, column].astype(np.int64),
            table=parts.table[part],
            column=column,
            target=part - first_part[parts.table[part]],
            begin=parts.begin[part],
            end=parts.end[part],
            size=parts.size[part],
            rows=parts.rows[part],
            offset=source.offset[part, column],
        ),
        dense_files=tuple((tensor.name + DENSE_SUFFIX, tensor.file) for tensor in checkpoint.dense),
        copies=Copies(
            file=numbers,
            offset=zeros,
            source_file=numbers,
            source_offset=zeros,
            num_bytes=np.array([file.size for file in checkpoint.files], np.int64),
        ),
        gathers=(),
        dropped=drop_nothing(),
        digest="",
    )
    return _seal(plan, copies=plan.copies, gathers=())


def _list_blocks(
    checkpoint: Checkpoint, selection: Selection, targets: Sequence[Targets], rows_by_target: Sequence[np.ndarray]
) -> OutputBlocks:
    """Return the blocks of all tables, by table, slot and target; ``file`` and ``offset`` are still to be filled in."""
    keys: list[str] = []
    columns = [np.zeros((7, 0), np.int64)]
    for table, meta in enumerate(checkpoint.tables):
        rows = rows_by_target[table]
        suffixes = [f"/part_{target}_{len(rows)}" for target in range(len(rows))]
        slices = np.array(targets[table].slices, np.int64).T
        target = np.arange(len(rows))
        for slot in selection.kept[table]:
            stem = key_stem(meta.name, slot.name) if meta.is_hashed else row_key_stem(meta.name, slot.name)
            keys += [stem + suffix for suffix in suffixes]
            columns.append(
                np.stack([np.full_like(rows, table), np.full_like(rows, slot.column), target, *slices, rows])
            )
    table_column, slot_column, target_column, begin, end, size, num_rows = np.concatenate(columns, axis=1)
    return OutputBlocks(
        key=tuple(keys),
        file=np.full(len(keys), -1, np.int64),
        table=table_column,
        column=slot_column,
        target=target_column,
        begin=begin,
        end=end,
        size=size,
        rows=num_rows,
        offset=np.zeros(len(keys), np.int64),
    )


def _list_entries(
    selection: Selection, blocks: OutputBlocks, mine: np.ndarray
) -> list[tuple[str, int, tuple[int, ...], int]]:
    """Return (key, dtype, shape, num_bytes) of some blocks, for a header."""
    columns = (column[mine].tolist() for column in (blocks.table, blocks.column, blocks.rows))
    slots = [{slot.column: slot for slot in kept} for kept in selection.kept]
    entries = []
    for number, table, column, rows in zip(mine.tolist(), *columns, strict=True):
        slot = slots[table][column]
        entries.append((blocks.key[number], slot.dtype, (rows, *slot.inner_shape), rows * slot.row_bytes))
    return entries


def _split_by_shard(blocks: OutputBlocks, count: int, is_large: np.ndarray) -> list[np.ndarray]:
    """Return for each shard its blocks (int64): those without a long run first, else in the order of tables and slots."""
    order = np.lexsort((is_large, blocks.target))
    return np.split(order, np.searchsorted(blocks.target[order], np.arange(1, count)))


def _refuse_one_key_twice(keys: Sequence[str]) -> None:
    if len(set(keys)) == len(keys):
        return
    seen: set[str] = set()
    for key in keys:
        if key in seen:  # table "a" with slot "b.c", and table "a.b" with slot "c"
            raise PlanError(
                f"two blocks would get the key {key!r}, for RecIS joins the names of table and slot with a dot; "
                "drop one of the slots with drop_slots"
            )
        seen.add(key)


def _route(plan: SparsePlan, census: Census) -> tuple[list[np.ndarray], list[Gather]]:
    """Say for every run of a census of kept rows where they go: byte ranges (5, n) and gathers."""
    parts, source = plan.checkpoint.parts, plan.checkpoint.blocks
    segments: list[np.ndarray] = []
    gathers: list[Gather] = []
    table_of_run = parts.table[census.part] if len(census.part) else np.zeros(0, np.int64)
    for table in range(len(plan.checkpoint.tables)):
        first, last = np.searchsorted(table_of_run, [table, table + 1])
        part, granule, target, rows = (
            column[first:last] for column in (census.part, census.granule, census.target, census.rows)
        )
        if not len(part):
            continue
        base = _rows_before(target, rows)
        starts = np.flatnonzero(np.diff(part, prepend=-1))
        is_kept_whole = np.add.reduceat(rows, starts) == parts.rows[part[starts]]
        is_ordered = not plan.checkpoint.tables[table].is_hashed  # then each run is of rows that are neighbours
        if is_ordered:
            is_range = np.repeat(is_kept_whole, np.diff(np.append(starts, len(part))))
            ranges, split = np.flatnonzero(is_range), np.flatnonzero(~is_range)
        else:
            is_whole = np.minimum.reduceat(target, starts) == np.maximum.reduceat(target, starts)
            is_whole &= is_kept_whole
            ranges = starts[is_whole]
            split = np.flatnonzero(np.repeat(~is_whole, np.diff(np.append(starts, len(part)))))
        # where a range begins in its part, and its rows: of a whole part all, though these may stand in several runs
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
        for runs in np.split(moved, edges[1:]) if len(moved) else []:
            first_row = int(granule[runs[0]]) * GRANULE_ROWS
            number = int(part[runs[0]])
            gathers.append(
                Gather(
                    part=number,
                    first_row=first_row,
                    num_rows=min(GRANULE_ROWS, int(parts.rows[number]) - first_row),
                    targets=target[runs],
                    counts=rows[runs],
                    first_target_rows=base[runs],
                    columns=tuple(by_rows[number]),
                )
            )
    return segments, gathers


def _is_copied(checkpoint: Checkpoint, table: int, slot: SlotMeta, part: np.ndarray) -> np.ndarray:
    """Return for each of these parts (bool) whether the rows of a slot lie in the source as they are to be written."""
    if slot != checkpoint.tables[table].slots[slot.column]:
        return np.zeros(len(part), bool)
    is_copied: np.ndarray = checkpoint.blocks.file[part, slot.column] >= 0
    return is_copied


def _rows_before(target: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return for each run, in order, the rows that earlier runs have put into the same target."""
    order = np.argsort(target, kind="stable")
    sums = np.cumsum(rows[order]) - rows[order]
    first_of_target = np.flatnonzero(np.diff(target[order], prepend=-1))
    lengths = np.diff(np.append(first_of_target, len(order)))
    before = np.empty_like(rows)
    before[order] = sums - np.repeat(sums[first_of_target], lengths)
    return before


def _join(segments: Sequence[np.ndarray]) -> Copies:
    """Order byte ranges by place in the output and join those that are neighbours on both sides."""
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


def _seal(plan: SparsePlan, *, copies: Copies, gathers: tuple[Gather, ...]) -> SparsePlan:
    """Add the segments and the digest over everything that decides what is written."""
    digest = xxhash.xxh3_128(plan.checkpoint.fingerprint.encode())
    for file in plan.files:
        digest.update(f"{file.name}\0{file.num_bytes}\0".encode() + file.header)
    for name in ("file", "offset", "source_file", "source_offset", "num_bytes"):
        digest.update(np.ascontiguousarray(getattr(copies, name)).tobytes())
    for name in ("begin", "end", "size"):  # rows of a gather go where the slices say
        digest.update(np.ascontiguousarray(getattr(plan.blocks, name)).tobytes())
    for gather in gathers:
        digest.update(np.array([*gather[:3], *gather.columns], np.int64).tobytes())
        for column in gather[3:6]:
            digest.update(np.ascontiguousarray(column).tobytes())
    for name in ("part", "row", "id", "reason"):
        digest.update(np.ascontiguousarray(getattr(plan.dropped, name)).tobytes())
    return replace(plan, copies=copies, gathers=gathers, digest=f"xxh3:{digest.hexdigest()}")
