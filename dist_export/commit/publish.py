"""Write the indexes that serving and RecIS read, account for every row, and publish the manifest last. Rank 0."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import msgspec
import numpy as np

from dist_export._version import VERSION
from dist_export.checkpoint.metadata import Checkpoint, DenseTensor, SlotMeta
from dist_export.commit.audit import TableAccount
from dist_export.config.prune_rules import DENY_LIST, NORM, RowRule
from dist_export.errors import CommitError
from dist_export.formats.digests import NONE, XXH3, digest_bytes
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.id_list import IdList
from dist_export.formats.recis import (
    DENSE_SUFFIX,
    EMBEDDING_SLOT,
    INDEX,
    MERGED,
    TENSORKEY,
    MergedEntry,
    Slice,
    dense_entry,
    embedding_entry,
    encode_indented,
    encode_index,
    encode_sorted,
    format_slice,
)
from dist_export.formats.row_encodings import TAIL_BYTES
from dist_export.formats.triton_layout import find_original
from dist_export.formats.tuning import STANDARD
from dist_export.manifest import (
    MANIFEST,
    CastEntry,
    DenseTensorEntry,
    FileEntry,
    LeftOutEntry,
    Manifest,
    PartEntry,
    PruneEntry,
    SlotEntry,
    TableEntry,
    encode_manifest,
)
from dist_export.plan.casts import CastCount, cast_of
from dist_export.plan.census import Census
from dist_export.plan.dropped_rows import DUPLICATE, account_for
from dist_export.plan.plan import OutputBlocks, SparsePlan
from dist_export.plan.prune_report import count_by_rule
from dist_export.plan.selection import BY_TRAINER
from dist_export.redact import redact_text
from dist_export.storage.directory import Directory
from dist_export.workdir.state import begin_commit

if TYPE_CHECKING:
    from dist_export.storage.s3_directory import S3Directory

DenseMeta = Sequence[tuple[str, str, tuple[int, ...]]]
"""(name, torch dtype name, shape) of the parameters in model.pt, in its order."""


def render_indexes(plan: SparsePlan, dense_state: DenseMeta) -> dict[str, bytes]:
    """Return the content of the JSON files beside the shards, by name, in the order in which to write them.

    In a copy, only the merged manifest is new. The other files are copied unchanged.
    """
    order = sorted(range(len(plan.blocks.key)), key=plan.blocks.key.__getitem__)
    rendered = {MERGED: _render_merged(plan, dense_state, order)}
    if plan.is_copy:
        return rendered
    is_hashed = np.array([table.is_hashed for table in plan.checkpoint.tables], bool)
    if len(is_hashed) and not is_hashed.any() and not plan.dense_files:
        return rendered  # RecIS's loader has no tables without ids
    order = [row for row, table in zip(order, plan.blocks.table[order].tolist(), strict=True) if is_hashed[table]]
    key = plan.blocks.key
    names = [file.name for file in plan.files]
    file_by_key = {key[row]: names[file] for row, file in zip(order, plan.blocks.file[order].tolist(), strict=True)}
    file_by_key |= {dense: names[file] for dense, file in plan.dense_files}
    return {TENSORKEY: encode_sorted(_list_internal_names(plan, order)), **rendered, INDEX: encode_index(file_by_key)}


def _render_merged(plan: SparsePlan, dense_state: DenseMeta, order: Sequence[int]) -> bytes:
    """Return the merged manifest. ``order`` lists the blocks in the order of their keys."""
    blocks = plan.blocks
    id_rows = np.flatnonzero(blocks.column == 0)
    id_keys = {
        part: blocks.key[row]
        for part, row in zip(
            zip(blocks.table[id_rows].tolist(), blocks.target[id_rows].tolist(), strict=True),
            id_rows.tolist(),
            strict=True,
        )
    }
    slots = {
        (number, slot.column): slot
        for number in range(len(plan.checkpoint.tables))
        for slot in plan.slots_of(number)
        if slot.name == EMBEDDING_SLOT
    }
    entries: dict[str, MergedEntry] = {}
    columns = (column[order].tolist() for column in (blocks.table, blocks.column, blocks.target, blocks.rows))
    for row, table, column, target, rows in zip(order, *columns, strict=True):
        slot = slots.get((table, column))
        if slot is not None:
            key = blocks.key[row]
            entries[key] = embedding_entry(key, id_keys.get((table, target)), slot.dtype, (rows, *slot.inner_shape))
    for tensor, (key, _) in zip(plan.selection.kept_dense, plan.dense_files, strict=True):
        entries[key] = dense_entry(key, DTYPES[tensor.dtype].torch, tensor.shape)
    # as in RecIS, the parameters of model.pt come after the sorted part, in their own order
    document = {key: entries[key] for key in sorted(entries)}
    for name, dtype, shape in dense_state:
        document.setdefault(name, dense_entry(name, dtype, shape))  # a block with the same name takes precedence
    return encode_indented(document)


def _list_internal_names(plan: SparsePlan, order: Sequence[int]) -> dict[str, str]:
    """Return key -> internal name of all blocks, in ``order``."""
    blocks = plan.blocks
    stems = {
        (number, slot.column): f"{table.name}@{slot.name}^"
        for number, table in enumerate(plan.checkpoint.tables)
        for slot in table.slots
    }
    columns = (column[order].tolist() for column in (blocks.table, blocks.column))
    return {
        blocks.key[row]: stems[table, column] + text
        for row, table, column, text in zip(order, *columns, _SliceTexts().of(blocks, order), strict=True)
    }


def describe_tables(plan: SparsePlan, census: Census, accounts: Sequence[TableAccount]) -> tuple[TableEntry, ...]:
    """Return the manifest's entries of all tables. ``accounts`` describe the written files, by table."""
    entries = []
    texts = _SliceTexts()
    parts = plan.checkpoint.parts
    for number, table in enumerate(plan.checkpoint.tables):
        its_parts = parts.of_table(number)
        rows_in, rows_out = int(parts.rows[its_parts].sum()), accounts[number].rows
        misplaced = int(census.misplaced[its_parts].sum())
        dropped = account_for(plan.checkpoint, plan.dropped, number, pruned=census.pruned, pruning=plan.pruning)
        entries.append(
            TableEntry(
                name=table.name,
                rows_in=rows_in,
                rows_out=rows_out,
                rows_dropped=dropped.rows_by_reason,
                misplaced=misplaced,
                repaired=misplaced - dropped.misplaced,
                duplicates=dropped.rows_by_reason.get(DUPLICATE, 0),
                id_sum=f"{accounts[number].id_sum:016x}",
                kept=tuple(_describe_slot(slot, rows_out) for slot in plan.selection.kept[number]),
                dropped=tuple(_describe_slot(slot, rows_in, why) for slot, why in plan.selection.dropped[number]),
                parts=tuple(_describe_parts(plan, number, texts)),
                is_hashed=msgspec.UNSET if table.is_hashed else False,
                source_name=msgspec.UNSET if table.source_name is None else table.source_name,
                default_row=msgspec.UNSET if table.default_row is None else table.default_row,
            )
        )
    return tuple(entries)


def describe_left_out(checkpoint: Checkpoint | None) -> tuple[LeftOutEntry, ...] | msgspec.UnsetType:
    """Return the manifest's entries of the tables that the settings leave out."""
    if checkpoint is None or not checkpoint.left_out:
        return msgspec.UNSET
    return tuple(LeftOutEntry(name=t.name, rows=t.rows, reason=t.reason) for t in checkpoint.left_out)


def describe_rules(plan: SparsePlan, census: Census) -> tuple[PruneEntry, ...] | msgspec.UnsetType:
    """Return the manifest's entries of the rules of ``prune``."""
    if plan.pruning is None or census.pruned is None or not plan.pruning.asked:
        return msgspec.UNSET
    rows = count_by_rule(plan.checkpoint, plan.pruning, census.pruned).sum(axis=0).tolist()
    lists = {rule.place: rule.ids for rules in plan.pruning.rules for rule in rules}
    return tuple(_describe_rule(rule, lists[place], rows[place]) for place, rule in enumerate(plan.pruning.asked))


def _describe_rule(rule: RowRule, ids: IdList | None, rows: int) -> PruneEntry:
    entry = PruneEntry(tables=rule.tables, reason=rule.reason, rows=rows)
    if ids is not None:
        path = redact_text(rule.path)
        named = {"deny": path} if rule.reason == DENY_LIST else {"allow": path}
        return msgspec.structs.replace(entry, **named, ids=len(ids), ids_digest=f"xxh3:{ids.digest.hex()}")
    limit = rule.limit if abs(rule.limit) < 1 << 63 else float(rule.limit)  # JSON readers do not accept larger integers
    if rule.reason == NORM:
        return msgspec.structs.replace(entry, norm_at_most=limit)
    return msgspec.structs.replace(entry, slot=rule.slot, below=limit)


def add_casts(
    plan: SparsePlan, entries: Sequence[TableEntry], counts: Mapping[int, CastCount]
) -> tuple[TableEntry, ...]:
    """Return the tables' entries with the losses of casts. The result does not depend on which rank counted them.

    Args:
        plan: the plan of the export.
        entries: the entries of all tables.
        counts: the losses by gather.

    Raises:
        CommitError: the number of cast values is not that of written values.
    """
    by_table: dict[int, list[CastCount]] = {}
    for number in sorted(counts):  # sums of floats depend on their order
        by_table.setdefault(int(plan.checkpoint.parts.table[plan.gathers[number].part]), []).append(counts[number])
    added = []
    for table, (meta, entry) in enumerate(zip(plan.checkpoint.tables, entries, strict=True)):
        slots = []
        for slot, plain in zip(plan.slots_of(table), entry.kept, strict=True):
            described = plain
            cast = cast_of(meta.slots[slot.column], slot)
            if cast is not None:
                found = by_table.get(table, [])
                values = sum(count.values for count in found)
                if values != entry.rows_out * cast.dim:
                    raise CommitError(
                        f"table {entry.name!r}: {values:,} values of {slot.name!r} were cast, the shards hold "
                        f"{entry.rows_out * cast.dim:,}. No manifest was written; run the export again"
                    )
                fit = sum(count.values - count.overflow for count in found)
                described = msgspec.structs.replace(
                    plain,
                    cast=CastEntry(
                        source_dtype=cast.source_name,
                        values=values,
                        max_abs_error=max((count.worst for count in found), default=0.0),
                        mean_abs_error=math.fsum(count.total for count in found) / fit if fit else 0.0,
                        nans=sum(count.nans for count in found),
                        out_of_range=sum(count.out_of_range for count in found),
                    ),
                )
            slots.append(described)
        added.append(msgspec.structs.replace(entry, kept=tuple(slots)))
    return tuple(added)


def describe_dense_tensors(
    plan: SparsePlan, trainer_state: DenseMeta = ()
) -> tuple[tuple[DenseTensorEntry, ...], tuple[DenseTensorEntry, ...]]:
    """Return the manifest's entries of the dense tensors among the sparse files: kept, and dropped with ``trainer_state``."""
    return (
        tuple(_describe_dense(tensor) for tensor in plan.selection.kept_dense),
        (
            *(_describe_dense(tensor, reason) for tensor, reason in plan.selection.dropped_dense),
            *(
                DenseTensorEntry(name=name, dtype=dtype, shape=shape, reason=BY_TRAINER)
                for name, dtype, shape in trainer_state
            ),
        ),
    )


class Earlier(NamedTuple):
    """A package whose files those of this one may repeat."""

    directory: Directory
    files: frozenset[FileEntry]


def write_small_files(
    target: Directory,
    files: Mapping[str, bytes],
    *,
    digest: str = XXH3,
    keep: frozenset[str] = frozenset(),
    earlier: Earlier | None = None,
    chunk_bytes: int = STANDARD.chunk_bytes,
) -> list[FileEntry]:
    """Write files in the given order, and return their entries. Files in ``keep`` are not written if they already exist.

    A file of Triton's model repository that repeats another one, and one that ``earlier`` has with the same content, is a hard
    link to it or a copy by the store, where that is possible. These files always have a digest, even if the shards have none.
    It costs little, and it reveals a damaged index.
    """
    algorithm = XXH3 if digest == NONE else digest
    entries = []
    for name, data in files.items():
        entry = FileEntry(path=name, num_bytes=len(data), digest=digest_bytes(data, algorithm, chunk_bytes=chunk_bytes))
        entries.append(entry)
        if name in keep and target.exists(name):
            continue
        original = find_original(name)
        if original is not None and files.get(original) == data:
            target.write_again(name, original, data)
        elif earlier is not None and entry in earlier.files:
            target.write_again(name, name, data, earlier.directory)
        else:
            target.write(name, data)
    return entries


def publish(target: Directory, manifest: Manifest) -> None:
    """Write the manifest. From then on, ``target`` is a package.

    Raises:
        CommitError: on S3, another export already wrote a manifest. There it is written only if there is none.
    """
    begin_commit(target)
    content = encode_manifest(manifest)
    if target.s3 is None:
        target.write(MANIFEST, content)
    elif not cast("S3Directory", target).create(MANIFEST, content):
        raise CommitError(
            f"{target.describe(MANIFEST)} is there already: another export has committed a package there, and this one "
            "was not. Look which of the two you want, and give another export_dir"
        )


def list_versions() -> dict[str, str]:
    """Return the versions of the software that wrote the package."""
    return {
        "dist_export": VERSION,
        "python": platform.python_version(),
        **{name: _version_of(name) for name in ("torch", "numpy", "fsspec")},
    }


@functools.cache
def _version_of(package: str) -> str:
    return importlib.metadata.version(package)


def _describe_parts(plan: SparsePlan, table: int, texts: _SliceTexts) -> list[PartEntry]:
    blocks = plan.blocks
    keys_by_slot: list[tuple[str, dict[int, str]]] = []
    for slot in plan.slots_of(table):
        rows = plan.blocks_of(table, slot.column).tolist()
        targets = blocks.target[rows].tolist()
        keys_by_slot.append((slot.name, {target: blocks.key[row] for target, row in zip(targets, rows, strict=True)}))
    is_row_indexed = not plan.checkpoint.tables[table].is_hashed
    rows_in = int(plan.checkpoint.parts.rows[plan.checkpoint.parts.of_table(table)].sum())
    ids = plan.blocks_of(table, plan.slots_of(table)[0].column)
    columns = (column[ids].tolist() for column in (blocks.file, blocks.target, blocks.rows, blocks.begin))
    names = [file.name for file in plan.files]
    return [
        PartEntry(
            file=names[file],
            slice=text,
            rows=rows,
            first_row=min(begin, rows_in) if is_row_indexed else msgspec.UNSET,  # slices of an empty table have one row
            keys={slot: keys[target] for slot, keys in keys_by_slot if target in keys},
        )
        for file, target, rows, begin, text in zip(*columns, texts.of(blocks, ids.tolist()), strict=True)
    ]


class _SliceTexts(dict[tuple[int, int, int], str]):
    """Slices as RecIS writes them, cached. Most tables have the same slices, and so share the strings."""

    def __missing__(self, part: tuple[int, int, int]) -> str:
        text = self[part] = format_slice(Slice(*part))
        return text

    def of(self, blocks: OutputBlocks, rows: Sequence[int]) -> list[str]:
        """Return the slices of these blocks."""
        columns = (column[rows].tolist() for column in (blocks.begin, blocks.end, blocks.size))
        return [self[part] for part in zip(*columns, strict=True)]


def _describe_slot(slot: SlotMeta, rows: int, reason: str = "") -> SlotEntry:
    return SlotEntry(
        name=slot.name,
        dtype=DTYPES[slot.dtype].torch,
        shape=slot.inner_shape if slot.stored_shape is None else slot.stored_shape,
        num_bytes=slot.num_bytes(rows),
        reason=reason,
        encoding=slot.encoding or msgspec.UNSET,
        dim=slot.row_bytes - TAIL_BYTES if slot.encoding else msgspec.UNSET,
        earlier_casts=slot.earlier_casts or msgspec.UNSET,
        is_ignored=slot.is_ignored or msgspec.UNSET,
    )


def _describe_dense(tensor: DenseTensor, reason: str = "") -> DenseTensorEntry:
    return DenseTensorEntry(
        name=tensor.name.removesuffix(DENSE_SUFFIX), dtype=DTYPES[tensor.dtype].torch, shape=tensor.shape, reason=reason
    )
