"""Read every id: check its slice, sum up the mixed ids by table, and find duplicates.

Each part is searched for duplicates while it is read. Disjoint slices without misplaced rows prove that no id is in two
parts. Without this proof, and for columns that do not fit in memory, ids are read again and searched in buckets of equal
mixed bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dist_export.errors import DistExportError
from dist_export.formats.recis import Slice, is_in_slice, mix
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.ids.columns import IdRun, read_runs
from dist_export.ids.duplicates import HeldIds
from dist_export.kernels.selection import select_kernels
from dist_export.package.shard_headers import fact_of
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders
from dist_export.verify.work_split import Work, cut

_GPU_KEYS = np.uint64((1 << 64) - 2)
"""The smaller of -1 and -2 as unsigned integers."""


class Duplicates(NamedTuple):
    """The duplicates of a table."""

    table: int
    rows: int
    """The rows beyond one for each id."""
    first: int
    """The smallest duplicate."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class IdCounts:
    """The counts of a share of the id columns. All arrays are by table or by id column."""

    id_sum: np.ndarray
    """uint64 by table: the sum of the mixed ids modulo 2**64."""
    gpu_keys: np.ndarray
    """int64 by id column: the ids that a table of RecIS on a GPU cannot hold."""
    misplaced: dict[int, tuple[int, int, int]]
    """Id column -> number of misplaced rows, the first such row, and its id."""
    duplicates: tuple[Duplicates, ...]
    """Duplicates within one part."""
    errors: tuple[tuple[str, str], ...]
    """(file, error) for files that could not be read to the end."""


class UniqueTask(NamedTuple):
    """One task of the search for duplicates: the ids of these columns whose mixed bits begin with ``bucket``."""

    table: int
    columns: tuple[int, ...]
    bucket: int
    bucket_bits: int


def cut_ids(work: Work, held_ids: int, piece_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return column, first row and rows (int64) of each piece of the id columns."""
    return cut(work.id_rows, piece_rows, most_whole=held_ids)


def count_share(
    directory: Directory, work: Work, chosen: slice, *, held_ids: int, tuning: Tuning = STANDARD
) -> IdCounts:
    """Count a run of the pieces of :func:`cut_ids`. Any rank, any thread."""
    column, first, rows = (its[chosen] for its in cut_ids(work, held_ids, tuning.verified_ids))
    counter = _Counter(work, column, first, rows, held_ids, tuning.run_rows)
    offset = work.id_offset[column] + first * 8
    errors = []
    try:
        with _open(directory, work) as readers:
            for run in read_runs(readers, work.id_file[column], offset, rows, run_rows=tuning.run_rows):
                counter.count(run)
    except (DistExportError, OSError) as error:
        errors.append(_name_error(error, work))
    return counter.counts(tuple(errors))


def proven_tables(work: Work, counts: IdCounts) -> np.ndarray:
    """Return for which tables (bool) the slices prove that no id is in two parts: disjoint slices, and no misplaced row."""
    is_proven: np.ndarray = work.is_disjoint.copy()
    is_proven[work.id_table[list(counts.misplaced)]] = False
    return is_proven


def plan_unique(work: Work, is_proven: np.ndarray, *, held_ids: int) -> list[UniqueTask]:
    """Return the remaining search for duplicates: all parts of tables without a proof, and columns too long for memory."""
    tasks = []
    order = np.argsort(work.id_table, kind="stable")
    edges = np.searchsorted(work.id_table[order], np.arange(len(is_proven) + 1)).tolist()
    for table, is_sure in enumerate(is_proven.tolist()):
        columns = order[edges[table] : edges[table + 1]]
        columns = columns[work.id_rows[columns] > 0]
        if is_sure:
            groups = [(column,) for column in columns[work.id_rows[columns] > held_ids].tolist()]
        else:
            groups = [tuple(columns.tolist())] if len(columns) else []
        for group in groups:
            rows = int(work.id_rows[list(group)].sum())
            bits = max(0, int(np.ceil(np.log2(max(1, 1.25 * rows / held_ids)))))
            tasks += [UniqueTask(table, group, bucket, bits) for bucket in range(1 << bits)]
    return tasks


def search(
    directory: Directory,
    work: Work,
    tasks: list[UniqueTask],
    *,
    held_ids: int,
    run_rows: int = STANDARD.run_rows,
) -> list[Duplicates]:
    """Search a share of the tasks. Any rank, any thread. Raises OSError or TransferError if a file cannot be read."""
    found = []
    with _open(directory, work) as readers:
        for task in tasks:
            found += _search(readers, work, task, held_ids, run_rows)
    return found


def add_counts(work: Work, shares: list[IdCounts]) -> IdCounts:
    """Join the counts of all shares. The result does not depend on how the columns were shared."""
    id_sum = np.zeros(len(work.is_disjoint), np.uint64)
    gpu_keys = np.zeros(len(work.id_rows), np.int64)
    misplaced: dict[int, tuple[int, int, int]] = {}
    for share in shares:
        id_sum += share.id_sum
        gpu_keys += share.gpu_keys
        for column, (count, row, first) in share.misplaced.items():
            known = misplaced.get(column, (0, row, first))
            misplaced[column] = (known[0] + count, *min(known[1:], (row, first)))
    return IdCounts(
        id_sum=id_sum,
        gpu_keys=gpu_keys,
        misplaced=dict(sorted(misplaced.items())),
        duplicates=tuple(duplicates for share in shares for duplicates in share.duplicates),
        errors=tuple(sorted({error for share in shares for error in share.errors})),
    )


def add_duplicates(found: list[Duplicates]) -> list[Duplicates]:
    """Join the duplicates of each table."""
    by_table: dict[int, Duplicates] = {}
    for table, rows, first in found:
        known = by_table.get(table, Duplicates(table, 0, first))
        by_table[table] = Duplicates(table, known.rows + rows, min(known.first, first))
    return [by_table[table] for table in sorted(by_table)]


class _Counter:
    """Counts runs of ids, and searches them for duplicates."""

    def __init__(
        self, work: Work, column: np.ndarray, first: np.ndarray, rows: np.ndarray, held_ids: int, run_rows: int
    ) -> None:
        self._work = work
        self._column = column
        self._first = first
        # longer columns, and tables whose slices are not disjoint, are searched later
        self._is_searched = (rows == work.id_rows[column]) & (rows <= held_ids)
        self._is_searched &= work.is_disjoint[work.id_table[column]]
        self._is_held = self._is_searched & (rows > run_rows)
        self._held = HeldIds(int(rows[self._is_held].max(initial=0)))
        self._rows = rows
        self._id_sum = np.zeros(len(work.is_disjoint), np.uint64)
        self._gpu_keys = np.zeros(len(work.id_rows), np.int64)
        self._misplaced: dict[int, tuple[int, int, int]] = {}
        self._duplicates: list[Duplicates] = []

    def counts(self, errors: tuple[tuple[str, str], ...]) -> IdCounts:
        """Return the counts."""
        return IdCounts(
            id_sum=self._id_sum,
            gpu_keys=self._gpu_keys,
            misplaced=self._misplaced,
            duplicates=tuple(self._duplicates),
            errors=errors,
        )

    def count(self, run: IdRun) -> None:
        """Count the next run: one block or a piece of it, or several whole blocks."""
        column = self._column[run.blocks]
        table = self._work.id_table[column]
        unsigned = run.ids.view(np.uint64)
        if unsigned.max() >= _GPU_KEYS:
            np.add.at(self._gpu_keys, column, _reduce(np.add, (unsigned >= _GPU_KEYS).astype(np.int64), run.starts))
        np.add.at(self._id_sum, table, self._check_slices(run, column))
        if len(run.blocks) > 1 or len(run.ids) == self._work.id_rows[column[0]]:
            self._find_duplicates(run, table)
            return
        piece = int(run.blocks[0])
        if self._is_held[piece]:
            if run.first_row == 0:
                self._held.expect(int(self._rows[piece]))
            self._held.add(run.ids)
            if run.first_row + len(run.ids) == self._rows[piece] and self._held.has_duplicates():
                self._duplicates.append(_count_duplicates(int(table[0]), self._held.sorted_ids()))

    def _check_slices(self, run: IdRun, column: np.ndarray) -> np.ndarray:
        """Note the ids that are outside the slice of their block, and return the sum of each block's mixed ids (uint64)."""
        sums = np.zeros(len(column), np.uint64)
        stops = np.append(run.starts[1:], len(run.ids))
        edges = self._work.id_slice[column]
        for size in set(edges[:, 2].tolist()):  # usually one size
            sweep = select_kernels().sweep_ids(run.ids, run.starts, size=size, begins=edges[:, 0], ends=edges[:, 1])
            sums = sweep.id_sums
            is_wrong = (sweep.outside > 0) & (edges[:, 2] == size)
            for place in np.flatnonzero(is_wrong).tolist():
                ids = run.ids[run.starts[place] : stops[place]]
                foreign = np.flatnonzero(~is_in_slice(ids, Slice(*edges[place].tolist())))
                number = int(column[place])
                row = int(self._first[run.blocks[place]]) + run.first_row + int(foreign[0])
                count, *known = self._misplaced.get(number, (0, row, int(ids[foreign[0]])))
                self._misplaced[number] = (count + len(foreign), known[0], known[1])
        return sums

    def _find_duplicates(self, run: IdRun, table: np.ndarray) -> None:
        """Find duplicates within each of several whole blocks, except blocks of tables that are searched as a whole later."""
        if not self._is_searched[run.blocks].any():
            return
        groups = None if len(run.blocks) == 1 else np.repeat(run.blocks, np.diff(np.append(run.starts, len(run.ids))))
        if not select_kernels().has_duplicates(run.ids, groups):
            return
        stops = np.append(run.starts[1:], len(run.ids)).tolist()
        is_searched = self._is_searched[run.blocks].tolist()
        columns = zip(is_searched, table.tolist(), run.starts.tolist(), stops, strict=True)
        for _, its_table, first, last in filter(lambda columns: columns[0], columns):
            ids = np.sort(run.ids[first:last])
            if (ids[1:] == ids[:-1]).any():
                self._duplicates.append(_count_duplicates(its_table, ids))


def _count_duplicates(table: int, ordered: np.ndarray) -> Duplicates:
    twice = np.flatnonzero(ordered[1:] == ordered[:-1])
    return Duplicates(table, len(twice), int(ordered[twice[0]]))


def _search(readers: OpenReaders, work: Work, task: UniqueTask, held_ids: int, run_rows: int) -> list[Duplicates]:
    """Search a bucket for duplicates. If it has more than ``held_ids`` ids, search each half of it."""
    if (
        task.bucket_bits == 64
    ):  # mixing is one to one, so ids that share all 64 bits are equal: one id with too many rows to hold
        return _count_equal(readers, work, task, run_rows)
    held = _collect(readers, work, task, held_ids, run_rows)
    if held is None:
        bits = task.bucket_bits + 1
        return [
            duplicates
            for half in (0, 1)
            for duplicates in _search(
                readers, work, task._replace(bucket=2 * task.bucket + half, bucket_bits=bits), held_ids, run_rows
            )
        ]
    return [_count_duplicates(task.table, held.sorted_ids())] if held.has_duplicates() else []


def _collect(readers: OpenReaders, work: Work, task: UniqueTask, held_ids: int, run_rows: int) -> HeldIds | None:
    """Return the ids of a bucket; None if there are too many."""
    columns = np.array(task.columns, np.int64)
    held = HeldIds(min(held_ids, int(work.id_rows[columns].sum())))
    shift = np.uint64(64 - task.bucket_bits)
    where = work.id_file[columns], work.id_offset[columns], work.id_rows[columns]
    for run in read_runs(readers, *where, run_rows=run_rows):
        ids = run.ids
        chosen = ids[(mix(ids) >> shift) == np.uint64(task.bucket)] if task.bucket_bits else ids
        if not held.add(chosen):
            return None
    return held


def _count_equal(readers: OpenReaders, work: Work, task: UniqueTask, run_rows: int) -> list[Duplicates]:
    """Count the rows of a bucket that only one id can be in."""
    columns = np.array(task.columns, np.int64)
    rows, first = 0, 0
    where = work.id_file[columns], work.id_offset[columns], work.id_rows[columns]
    for run in read_runs(readers, *where, run_rows=run_rows):
        positions = np.flatnonzero(mix(run.ids) == np.uint64(task.bucket))
        if len(positions):
            rows, first = rows + len(positions), int(run.ids[positions[0]])
    return [Duplicates(task.table, rows - 1, first)] if rows > 1 else []


def _open(directory: Directory, work: Work) -> OpenReaders:
    return OpenReaders(lambda number: directory.open_reader(work.shards[number]))


def _name_error(error: DistExportError | OSError, work: Work) -> tuple[str, str]:
    """Return the file of an error, as far as its text names one, and the error in one line."""
    text = (error.strerror or str(error)) if isinstance(error, OSError) else fact_of(error)
    where = str(getattr(error, "filename", "") or text)
    file = next((name for name in work.shards if f"/{name}" in where), "shards")
    return file, f"cannot be read: {text}"


def _reduce(operation: np.ufunc, values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Reduce the values of each block. A single block uses ``reduce``, which is vectorized."""
    if len(starts) == 1:
        whole: np.ndarray = operation.reduce(values, keepdims=True)
        return whole
    return operation.reduceat(values, starts)
