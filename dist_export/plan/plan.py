"""Describe as data what the ranks write: files, blocks, byte ranges and gathers. Pure."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta
from dist_export.plan.dropped_rows import DroppedRows
from dist_export.plan.gathers import Gathers
from dist_export.plan.prune import Pruning
from dist_export.plan.selection import Selection
from dist_export.plan.target_slices import Targets


class OutputFile(NamedTuple):
    """One shard file to write: ``header`` (may be empty), then the payload."""

    name: str
    num_bytes: int
    header: bytes


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Copies:
    """Byte ranges that are copied unchanged, as parallel int64 columns, ordered by file and offset."""

    file: np.ndarray
    offset: np.ndarray
    source_file: np.ndarray
    source_offset: np.ndarray
    num_bytes: np.ndarray

    def __len__(self) -> int:
        return len(self.file)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OutputBlocks:
    """The blocks of all tables in the output, as parallel columns. All are int64 except ``key``."""

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
    """Everything that the ranks write. It is the same on every rank and for every number of ranks."""

    checkpoint: Checkpoint
    selection: Selection
    targets: tuple[Targets, ...]
    """The targets of each table; empty in a copy."""
    num_shards: int
    is_copy: bool
    files: tuple[OutputFile, ...]
    blocks: OutputBlocks
    dense_files: tuple[tuple[str, int], ...]
    """(key, file) of each dense tensor in the shard files of the output."""
    copies: Copies
    gathers: Gathers
    dropped: DroppedRows
    """Rows that go to no shard; none in a copy."""
    digest: str
    pruning: Pruning | None = None
    """Rules that prune further rows; None if there are none."""

    @property
    def num_bytes(self) -> int:
        """The size of all output files."""
        return sum(file.num_bytes for file in self.files)

    def slots_of(self, table: int) -> tuple[SlotMeta, ...]:
        """Return the slots of a table that are kept."""
        return self.selection.kept[table]

    def has_casts(self, table: int) -> bool:
        """Whether a slot of a table is written in another dtype than it is stored in."""
        stored = self.checkpoint.tables[table].slots
        return any(stored[slot.column].dtype != slot.dtype for slot in self.slots_of(table))

    @functools.cached_property
    def tables_of_gathers(self) -> np.ndarray:
        """The table (int64) of each gather. They are in order."""
        tables: np.ndarray = self.checkpoint.parts.table[self.gathers.part]
        return tables

    def runs_of(self, table: int, column: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the runs of a table's gathers that move a slot (all runs for None), and the block of each (both int64).

        All slots of a target are in one file, so with None the blocks are those of any one slot.
        """
        gathers = self.gathers
        first, last = np.searchsorted(self.tables_of_gathers, [table, table + 1])
        runs = np.arange(gathers.bounds[first], gathers.bounds[last])
        if column is None:
            column = self.slots_of(table)[0].column
        elif len(runs):
            has_slot = np.array([column in columns for columns in gathers.columns])
            runs = runs[has_slot[gathers.columns_of[gathers.of_run[runs]]]]
        return runs, self.blocks_of(table, column)[gathers.targets[runs]]

    @functools.cached_property
    def files_of_runs(self) -> np.ndarray:
        """The output file (int64) of each run of the gathers."""
        files = np.empty(len(self.gathers.targets), np.int64)
        for table in np.unique(self.tables_of_gathers).tolist():
            runs, blocks = self.runs_of(table)
            files[runs] = self.blocks.file[blocks]
        return files

    @functools.cached_property
    def _rows_of_blocks(self) -> dict[tuple[int, int], np.ndarray]:
        """For each (table, slot column), the index in ``blocks`` of the block of each target."""
        order = np.lexsort((self.blocks.target, self.blocks.column, self.blocks.table))
        kinds = np.stack([self.blocks.table[order], self.blocks.column[order]], axis=1)
        starts = np.flatnonzero(np.any(np.diff(kinds, axis=0, prepend=-1) != 0, axis=1))
        pieces = np.split(order, starts[1:])
        return {(int(kinds[start, 0]), int(kinds[start, 1])): rows for start, rows in zip(starts, pieces, strict=True)}

    def blocks_of(self, table: int, column: int) -> np.ndarray:
        """Return the indices in ``blocks`` of one slot of a table, by target."""
        return self._rows_of_blocks[table, column]
