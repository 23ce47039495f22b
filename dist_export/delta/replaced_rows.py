"""Which rows of a layer the deltas above it replace or delete, as rules for the rows of all as one source."""

from __future__ import annotations

from collections import Counter

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.row_reader import RowReader
from dist_export.config.prune_rules import REPLACED
from dist_export.delta.layered_directory import name_in_layer
from dist_export.delta.layered_source import OF_BASE, OF_DELTA
from dist_export.errors import CheckpointError, PackageError, PlanError
from dist_export.formats.deleted_ids import ID, deleted_name, find_fault
from dist_export.formats.delta_entries import DeletedIdsEntry, DeltaEntry
from dist_export.formats.id_list import IdList
from dist_export.ids.thread_cache import HeldValues
from dist_export.package.reader import Package
from dist_export.plan.prune import Pruning, TableRule

_ONE_DELTA = 2
"""Layers of a delta on a full package."""
_DELETED_BYTES = 24
"""Bytes that a thread holds for each deleted id of one shard of the base: as it is read, and in the list that is searched."""


_LISTED_BYTES = 12
"""Bytes that a rank holds for each deleted id of a chain: in the list that is searched, with its sieve."""


class ReplacedRows:
    """Which rows of a layer the deltas above it replace or delete. Any thread. See :class:`~dist_export.plan.prune.LeftRows`.

    A thread holds the ids that are deleted from one shard of the base. Of a chain, a rank holds all deleted ids: a shard's name
    does not say which layer an id is deleted from.
    """

    def __init__(self, checkpoint: Checkpoint, package: Package, *, threads: int) -> None:
        """``checkpoint`` is that of ``package``, a delta that is open with its base. ``threads`` of a rank ask at once."""
        assert checkpoint.parts.layer is not None
        assert package.base is not None
        self._checkpoint, self._package = checkpoint, package
        self._layer = checkpoint.parts.layer
        names = [table.name for table in checkpoint.tables]
        self._deltas = [[its for its in package.layers[:-1] if has_table(its, name)] for name in names]
        """By table, the deltas that have it, the last one first."""
        self._lists = [_lists_of(package.table(name).delta) for name in names]
        shards = {part.file for table in package.base.manifest.tables for part in table.parts}
        self._file_of_shard = {name_in_layer(OF_BASE, shard): deleted_name(shard) for shard in shards}
        self._of_shards = frozenset(self._file_of_shard.values())
        self._held: HeldValues[IdList] = HeldValues()
        self._threads = threads

    @property
    def num_bytes(self) -> int:
        """Bytes that the threads hold."""
        if len(self._package.layers) > _ONE_DELTA:
            return _LISTED_BYTES * sum(
                its.delta.deleted
                for layer in self._package.layers
                for its in layer.manifest.tables
                if isinstance(its.delta, DeltaEntry)
            )
        by_file = Counter[str]()
        for lists in self._lists:
            for its in lists:
                by_file[its.file] += its.ids
        of_any = sum(ids for file, ids in by_file.items() if file not in self._of_shards)
        most = max((ids for file, ids in by_file.items() if file in self._of_shards), default=0)
        return (most + of_any) * _DELETED_BYTES * self._threads

    def find(self, part: int, first_row: int, ids: np.ndarray, is_kept: np.ndarray, reader: RowReader) -> np.ndarray:
        """Return which rows are needless; see :class:`~dist_export.plan.prune.LeftRows`. CheckpointError for a damaged delta."""
        del first_row, reader
        table, layer = int(self._checkpoint.parts.table[part]), int(self._layer[part])
        found = np.zeros(len(ids), bool)
        if layer == OF_DELTA:
            return found
        name = self._checkpoint.tables[table].name
        above = self._package.layers[:layer]
        try:
            for its in (delta for delta in self._deltas[table] if delta in above):
                found |= its.rows_of(name).contains(ids)
                deleted = (
                    self._deleted_from(table, part)
                    if len(self._package.layers) == _ONE_DELTA
                    else its.delta_ids.deleted(its.table(name))
                )
                if deleted is not None:
                    found |= deleted.contains(ids)
        except PackageError as error:
            raise CheckpointError(str(error)) from error
        is_needless: np.ndarray = found & is_kept
        return is_needless

    def digest(self) -> bytes:
        """Return a digest of the delta, which names its base by digest, and that its own."""
        return self._package.manifest.digest.encode()

    def _deleted_from(self, table: int, part: int) -> IdList | None:
        """Return the deleted ids that may be in a part of the base; None if there are none."""
        shard = self._checkpoint.files[int(self._checkpoint.blocks.file[part, 0])].name
        file = self._file_of_shard.get(shard, "")
        lists = [its for its in self._lists[table] if its.file == file or its.file not in self._of_shards]
        return self._held.get((table, file), lambda: self._read(table, lists)) if lists else None

    def _read(self, table: int, lists: list[DeletedIdsEntry]) -> IdList:
        found = []
        for its in lists:
            content = self._package.files.read(its.file)
            if fault := find_fault(content, its.offset, its.ids):
                raise CheckpointError(
                    f"{self._package.files.describe(its.file)}: the deleted ids of table "
                    f"{self._checkpoint.tables[table].name!r} are damaged: {fault}. Run verify, and export again"
                )
            found.append(np.frombuffer(content, ID, its.ids, its.offset))
        return IdList(np.sort(np.concatenate(found)))


def plan_replacing(checkpoint: Checkpoint, package: Package, *, threads: int, most_bytes: int) -> Pruning:
    """Return the rules that leave out what the delta replaces or deletes. Every rank for itself; no id is read.

    Args:
        checkpoint: that of ``package``.
        package: a delta that is open with its base.
        threads: of a rank.
        most_bytes: what the deleted ids may take in the memory of a rank.

    Raises:
        CheckpointError: the manifest contradicts itself.
        PlanError: the deleted ids take more memory.
    """
    rules: list[tuple[TableRule, ...]] = []
    for table in checkpoint.tables:
        has_any = False
        for layer in (its for its in package.layers if has_table(its, table.name)):
            delta = layer.table(table.name).delta
            num_listed = sum(its.ids for its in _lists_of(delta))
            if isinstance(delta, DeltaEntry) and num_listed != delta.deleted:
                raise CheckpointError(
                    f"{layer.directory.url}: the manifest says {delta.deleted:,} deleted ids of table {table.name!r}, and its "
                    f"lists have {num_listed:,}. Run verify, and export again"
                )
            has_any |= table.is_hashed and isinstance(delta, DeltaEntry) and delta.changed + delta.deleted > 0
        rules.append((TableRule(REPLACED, None, 0, None, None),) if has_any else ())
    replaced = ReplacedRows(checkpoint, package, threads=threads)
    if replaced.num_bytes > most_bytes:
        which = "from one shard of the base" if len(package.layers) == _ONE_DELTA else "by all deltas"
        raise PlanError(
            f"{package.directory.url}: the ids that are deleted {which} take {replaced.num_bytes:,} bytes for "
            f"{threads} threads, and {most_bytes:,} of max_memory are for that. Raise max_memory to "
            f"{-(-2 * replaced.num_bytes >> 20)}MiB, or lower threads"
        )
    return Pruning(rules=tuple(rules), same=replaced)


def has_table(package: Package, name: str) -> bool:
    """Return whether a package itself names a table."""
    return any(entry.name == name for entry in package.manifest.tables)


def _lists_of(delta: object) -> tuple[DeletedIdsEntry, ...]:
    return delta.deleted_ids if isinstance(delta, DeltaEntry) else ()
