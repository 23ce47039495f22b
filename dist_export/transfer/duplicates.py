"""Find the rows of duplicates: collect duplicate ids, read the id columns again to find their rows, and send these to all ranks.

Only tables with duplicates, found by the census or by the search after it, are read again. They are read once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from dist_export.checkpoint.id_reader import first_source_of, open_sources
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.row_reader import RowReader
from dist_export.errors import CheckpointError, PlanError
from dist_export.formats.recis import mix
from dist_export.formats.tuning import Tuning
from dist_export.ids.columns import IdRun, read_runs
from dist_export.plan.census import share_parts
from dist_export.plan.memory_budget import DROPPED_ROW_BYTES, MemoryBudget
from dist_export.plan.prune import Pruning
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.transfer.prune_filter import PruneReader

_EXCHANGED_ROWS = 1 << 16
"""Rows that all ranks together exchange at a time. gloo allocates the size of the largest share for every rank."""

_MAX_SIEVE_BITS = 20
"""Bits of an index into a sieve. A sieve of 2**20 entries stays in a core's cache."""


class DuplicateIds:
    """Collects duplicates, or refuses the first one. Safe to use from any thread of a rank."""

    def __init__(self, checkpoint: Checkpoint, *, most: int | None) -> None:
        """Collect nothing yet. ``most``: the most ids to collect; None refuses the first duplicate."""
        self._checkpoint = checkpoint
        self._most = most
        self._found: list[np.ndarray] = []
        self._count = 0
        self._lock = threading.Lock()

    def add(self, ids: np.ndarray, parts: Sequence[int]) -> None:
        """Add the ids (int64, sorted) of parts of one table. Ids with an equal neighbour are duplicates.

        Raises:
            CheckpointError: there is a duplicate, and ``most`` is None.
            PlanError: more duplicates were collected than memory may hold.
        """
        is_twice = ids[1:] == ids[:-1]
        if not is_twice.any():
            return
        if self._most is None:
            self._refuse(int(ids[:-1][is_twice][0]), int(np.count_nonzero(is_twice)), parts)
            return
        table = int(self._checkpoint.parts.table[parts[0]])
        twice = np.unique(ids[:-1][is_twice])
        with self._lock:
            self._found.append(np.stack([np.full_like(twice, table), twice]))
            self._count += len(twice)
            # the census and the search may both find an id, so only twice as many prove that there are too many
            if self._count > 2 * self._most:
                raise too_many(self._checkpoint, [table], self._most, None)

    def collected(self) -> np.ndarray:
        """Return table and id (int64 (2, n), sorted, each pair once) of all collected duplicates, and forget them."""
        found = np.concatenate([np.zeros((2, 0), np.int64), *self._found], axis=1)
        self._found.clear()
        return _sort_once(found)

    def _refuse(self, duplicates: int, surplus: int, parts: Sequence[int]) -> None:
        checkpoint = self._checkpoint
        table = checkpoint.tables[checkpoint.parts.table[parts[0]]].name
        files = sorted({first_source_of(checkpoint, part) for part in parts})
        more = f" (or another of {len(files)} files)" if len(files) > 1 else ""
        raise CheckpointError(
            f"{files[0]}{more}: table {table!r} holds the id "
            f"{duplicates} twice ({surplus:,} rows too many among those compared); a loader would keep either row. "
            "Save the checkpoint anew, or set on_duplicate: first (or last) with filter_sparse_opt: true, which keeps "
            "one row of each id"
        )


def find_duplicate_rows(
    ranks: Ranks,
    checkpoint: Checkpoint,
    duplicates: DuplicateIds,
    budget: MemoryBudget,
    pruning: Pruning | None = None,
) -> np.ndarray:
    """Return part, row and id (int64 (3, n)) of all rows of duplicates, in any order. All ranks.

    Pruned rows are not among them. So the row of an id that is kept is one that the rules keep.

    Raises:
        PlanError: the rows beyond one of each id are more than ``limits.dropped_rows``.
    """
    most = budget.dropped_rows

    def check_ids(count: int) -> None:
        if count > 2 * most:  # as in DuplicateIds.add, two ranks may find one id
            raise too_many(checkpoint, [], most, None)

    ids = _sort_once(_exchange(ranks, "ids that stand twice", duplicates.collected, check_ids))
    if not ids.shape[1]:
        return np.zeros((3, 0), np.int64)
    parts = np.flatnonzero(np.isin(checkpoint.parts.table, ids[0]))
    shares = share_parts(checkpoint, ranks.world_size * budget.threads, among=parts)
    mine = shares[ranks.rank * budget.threads : (ranks.rank + 1) * budget.threads]
    tables, firsts = np.unique(ids[0], return_index=True)
    sieves = {table: _Sieve(its) for table, its in zip(tables.tolist(), np.split(ids[1], firsts[1:]), strict=True)}

    def look() -> np.ndarray:
        room = most + ids.shape[1]
        found = run_threads(
            lambda share: _locate(checkpoint, np.array(share, np.int64), sieves, room, most, pruning, budget.tuning),
            mine,
        )
        return np.concatenate([np.zeros((3, 0), np.int64), *(piece for pieces in found for piece in pieces)], axis=1)

    def check_rows(count: int) -> None:
        if count - ids.shape[1] > most:
            raise too_many(checkpoint, tables.tolist(), most, count - ids.shape[1])

    return _exchange(ranks, "rows whose id stands twice", look, check_rows)


def too_many(checkpoint: Checkpoint, tables: Sequence[int], most: int, needed: int | None) -> PlanError:
    """Return the error for more dropped rows than memory may hold. ``needed`` is their number, or None if it is not known."""
    memory = "max_memory" if needed is None else f"max_memory to {-(-needed * DROPPED_ROW_BYTES >> 20)}MiB"
    found = f"more than {most:,}" if needed is None else f"{needed:,}"
    others = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
    where = f" in table {checkpoint.tables[tables[0]].name!r}{others}" if tables else ""
    return PlanError(
        f"{checkpoint.directory.url}: {found} rows{where} are to be left behind, for their id stands more than once, and "
        f"max_memory has room for {most:,} ({DROPPED_ROW_BYTES} bytes each). Raise {memory}, or save the checkpoint anew"
    )


def _locate(
    checkpoint: Checkpoint,
    parts: np.ndarray,
    sieves: dict[int, _Sieve],
    room: int,
    most: int,
    pruning: Pruning | None,
    tuning: Tuning,
) -> list[np.ndarray]:
    """Return part, row and id (int64 (3, n), in pieces) of the rows in these parts whose id is in the sieve of their table.

    Raises:
        PlanError: there are more than ``room`` such rows, which proves that more than ``most`` rows would be dropped.
    """
    found: list[np.ndarray] = []
    count = 0
    file, offset = checkpoint.blocks.file[parts, 0], checkpoint.blocks.offset[parts, 0]
    with open_sources(checkpoint) as readers, RowReader(checkpoint) as slots:
        prune = PruneReader(checkpoint, pruning, slots, piece_bytes=tuning.rule_bytes) if pruning else None
        for run in read_runs(readers, file, offset, checkpoint.parts.rows[parts], run_rows=tuning.run_rows):
            rows = _find_in_run(run, checkpoint.parts.table[parts[run.blocks]], sieves)
            if not len(rows):
                continue
            block = np.searchsorted(run.starts, rows, side="right") - 1
            its_part = parts[run.blocks[block]]
            its = np.stack([its_part, run.first_row + rows - run.starts[block], run.ids[rows]])
            if prune is not None:
                its = _without_pruned(its, prune)
            found.append(its)
            count += its.shape[1]
            if count > room:
                raise too_many(checkpoint, [int(checkpoint.parts.table[its_part[0]])], most, None)
    return found


def _without_pruned(found: np.ndarray, prune: PruneReader) -> np.ndarray:
    """Return the rows (int64 (3, n), ordered by part) that the rules keep."""
    edges = np.flatnonzero(np.diff(found[0], prepend=-1))
    pruned = [prune.is_pruned(int(its[0, 0]), its[1], its[2]) for its in np.split(found, edges[1:], axis=1)]
    return found[:, ~np.concatenate(pruned)]


def _find_in_run(run: IdRun, tables: np.ndarray, sieves: dict[int, _Sieve]) -> np.ndarray:
    """Return the indices in a run (int64, sorted) of ids that are in the sieve of their table."""
    if len(run.blocks) == 1:
        return sieves[int(tables[0])].find(run.ids)
    edges = np.flatnonzero(np.diff(tables)) + 1  # neighbouring blocks of one table are searched together
    begins = [0, *run.starts[edges].tolist(), len(run.ids)]
    firsts = [0, *edges.tolist()]
    found = [
        begin + sieves[int(tables[first])].find(run.ids[begin:end])
        for first, begin, end in zip(firsts, begins[:-1], begins[1:], strict=True)
    ]
    return np.concatenate(found)


class _Sieve:
    """Finds a few ids among many. A small array rules out most ids, and the others are searched for.

    Safe to use from any thread.
    """

    def __init__(self, ids: np.ndarray, *, most_bits: int = _MAX_SIEVE_BITS) -> None:
        """Build the sieve for ``ids``: int64, sorted, without duplicates, at least one. ``most_bits``: of an index into it."""
        self._ids = ids
        bits = min(most_bits, len(ids).bit_length() + 4)  # few ids get a small sieve: there may be many tables
        self._shift = np.uint64(64 - bits)
        self._may_hold = np.zeros(1 << bits, bool)
        self._may_hold[(mix(ids) >> self._shift).view(np.int64)] = True

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Return the indices (int64, sorted) of ids that are in the sieve's list."""
        candidates = np.flatnonzero(self._may_hold[(mix(ids) >> self._shift).view(np.int64)])
        its = ids[candidates]
        positions = np.minimum(np.searchsorted(self._ids, its), len(self._ids) - 1)
        found: np.ndarray = candidates[self._ids[positions] == its]
        return found


def _exchange(ranks: Ranks, what: str, find: Callable[[], np.ndarray], check: Callable[[int], None]) -> np.ndarray:
    """Return the columns (int64 (k, n)) that ``find`` returns on all ranks, joined. All ranks.

    Ranks exchange a few rows at a time. Before that, ``check`` gets the total number of rows, and may raise.
    """
    mine = ranks.run(f"find {what}", find)
    counts = ranks.all_gather(f"count {what}", lambda: mine.shape[1])
    ranks.run(f"make room for {what}", lambda: check(sum(counts)))
    if ranks.world_size == 1:
        return mine
    joined = np.empty((len(mine), sum(counts)), np.int64)
    step, filled = max(1, _EXCHANGED_ROWS // ranks.world_size), 0
    for first in range(0, max(counts), step):
        for piece in ranks.all_gather(f"exchange {what}", mine[:, first : first + step].copy):
            joined[:, filled : filled + piece.shape[1]] = piece
            filled += piece.shape[1]
    return joined


def _sort_once(pairs: np.ndarray) -> np.ndarray:
    """Sort pairs of table and id (int64 (2, n)), and return each pair once."""
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    is_first = np.ones(pairs.shape[1], bool)
    is_first[1:] = (np.diff(pairs, axis=1) != 0).any(axis=0)
    return pairs[:, is_first]
