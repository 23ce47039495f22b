"""Plan every header, offset and segment of the output from the headers of the source and the census. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import xxhash

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.errors import PlanError
from dist_export.formats.recis import DENSE_SUFFIX, key_stem, row_key_stem, shard_name
from dist_export.formats.safetensors import encode_header
from dist_export.plan.census import Census, count_rows_by_target
from dist_export.plan.dropped_rows import DroppedRows, count_kept, drop_nothing
from dist_export.plan.gathers import Gathers, join_gathers
from dist_export.plan.multipart import find_large
from dist_export.plan.plan import Copies, OutputBlocks, OutputFile, SparsePlan
from dist_export.plan.prune import Pruning
from dist_export.plan.segments import join_ranges, plan_segments
from dist_export.plan.selection import Selection
from dist_export.plan.target_slices import Targets


def plan_shards(
    checkpoint: Checkpoint,
    selection: Selection,
    targets: tuple[Targets, ...],
    census: Census,
    *,
    num_shards: int | None,
    dropped: DroppedRows | None = None,
    pruning: Pruning | None = None,
) -> SparsePlan:
    """Lay out the output shards: one file a shard, with the dense tensors in shard 0.

    In a shard, blocks without a long copied run come first. Otherwise blocks are in the order of tables and slots.

    Args:
        census: counts of all rows of the source except pruned rows.
        dropped: further rows that no shard gets; by default none.
        pruning: the rules that the census followed; by default none.
        num_shards: the result of :func:`~dist_export.plan.target_slices.resolve_num_shards`; None for the source's slices.

    Raises:
        PlanError: two blocks would have one key, or rows are to be cast whose columns several ranks hold in memory.
    """
    _refuse_changed_pieces(checkpoint, selection)
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
        if entries:  # as in RecIS, a shard without blocks has no file
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
        copies=join_ranges([]),
        gathers=join_gathers([]),
        dropped=dropped,
        digest="",
        pruning=pruning or None,
    )
    segments, gathers = plan_segments(plan, census)
    segments += [
        np.array([[0], [offset], [tensor.file], [tensor.offset], [tensor.num_bytes]], np.int64)
        for tensor, offset in zip(selection.kept_dense, dense_offsets, strict=True)
    ]
    return _seal(plan, copies=join_ranges(segments), gathers=gathers)


def _refuse_changed_pieces(checkpoint: Checkpoint, selection: Selection) -> None:
    """Raise PlanError if rows are to be changed, but several ranks hold their columns in memory and none has whole rows."""
    strips, memory = checkpoint.strips, checkpoint.memory
    if memory is None or not len(strips.part):
        return
    owner = memory.owner[strips.file]
    is_next = (strips.part[1:] == strips.part[:-1]) & (strips.column[1:] == strips.column[:-1])
    for place in np.flatnonzero(is_next & (owner[1:] != owner[:-1])).tolist():
        table = int(checkpoint.parts.table[strips.part[place]])
        stored = checkpoint.tables[table].slots[strips.column[place]]
        if any(slot.column == stored.column and slot != stored for slot in selection.kept[table]):
            raise PlanError(
                f"table {checkpoint.tables[table].name!r}: columns of its rows are in the memory of several ranks, so they "
                "can only be written as they are. Leave the table out of what is to change, or save a checkpoint and export "
                "that"
            )


def plan_copy(checkpoint: Checkpoint, selection: Selection) -> SparsePlan:
    """Plan a copy of every payload file, unchanged."""
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
        gathers=join_gathers([]),
        dropped=drop_nothing(),
        digest="",
    )
    return _seal(plan, copies=plan.copies, gathers=plan.gathers)


def _list_blocks(
    checkpoint: Checkpoint, selection: Selection, targets: Sequence[Targets], rows_by_target: Sequence[np.ndarray]
) -> OutputBlocks:
    """Return the blocks of all tables, by table, slot and target. The caller fills in ``file`` and ``offset``."""
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
    """Return the blocks (int64) of each shard: those without a long run first, each group in the order of tables and slots."""
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


def _seal(plan: SparsePlan, *, copies: Copies, gathers: Gathers) -> SparsePlan:
    """Return the plan with its segments and a digest of everything that decides what is written."""
    digest = xxhash.xxh3_128(f"{plan.checkpoint.fingerprint} {plan.checkpoint.disk_state}".encode())
    for file in plan.files:
        digest.update(f"{file.name}\0{file.num_bytes}\0".encode() + file.header)
    for name in ("file", "offset", "source_file", "source_offset", "num_bytes"):
        digest.update(np.ascontiguousarray(getattr(copies, name)).tobytes())
    for name in ("begin", "end", "size"):  # the slices decide the targets of gathered rows
        digest.update(np.ascontiguousarray(getattr(plan.blocks, name)).tobytes())
    digest.update(f"{gathers.columns}".encode())
    for name in ("part", "first_row", "num_rows", "columns_of", "bounds", "targets", "counts", "first_target_rows"):
        digest.update(np.ascontiguousarray(getattr(gathers, name)).tobytes())
    for name in ("part", "row", "id", "reason"):
        digest.update(np.ascontiguousarray(getattr(plan.dropped, name)).tobytes())
    if plan.pruning:
        digest.update(plan.pruning.digest())
    return replace(plan, copies=copies, gathers=gathers, digest=f"xxh3:{digest.hexdigest()}")
