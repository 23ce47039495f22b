"""Which rows of a base a delta package replaces or deletes, as rules for the rows of both as one source."""

from __future__ import annotations

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.row_reader import RowReader
from dist_export.config.prune_rules import DENY_LIST, REPLACED
from dist_export.delta.layered_source import OF_BASE
from dist_export.errors import CheckpointError, PackageError, PlanError
from dist_export.formats.delta_entries import DeltaEntry
from dist_export.formats.id_list import IdList
from dist_export.package.reader import Package
from dist_export.plan.prune import Pruning, TableRule

_DELETED_BYTES = 32
"""Bytes for each deleted id: as it is read, sorted, and in the list that is searched."""


class ReplacedRows:
    """Which rows of the base have a row of their id in the delta. Any thread. See :class:`~dist_export.plan.prune.LeftRows`."""

    def __init__(self, checkpoint: Checkpoint, package: Package) -> None:
        """``checkpoint`` is that of ``package``, a delta that is open with its base."""
        assert checkpoint.parts.layer is not None
        self._is_base = checkpoint.parts.layer == OF_BASE
        self._readers = [package.rows_of(checkpoint.tables[table].name) for table in range(len(checkpoint.tables))]
        self._table = checkpoint.parts.table
        self._digest = package.manifest.digest.encode()

    def find(self, part: int, first_row: int, ids: np.ndarray, is_kept: np.ndarray, reader: RowReader) -> np.ndarray:
        """Return which rows are replaced; see :class:`~dist_export.plan.prune.LeftRows`. CheckpointError for a damaged delta."""
        del first_row, reader
        is_replaced = np.zeros(len(ids), bool)
        if self._is_base[part]:
            try:
                is_replaced[is_kept] = self._readers[self._table[part]].contains(ids[is_kept])
            except PackageError as error:
                raise CheckpointError(str(error)) from error
        return is_replaced

    def digest(self) -> bytes:
        """Return a digest of the delta, which names its base by digest."""
        return self._digest


def plan_replacing(checkpoint: Checkpoint, package: Package, *, most_bytes: int) -> Pruning:
    """Return the rules that leave out what the delta replaces, and what it deletes. Every rank for itself.

    Args:
        checkpoint: that of ``package``.
        package: a delta that is open with its base.
        most_bytes: what the deleted ids may take in memory.

    Raises:
        PackageError: its lists of deleted ids are damaged.
        PlanError: they take more memory.
    """
    deltas = [package.table(table.name).delta for table in checkpoint.tables]
    num_deleted = sum(delta.deleted for delta in deltas if isinstance(delta, DeltaEntry))
    if num_deleted * _DELETED_BYTES > most_bytes:
        raise PlanError(
            f"{package.directory.url}: {num_deleted:,} ids of the base are deleted, and max_memory has room for "
            f"{most_bytes // _DELETED_BYTES:,}. Raise max_memory, or export without base"
        )
    rules: list[tuple[TableRule, ...]] = []
    for table in checkpoint.tables:
        delta, its = package.table(table.name).delta, []
        if table.is_hashed and isinstance(delta, DeltaEntry):
            if delta.deleted:
                its.append(TableRule(DENY_LIST, None, 0, IdList(package.deleted_ids(table.name)), None))
            if delta.changed:
                its.append(TableRule(REPLACED, None, 0, None, None))  # the last one, as Pruning wants it
        rules.append(tuple(its))
    return Pruning(rules=tuple(rules), same=ReplacedRows(checkpoint, package))
