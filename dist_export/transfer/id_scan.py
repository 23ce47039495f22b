"""Read the id columns once: count rows by target, find misplaced rows and duplicates. Keeps to the memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_export.checkpoint.id_reader import open_sources, read_id_runs, read_ids
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.row_reader import RowReader
from dist_export.formats.recis import hash_slots, mix
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.ids.columns import IdRun
from dist_export.ids.duplicates import HeldIds
from dist_export.kernels.protocol import IdSweep
from dist_export.kernels.selection import select_kernels
from dist_export.plan.census import Census, PrunedRows, UniqueTask, prune_none
from dist_export.plan.prune import KEPT, Pruning
from dist_export.plan.target_slices import Targets
from dist_export.transfer.duplicates import DuplicateIds
from dist_export.transfer.prune_filter import PruneReader


def take_census(
    checkpoint: Checkpoint,
    targets: Sequence[Targets],
    parts: Sequence[int],
    *,
    held_ids: int,
    duplicates: DuplicateIds | None = None,
    pruning: Pruning | None = None,
    tuning: Tuning = STANDARD,
) -> Census:
    """Count a share of the parts. Each rank has its own share and issues no collective.

    Args:
        held_ids: the most ids (8 bytes each) to hold at once in the search for duplicates. :func:`check_unique` searches
            larger parts.
        repeated: collects duplicates; by default the first one is an error.
        pruning: rules of ``prune``. Pruned rows are counted separately. Only slots that rules read are read.
        tuning: the sizes of runs of ids and of granules.

    Raises:
        CheckpointError: one part, or parts that are read together, have a duplicate, and that is an error.
    """
    numbers = np.array(parts, np.int64)
    with open_sources(checkpoint) as readers, RowReader(checkpoint) as rows:
        prune = PruneReader(checkpoint, pruning, rows, piece_bytes=tuning.rule_bytes) if pruning else None
        pruned = prune_none(len(numbers), pruning.most_rules) if pruning else None
        counter = _Counter(
            checkpoint,
            targets,
            numbers,
            held_ids,
            duplicates or DuplicateIds(checkpoint, most=None),
            prune,
            pruned,
            tuning,
        )
        if len(numbers):  # a checkpoint without tables has no column of ids
            for run in read_id_runs(checkpoint, readers, numbers, run_rows=tuning.run_rows):
                counter.count(run)
    return counter.census()


def check_unique(
    checkpoint: Checkpoint,
    tasks: Sequence[UniqueTask],
    *,
    held_ids: int,
    duplicates: DuplicateIds | None = None,
    run_rows: int = STANDARD.run_rows,
) -> None:
    """Search a share of the tasks for duplicates. ``repeated`` collects them; by default the first one is an error."""
    for task in tasks:
        _search(checkpoint, task, held_ids, duplicates or DuplicateIds(checkpoint, most=None), run_rows)


_FIRST = np.zeros(1, np.int64)
"""Where the only block of a run begins."""

_COUNTED = 0
"""Marks a block that is already counted. No object has this ``id()``."""


class _Counter:
    """Counts the rows of runs of ids, and searches them for duplicates."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        targets: Sequence[Targets],
        parts: np.ndarray,
        held_ids: int,
        duplicates: DuplicateIds,
        prune: PruneReader | None,
        pruned: PrunedRows | None,
        tuning: Tuning,
    ) -> None:
        self._checkpoint = checkpoint
        self._granule_rows = tuning.granule_rows
        self._prune = prune
        self._pruned = pruned
        self._duplicates = duplicates
        self._targets = targets
        self._parts = parts
        rows = checkpoint.parts.rows[parts]
        has_ids = np.array([table.has_ids for table in checkpoint.tables], bool)[checkpoint.parts.table[parts]]
        self._is_held = (rows > tuning.run_rows) & (rows <= held_ids) & has_ids
        """Which parts come in several runs. Their ids are held until the last run."""
        self._held = HeldIds(int(rows[self._is_held].max(initial=0)))
        self._runs: list[np.ndarray] = []
        self._misplaced = np.zeros(len(parts), np.int64)
        self._id_sum = np.zeros(len(parts), np.uint64)
        self._counts = np.zeros(0, np.int64)
        """Rows by target in the current granule of a large part."""

    def census(self) -> Census:
        """Return the counts."""
        columns = np.concatenate([np.zeros((4, 0), np.int64), *self._runs], axis=1)
        return Census(
            part=columns[0],
            granule=columns[1],
            target=columns[2],
            rows=columns[3],
            counted=self._parts,
            misplaced=self._misplaced,
            id_sum=self._id_sum,
            pruned=self._pruned,
            granule_rows=self._granule_rows,
        )

    def count(self, run: IdRun) -> None:
        """Count the next run."""
        if len(run.blocks) == 1:
            self._count_piece(run)
            self._search_piece(run)
            return
        # tables with the same slices are counted together
        parts = self._parts[run.blocks]
        rows = self._checkpoint.parts.rows[parts]
        tables = self._checkpoint.parts.table[parts]
        kinds = np.array([id(self._targets[table]) for table in tables.tolist()])
        if self._prune is not None:
            for block in np.flatnonzero(self._prune.has_rules[tables]).tolist():
                its = run.ids[run.starts[block] : run.starts[block] + rows[block]]
                self._count_piece(IdRun(its, run.blocks[block : block + 1], np.zeros(1, np.int64), 0))
                kinds[block] = _COUNTED
        for kind in set(kinds.tolist()) - {_COUNTED}:
            chosen = np.flatnonzero(kinds == kind)
            is_chosen = np.repeat(kinds == kind, rows)
            ids = run.ids if len(chosen) == len(parts) else run.ids[is_chosen]
            self._count_small(run.blocks[chosen], ids, self._targets[int(tables[chosen[0]])])
        layers = self._checkpoint.parts.layers_of(parts)
        groups = tables * (int(layers.max()) + 1) + layers
        group_of_row = np.repeat(groups, rows)
        ids = run.ids
        if any(self._checkpoint.tables[table].empty_id is not None for table in set(tables.tolist())):
            has_id = _has_id(self._checkpoint, tables, rows, ids)
            ids, group_of_row = ids[has_id], group_of_row[has_id]
        if select_kernels().has_duplicates(ids, group_of_row):
            for group in np.unique(groups).tolist():
                its_parts = tuple(parts[groups == group].tolist())
                self._duplicates.add(np.sort(ids[group_of_row == group]), its_parts)

    def _leave_out_pruned(self, row: int, first_row: int, ids: np.ndarray, size: int, sweep: IdSweep) -> np.ndarray:
        """Return the ids of a piece of one block that the rules keep. Count the others as pruned.

        ``size``: the number of positions. ``sweep``: what a sweep over all of these ids has found.
        """
        part = int(self._parts[row])
        if self._prune is None or not self._prune.has_rules[self._checkpoint.parts.table[part]]:
            return ids
        codes = self._prune.rules(part, first_row, ids)
        is_kept = codes == KEPT
        kept: np.ndarray = ids[is_kept]
        if len(kept) == len(ids):
            return ids
        assert self._pruned is not None
        for place in range(self._pruned.rows.shape[1]):
            taken = codes == place + 1
            self._pruned.rows[row, place] += np.count_nonzero(taken)
            if sweep.outside[0] and taken.any():  # seldom: most checkpoints have no misplaced row
                self._pruned.misplaced[row, place] += int(self._sweep(part, ids[taken], size).outside[0])
        self._pruned.id_sum[row : row + 1] += sweep.id_sums
        if len(kept):
            of_kept = self._sweep(part, kept, size)
            self._pruned.id_sum[row : row + 1] -= of_kept.id_sums
        return kept

    def _sweep(self, part: int, ids: np.ndarray, size: int) -> IdSweep:
        claimed = self._checkpoint.parts.slice_of(part)
        begins, ends = np.array([claimed.begin]), np.array([claimed.end])
        return select_kernels().sweep_ids(ids, _FIRST, size=size, begins=begins, ends=ends)

    def _count_piece(self, run: IdRun) -> None:
        """Count one block, or a piece of it. Usually no row is misplaced and all rows have one target."""
        row = int(run.blocks[0])
        part = int(self._parts[row])
        num_rows = int(self._checkpoint.parts.rows[part])
        target = self._targets[self._checkpoint.parts.table[part]]
        claimed = self._checkpoint.parts.slice_of(part)
        own = target.index_of(claimed)
        ids, last_row = run.ids, run.first_row + len(run.ids)
        sweep = self._sweep(part, ids, target.size)
        lowest, highest = int(sweep.lowest[0]), int(sweep.highest[0])
        self._misplaced[row : row + 1] += sweep.outside
        self._id_sum[row : row + 1] += sweep.id_sums  # as an array: a scalar would warn of the overflow
        if run.first_row % self._granule_rows == 0:
            self._counts = np.zeros(len(target.slices), np.int64)
        kept = self._leave_out_pruned(row, run.first_row, ids, target.size, sweep)
        owner = target.single_owner(lowest, highest, own=own)
        if owner is None:
            self._counts += target.count_owners(kept, own=own)[1]
        else:
            self._counts[owner] += len(kept)
        if last_row % self._granule_rows == 0 or last_row == num_rows:
            present = np.flatnonzero(self._counts)
            granule = np.full_like(present, run.first_row // self._granule_rows)
            self._runs.append(np.stack([np.full_like(present, part), granule, present, self._counts[present]]))

    def _search_piece(self, run: IdRun) -> None:
        """Search one block for duplicates, or hold a piece of it. Pruned rows are searched too."""
        row = int(run.blocks[0])
        part = int(self._parts[row])
        num_rows = int(self._checkpoint.parts.rows[part])
        last_row = run.first_row + len(run.ids)
        ids = without_empty(self._checkpoint, part, run.ids)
        if run.first_row == 0 and last_row == num_rows:
            if select_kernels().has_duplicates(ids):
                self._duplicates.add(np.sort(ids), (part,))
            return
        if self._is_held[row]:
            if run.first_row == 0:
                self._held.expect(num_rows)
            self._held.add(ids)
            if last_row == num_rows and self._held.has_duplicates():
                self._duplicates.add(self._held.sorted_ids(), (part,))

    def _count_small(self, rows_of_census: np.ndarray, ids: np.ndarray, target: Targets) -> None:
        """Count whole blocks with the same targets in one pass."""
        parts = self._checkpoint.parts
        numbers = self._parts[rows_of_census]
        rows = parts.rows[numbers]
        starts = np.cumsum(rows) - rows
        begins, ends = parts.begin[numbers], parts.end[numbers]
        sweep = select_kernels().sweep_ids(ids, starts, size=target.size, begins=begins, ends=ends)
        self._misplaced[rows_of_census] = sweep.outside
        self._id_sum[rows_of_census] = sweep.id_sums
        owners = target.count_owners(ids, own=None)[0].astype(np.int64)
        if target.has_overlap:
            signed = hash_slots(ids, target.size).view(np.int64)
            is_inside = (signed >= np.repeat(begins, rows)) & (signed < np.repeat(ends, rows))
            claimed = [target.index_of(parts.slice_of(number)) for number in numbers.tolist()]
            own = np.repeat(np.array([-1 if number is None else number for number in claimed], np.int64), rows)
            owners = np.where(is_inside & (own >= 0), own, owners)
        lowest, highest = np.minimum.reduceat(owners, starts), np.maximum.reduceat(owners, starts)
        is_whole = lowest == highest
        whole = np.flatnonzero(is_whole)
        self._runs.append(np.stack([numbers[whole], np.zeros_like(whole), lowest[whole], rows[whole]]))
        if len(whole) == len(numbers):
            return
        is_split = np.repeat(~is_whole, rows)
        local = np.repeat(np.arange(len(numbers)), rows)[is_split]
        keys, counts = np.unique(local * len(target.slices) + owners[is_split], return_counts=True)
        place, present = np.divmod(keys, len(target.slices))
        self._runs.append(np.stack([numbers[place], np.zeros_like(place), present, counts]))


def without_empty(checkpoint: Checkpoint, part: int, ids: np.ndarray) -> np.ndarray:
    """Return the ids of a part's rows without the id of empty rows, which may occur many times."""
    empty = checkpoint.tables[checkpoint.parts.table[part]].empty_id
    if empty is None:
        return ids
    found: np.ndarray = ids[ids != np.int64(empty)]
    return found


def _has_id(checkpoint: Checkpoint, tables: np.ndarray, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return which ids are not those of empty rows (bool). ``tables`` and ``rows`` are parallel to the blocks of ``ids``."""
    empty = [checkpoint.tables[table].empty_id for table in tables.tolist()]
    may_be_empty = np.repeat([number is not None for number in empty], rows)
    found: np.ndarray = ~may_be_empty | (ids != np.repeat(np.array([number or 0 for number in empty], np.int64), rows))
    return found


def _search(checkpoint: Checkpoint, task: UniqueTask, held_ids: int, duplicates: DuplicateIds, run_rows: int) -> None:
    """Search the ids of a task for duplicates. If its bucket has more than ``held_ids`` ids, search each half of it."""
    held = _collect(checkpoint, task, held_ids, run_rows)
    if held is None:
        for half in (0, 1):
            _search(
                checkpoint,
                task._replace(bucket=2 * task.bucket + half, bucket_bits=task.bucket_bits + 1),
                held_ids,
                duplicates,
                run_rows,
            )
    elif held.has_duplicates():
        duplicates.add(held.sorted_ids(), task.parts)


def _collect(checkpoint: Checkpoint, task: UniqueTask, held_ids: int, run_rows: int) -> HeldIds | None:
    """Return the ids of a task's bucket; None if there are too many."""
    held = HeldIds(min(held_ids, int(checkpoint.parts.rows[list(task.parts)].sum())))
    shift = np.uint64(64 - task.bucket_bits)
    for part in task.parts:
        for ids in read_ids(checkpoint, part, run_rows=run_rows):
            its = without_empty(checkpoint, part, ids)
            chosen = its[(mix(its) >> shift) == np.uint64(task.bucket)] if task.bucket_bits else its
            if not held.add(chosen):
                # mixing is one to one, so ids that share all 64 bits are equal
                return held if task.bucket_bits == 64 else None
    return held
