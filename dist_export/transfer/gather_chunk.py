"""Rows of a source that are moved together: pieces of neighbouring rows, the targets that own them, and those that are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dist_export.formats.recis import hash_slots
from dist_export.plan.casts import cast_of
from dist_export.plan.gathers import Gather
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.plan import SparsePlan


class Piece(NamedTuple):
    """Rows of one part."""

    part: int
    first_row: int
    num_rows: int
    gather: int
    """Index into ``SparsePlan.gathers``."""
    target: int | None
    """The target of all rows of that gather, in their order; None if there are several targets, or rows that do not go."""


class Chunk:
    """Rows of one table that are moved together, and the next row to write in each target."""

    def __init__(self, plan: SparsePlan, gather: Gather, budget: MemoryBudget) -> None:
        self.table = int(plan.checkpoint.parts.table[gather.part])
        self.columns = gather.columns
        self._part = -1
        self._plan = plan
        stored = self._stored = plan.checkpoint.tables[self.table].slots
        slots = [slot for slot in plan.slots_of(self.table) if slot.column in gather.columns]
        self.casts = {slot.column: cast for slot in slots if (cast := cast_of(stored[slot.column], slot)) is not None}
        widest = max(max(slot.row_bytes, stored[slot.column].row_bytes) for slot in slots)
        num_targets = len(plan.targets[self.table].slices)
        is_delta = plan.pruning is not None and plan.pruning.same is not None
        is_long = is_delta or plan.checkpoint.directory.s3 is not None
        count_rows = budget.gather_many_rows if is_long else budget.gather_rows
        self._step = max((budget.cast_rows(cast.dim) for cast in self.casts.values()), default=1)
        self._capacity = max(1, count_rows(widest, num_targets) // self._step) * self._step
        self.pieces: list[Piece] = []
        self.num_rows = 0
        """The number of rows in ``pieces``."""
        self.rows_in = np.empty(self._capacity * widest, np.uint8)
        self.rows_out = np.empty(self._capacity * widest, np.uint8)
        self.next_rows = np.zeros(num_targets, np.int64)
        """The first row of each target that the rows in ``pieces`` fill."""
        self._planned = np.full(num_targets, -1, np.int64)
        """The row of each target after the planned gathers; -1 for a target without rows so far."""

    @property
    def num_free(self) -> int:
        """The number of rows that still fit."""
        return self._capacity - self.num_rows

    def stored_bytes(self, column: int) -> int:
        """Return the bytes of a row of a slot in the source."""
        return self._stored[column].row_bytes

    def room_for(self, left: int) -> int:
        """Return how many of ``left`` rows of a gather to add: all, or as many whole blocks of a cast as fit."""
        return left if left <= self.num_free else self.num_free // self._step * self._step

    def add(self, piece: Piece) -> None:
        """Add rows. They must fit."""
        self.pieces.append(piece)
        self.num_rows += piece.num_rows

    def moved(self, counts: np.ndarray) -> None:
        """Remove all rows after they are written. ``counts`` are the rows that each target got."""
        self.next_rows += counts
        self.pieces.clear()
        self.num_rows = 0

    def follows(self, gather: Gather) -> bool:
        """Return whether the rows of a gather directly follow the planned rows in every target."""
        if int(self._plan.checkpoint.parts.table[gather.part]) != self.table or gather.columns != self.columns:
            return False
        is_in_memory = self._plan.checkpoint.memory is not None  # then this rank may hold other columns of each part
        if is_in_memory and self._part not in (-1, gather.part):
            return False
        planned = self._planned[gather.targets]
        return bool(((planned < 0) | (planned == gather.first_target_rows)).all())

    def plan_rows(self, gather: Gather) -> None:
        """Plan the rows of each target that a gather fills."""
        self._part = gather.part
        is_new = self._planned[gather.targets] < 0
        self.next_rows[gather.targets[is_new]] = gather.first_target_rows[is_new]
        self._planned[gather.targets] = gather.first_target_rows + gather.counts


def find_owners(
    plan: SparsePlan, table: int, ids: np.ndarray, pieces: Sequence[Piece], picked: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the target of rows of a chunk, in the dtype of ``Targets.owners``, and their ids.

    ``ids`` are those of all rows; ``picked`` (int64) are the rows that are wanted, None for all.
    """
    target_of = plan.targets[table]
    if not target_of.has_overlap:
        wanted = ids if picked is None else ids[picked]
        return target_of.count_owners(wanted, own=None)[0], wanted
    positions = hash_slots(ids, target_of.size)
    owners, begin = [], 0  # a row stays in the slice of its part, so each piece is looked up separately
    for part, _, num_rows, *_ in pieces:
        own = target_of.index_of(plan.checkpoint.parts.slice_of(part))
        owners.append(target_of.owners_of(positions[begin : begin + num_rows], own=own))
        begin += num_rows
    found = np.concatenate(owners)
    return (found, ids) if picked is None else (found[picked], ids[picked])


def find_kept(plan: SparsePlan, pieces: Sequence[Piece], is_pruned: np.ndarray | None) -> np.ndarray | None:
    """Return the rows of a chunk that are moved (int64); None if all are. ``is_pruned``: bool, by row of the chunk."""
    dropped, begin = [], 0
    for part, first_row, num_rows, *_ in pieces:
        rows = plan.dropped.rows_in(part, first_row, num_rows)
        if len(rows):
            dropped.append(begin + rows)
        begin += num_rows
    if not dropped and is_pruned is None:
        return None
    is_kept = np.ones(begin, bool) if is_pruned is None else ~is_pruned
    for rows in dropped:
        is_kept[rows] = False
    return np.flatnonzero(is_kept)
