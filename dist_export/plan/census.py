"""Hold the counts of the id columns: the rows that go to each target. Data and pure functions; ``transfer/`` reads the ids."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint, Memory
from dist_export.errors import CheckpointError, PlanError
from dist_export.formats.tuning import STANDARD
from dist_export.plan.target_slices import Targets


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Census:
    """Counts of some or all parts.

    ``part``, ``granule``, ``target`` and ``rows`` (int64) are parallel and sorted in this order. Runs without rows are
    omitted. The other columns are parallel to ``counted``.
    """

    part: np.ndarray
    granule: np.ndarray
    """int64: row within the part // ``granule_rows``, so that several ranks can gather from one part."""
    target: np.ndarray
    rows: np.ndarray
    counted: np.ndarray
    """int64: the parts that were counted, sorted."""
    misplaced: np.ndarray
    """int64: the misplaced rows of each part."""
    id_sum: np.ndarray
    """uint64: the sum of the mixed ids, modulo 2**64. Moving rows between parts does not change the total."""
    pruned: PrunedRows | None = None
    """Counts of pruned rows; None if there are no rules. ``rows`` does not include pruned rows. ``misplaced`` and
    ``id_sum`` do, because they cover all rows of the source."""
    granule_rows: int = STANDARD.granule_rows


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PrunedRows:
    """Counts of pruned rows, as columns parallel to ``Census.counted``."""

    rows: np.ndarray
    """int64, (n, rules): the column is the index of the rule among the rules of the part's table."""
    misplaced: np.ndarray
    """int64, (n, rules): those of ``rows`` that are misplaced."""
    id_sum: np.ndarray
    """uint64: the sum of their mixed ids, modulo 2**64."""


def prune_none(num_parts: int, most_rules: int) -> PrunedRows:
    """Return the counts of parts without pruned rows. ``most_rules`` is the largest number of rules of a table."""
    return PrunedRows(
        rows=np.zeros((num_parts, most_rules), np.int64),
        misplaced=np.zeros((num_parts, most_rules), np.int64),
        id_sum=np.zeros(num_parts, np.uint64),
    )


class UniqueTask(NamedTuple):
    """One task of the search for duplicates: the ids of ``parts`` whose mixed bits begin with ``bucket``."""

    table: int
    parts: tuple[int, ...]
    bucket: int
    bucket_bits: int


def merge_censuses(shares: Sequence[Census]) -> Census:
    """Join the shares of all ranks into one census. Its order is that of the parts and does not depend on the shares."""
    runs = np.stack(
        [np.concatenate([getattr(s, name) for s in shares]) for name in ("part", "granule", "target", "rows")]
    )
    runs = runs[:, np.lexsort((runs[2], runs[1], runs[0]))]
    counted = np.concatenate([share.counted for share in shares])
    order = np.argsort(counted)
    return Census(
        part=runs[0],
        granule=runs[1],
        target=runs[2],
        rows=runs[3],
        counted=counted[order],
        misplaced=np.concatenate([share.misplaced for share in shares])[order],
        id_sum=np.concatenate([share.id_sum for share in shares])[order],
        pruned=_merge_pruned(shares, order),
        granule_rows=shares[0].granule_rows,
    )


def _merge_pruned(shares: Sequence[Census], order: np.ndarray) -> PrunedRows | None:
    most_rules = max((share.pruned.rows.shape[1] for share in shares if share.pruned is not None), default=None)
    if most_rules is None:
        return None
    found = [share.pruned or prune_none(len(share.counted), most_rules) for share in shares]
    return PrunedRows(
        rows=np.concatenate([its.rows for its in found])[order],
        misplaced=np.concatenate([its.misplaced for its in found])[order],
        id_sum=np.concatenate([its.id_sum for its in found])[order],
    )


def leave_out(census: Census, *, part: np.ndarray, row: np.ndarray, target: np.ndarray, where: str) -> Census:
    """Return the census without these rows (int64: part, row within the part, target) in its counts by target.

    ``misplaced`` and ``id_sum`` still cover all rows.

    Raises:
        CheckpointError: there are more rows to leave out than were counted. The source at ``where`` changed in between.
    """
    runs = np.stack([census.part, census.granule, census.target, census.rows])
    left_out = _count_runs(part, row // census.granule_rows, target) * [[1], [1], [1], [-1]]
    runs = _sum_runs(np.concatenate([runs, left_out], 1))
    if (runs[3] < 0).any():
        raise CheckpointError(f"{where} changed while it was being read; export a checkpoint that is finished")
    part, granule, target, rows = runs[:, runs[3] > 0]
    return replace(census, part=part, granule=granule, target=target, rows=rows)


def _count_runs(part: np.ndarray, granule: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Count rows by part, granule and target (int64 (4, n), sorted), without copying all columns at once."""
    order = np.lexsort((target, granule, part))
    is_first = np.zeros(len(order), bool)
    is_first[:1] = True
    for column in (part, granule, target):
        ordered = column[order]
        is_first[1:] |= ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    first = order[starts]
    return np.stack([part[first], granule[first], target[first], np.diff(starts, append=len(order))])


def _sum_runs(runs: np.ndarray) -> np.ndarray:
    """Sort runs (int64 (4, n)) and add up runs of the same part, granule and target."""
    runs = runs[:, np.lexsort((runs[2], runs[1], runs[0]))]
    starts = np.flatnonzero(np.any(np.diff(runs[:3], axis=1, prepend=-1) != 0, axis=0))
    return np.concatenate([runs[:3, starts], np.add.reduceat(runs[3:], starts, axis=1)])


def share_parts(checkpoint: Checkpoint, num_shares: int, *, among: np.ndarray | None = None) -> list[list[int]]:
    """Split the parts into shares for counting, balanced by rows. A share takes parts in file order, to open few files.

    ``among`` (int64) are the parts to split; by default the parts of all hash tables.
    """
    if checkpoint.memory is not None:
        return _share_by_owner(checkpoint, checkpoint.memory, num_shares, among)
    parts, blocks = checkpoint.parts, checkpoint.blocks
    order = np.lexsort((blocks.offset[:, 0], blocks.file[:, 0])) if len(parts) else np.zeros(0, np.int64)
    if among is not None:
        order = order[np.isin(order, among)]
    elif len(order):
        order = order[np.array([table.is_hashed for table in checkpoint.tables], bool)[parts.table[order]]]
    costs = parts.rows[order] + 1  # an empty part costs something too
    middles = np.cumsum(costs) - costs / 2
    share = np.minimum(middles * num_shares / max(int(costs.sum()), 1), num_shares - 1).astype(np.int64)
    edges = np.searchsorted(share, np.arange(num_shares + 1))
    return [np.sort(order[first:last]).tolist() for first, last in itertools.pairwise(edges.tolist())]


def ranks_of_parts(shares: Sequence[Sequence[int]], threads: int, num_parts: int) -> np.ndarray:
    """Return the rank (int64) that counts each part; -1 if none does. ``shares``: the parts of each thread of each rank."""
    ranks = np.full(num_parts, -1, np.int64)
    for number, share in enumerate(shares):
        ranks[list(share)] = number // threads
    return ranks


def _share_by_owner(
    checkpoint: Checkpoint, memory: Memory, num_shares: int, among: np.ndarray | None
) -> list[list[int]]:
    """Split parts in memory among the threads of the ranks that hold them. No other rank can read them."""
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    threads = num_shares // memory.world_size
    dealt = [0] * num_shares
    is_hashed = np.array([table.is_hashed for table in checkpoint.tables], bool)
    parts = np.flatnonzero(is_hashed[checkpoint.parts.table]) if among is None else np.sort(among)
    for part in parts.tolist():
        owner = int(memory.owner[_id_file(checkpoint, part)])
        its = range(owner * threads, (owner + 1) * threads)
        least = min(its, key=dealt.__getitem__)
        shares[least].append(part)
        dealt[least] += int(checkpoint.parts.rows[part]) + 1
    return shares


def _id_file(checkpoint: Checkpoint, part: int) -> int:
    """Return the file of a part's ids. If it has no ids, return the file of its first stored slot or strip."""
    files = checkpoint.blocks.file[part]
    stored = files[files >= 0]
    if len(stored):
        return int(stored[0])
    return int(checkpoint.strips.file[checkpoint.strips.of(part, 1)[0]])


def deal_unique_tasks(
    checkpoint: Checkpoint, tasks: Sequence[UniqueTask], rank: int, world_size: int
) -> list[UniqueTask]:
    """Return the tasks of one rank: every n-th task, or for a checkpoint in memory the tasks whose ids the rank holds.

    Raises:
        PlanError: a task compares ids that several ranks hold in memory.
    """
    memory = checkpoint.memory
    if memory is None:
        return list(tasks[rank::world_size])
    mine = []
    for task in tasks:
        parts = [part for part in task.parts if checkpoint.parts.rows[part]]
        owners = sorted({int(memory.owner[_id_file(checkpoint, part)]) for part in parts})
        if len(owners) > 1:
            slices = [checkpoint.parts.slice_of(part) for part in parts[:2]]
            raise PlanError(
                f"table {checkpoint.tables[task.table].name!r} lies in the memory of ranks {', '.join(map(str, owners))}, and "
                "some rows are outside the slice of their rank, or the slices overlap (the first two are "
                f"{' and '.join(f'{c.begin}:{c.end} of {c.size}' for c in slices)}), so an id may stand on two of them. A "
                "table states its slice as RecIS's Slice in the attribute slice; without one each rank counts as the "
                "holder of its even share. Save a checkpoint and export that"
            )
        if owners == [rank]:
            mine.append(task._replace(parts=tuple(parts)))
    return mine


def plan_unique_tasks(checkpoint: Checkpoint, census: Census, *, held_ids: int) -> list[UniqueTask]:
    """Return the search for duplicates that remains after each part of up to ``held_ids`` rows was searched alone.

    Disjoint slices without misplaced rows prove that no id is in two parts. If slices overlap or rows are misplaced, all
    parts of the table are searched together. Ids that do not fit into memory at once are searched in buckets.
    """
    tasks = []
    for table, meta in enumerate(checkpoint.tables):
        if not meta.has_ids:
            continue  # row numbers are unique
        groups = [
            group
            for parts in _split_by_layer(checkpoint, table)
            for group in _group(checkpoint, census, parts, held_ids)
        ]
        for group in groups:
            rows = int(checkpoint.parts.rows[list(group)].sum())
            bits = max(0, int(np.ceil(np.log2(max(1, 1.25 * rows / held_ids)))))
            tasks += [UniqueTask(table, group, bucket, bits) for bucket in range(1 << bits)]
    return tasks


def _split_by_layer(checkpoint: Checkpoint, table: int) -> list[np.ndarray]:
    """Return the parts (int64) of a table among which an id is to be there once."""
    parts = np.array(checkpoint.parts.of_table(table), np.int64)
    layers = checkpoint.parts.layers_of(parts)
    return [parts[layers == layer] for layer in np.unique(layers).tolist()]


def _group(checkpoint: Checkpoint, census: Census, parts: np.ndarray, held_ids: int) -> list[tuple[int, ...]]:
    """Return groups of parts, each of which may have an id twice as far as the census tells."""
    begin, end = checkpoint.parts.begin[parts], checkpoint.parts.end[parts]
    is_disjoint = bool((begin[1:] >= end[:-1]).all())  # parts come in the order of their slices
    is_chosen = checkpoint.dump is not None  # of each key one row, whatever file it is in
    if is_chosen or (is_disjoint and not census.misplaced[parts].any()):
        return [(part,) for part in parts.tolist() if checkpoint.parts.rows[part] > held_ids]
    return [tuple(parts.tolist())]


def count_row_indexed_rows(
    checkpoint: Checkpoint, targets: Sequence[Targets], *, granule_rows: int = STANDARD.granule_rows
) -> Census:
    """Return the census of all row-indexed tables. The slices give the counts, so nothing is read."""
    parts = checkpoint.parts
    is_row_indexed = np.array([not table.is_hashed for table in checkpoint.tables], bool)
    counted = np.flatnonzero(is_row_indexed[parts.table]) if len(parts) else np.zeros(0, np.int64)
    runs = [np.zeros((4, 0), np.int64)]
    for part in counted.tolist():
        begin, rows = parts.first_row_of(part), int(parts.rows[part])
        edges = np.array([s.begin for s in targets[parts.table[part]].slices], np.int64)
        inner = edges[(edges > begin) & (edges < begin + rows)]
        granules = np.arange(begin, begin + rows, granule_rows)
        cuts = np.unique(np.concatenate([inner, granules]))
        target = np.searchsorted(edges, cuts, side="right") - 1
        lengths = np.diff(cuts, append=begin + rows)
        runs.append(np.stack([np.full_like(cuts, part), (cuts - begin) // granule_rows, target, lengths]))
    columns = np.concatenate(runs, axis=1)
    return Census(
        part=columns[0],
        granule=columns[1],
        target=columns[2],
        rows=columns[3],
        counted=counted,
        misplaced=np.zeros(len(counted), np.int64),
        id_sum=np.zeros(len(counted), np.uint64),
        granule_rows=granule_rows,
    )


def count_rows_by_target(checkpoint: Checkpoint, targets: Sequence[Targets], census: Census) -> list[np.ndarray]:
    """Return for each table the number of rows (int64) of each target."""
    table_of_run = checkpoint.parts.table[census.part]
    counts = []
    for table, target in enumerate(targets):
        runs = table_of_run == table
        counts.append(
            np.bincount(census.target[runs], weights=census.rows[runs], minlength=len(target.slices)).astype(np.int64)
        )
    return counts
