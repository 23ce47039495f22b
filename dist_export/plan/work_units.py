"""Cut the plan into work units and assign them to the threads of the ranks. Pure.

A copy unit is a run of whole digest chunks of one output file, so that the thread that writes it also hashes it. Chunks
with gathered rows are read back from the file and hashed later, in separate units.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.plan.disk_placement import owners_of
from dist_export.plan.multipart import FileParts
from dist_export.plan.plan import SparsePlan


class Unit(NamedTuple):
    """One work unit.

    ``copy``: write bytes ``begin`` to ``end`` of output ``number`` and, if ``is_hashed``, return the chunk digests.
    ``gather``: move the rows of ``plan.gathers[begin:end]``. ``number`` is -1, because they go to several outputs.
    ``remote``: let the store copy bytes ``begin`` to ``end``, one part of an upload, into output ``number``.
    ``send``: send bytes ``begin`` to ``end`` of output ``number``, one part of an upload, from the disk with the built file.
    ``hash``: read bytes ``begin`` to ``end`` of output ``number`` back and return the chunk digests.

    A file is complete when all its ranges with ``is_hashed`` are done, even if no digest is computed.
    """

    kind: str
    number: int
    begin: int
    end: int
    is_hashed: bool
    num_bytes: int
    """Bytes that are moved or read back. This is the cost of the unit."""
    owner: int = -1
    """The only rank that may run the unit, because it holds the rows of the gather in memory, or has compared them with the
    base of a delta; -1 for any rank."""
    disk: int = -1
    """The disk on which the output is built. Only ranks that see it may run the unit; -1 if all ranks see it."""
    reused_bytes: int = 0
    """The part of ``num_bytes`` for files that are already complete. These rows are read together with others, not written."""

    @property
    def moved_bytes(self) -> int:
        """The bytes that this unit adds to the target."""
        return self.num_bytes - self.reused_bytes


def plan_units(
    plan: SparsePlan,
    *,
    skip: frozenset[int] = frozenset(),
    counted: Collection[int] = (),
    by_parts: Mapping[int, FileParts] | None = None,
    placements: Mapping[int, int] | None = None,
    tuning: Tuning = STANDARD,
) -> tuple[list[Unit], list[Unit]]:
    """Return the units of the writing phase and those of the hashing phase after it.

    Args:
        plan: the plan of the export.
        skip: files that are already complete. They get no units, except gathers that cast, whose losses must be counted.
        counted: gathers in ``plan.gathers`` whose losses are already counted.
        by_parts: files that are uploaded in parts. They get one unit for each part.
        homes: the disk on which each file is built, if the ranks share no disk
            (:func:`~dist_export.plan.disk_placement.find_placements`).
        tuning: the sizes of chunks and units.
    """
    placements = placements or {}
    by_parts = {number: parts for number, parts in (by_parts or {}).items() if number not in skip}
    copied = _CopiedBytes(plan)
    writing: list[Unit] = []
    hashing: list[Unit] = []
    for number, begin, end, is_gathered, num_bytes in _list_runs(plan, copied, skip.union(by_parts), tuning):
        disk = placements.get(number, -1)
        if num_bytes or not is_gathered:
            writing.append(Unit("copy", number, begin, end, not is_gathered, num_bytes, disk=disk))
        if is_gathered:
            hashing.append(Unit("hash", number, begin, end, True, end - begin, disk=disk))
    sent, built = _plan_part_units(by_parts, copied, placements)
    writing += sent
    hashing += built
    gathers = _Gathers(plan, skip, counted, placements, tuning.unit_bytes)
    if plan.checkpoint.memory is not None:
        by_owner: dict[int, list[int]] = {}
        for number, gather in enumerate(plan.gathers):
            for owner in owners_of(plan, gather):
                by_owner.setdefault(owner, []).append(number)
        for owner in sorted(by_owner):
            writing += gathers.group(by_owner[owner], owner=owner)
    elif not placements and plan.pruning is not None and plan.pruning.rank_of_part is not None:
        ranks = plan.pruning.rank_of_part[plan.gathers.part]
        for owner in np.unique(ranks).tolist():
            writing += gathers.group(np.flatnonzero(ranks == owner).tolist(), owner=owner)
    elif placements:
        for disk, numbers in gathers.by_disk().items():
            writing += gathers.group(numbers, disk=disk)
    else:
        writing += gathers.group(range(len(plan.gathers)))
    return writing, hashing


def _plan_part_units(
    files: Mapping[int, FileParts], copied: _CopiedBytes, placements: Mapping[int, int]
) -> tuple[list[Unit], list[Unit]]:
    writing: list[Unit] = []
    sending: list[Unit] = []
    for number in sorted(files):
        for begin, end, source, _ in files[number].parts:
            if source >= 0:
                writing.append(Unit("remote", number, begin, end, True, end - begin))
            elif not files[number].is_built:
                writing.append(Unit("copy", number, begin, end, True, end - begin))
            else:  # copy the byte ranges to the disk now, and send the part after the gathers
                disk = placements.get(number, -1)
                num_bytes = int(copied.within(np.array([number]), np.array([begin]), np.array([end]))[0])
                writing.append(Unit("copy", number, begin, end, False, num_bytes, disk=disk))
                sending.append(Unit("send", number, begin, end, True, end - begin, disk=disk))
    return writing, sending


class _Gathers:
    """Joins neighbouring gathers of one table into units of up to ``unit_bytes``, because there may be many small parts."""

    def __init__(
        self,
        plan: SparsePlan,
        skip: frozenset[int],
        counted: Collection[int],
        placements: Mapping[int, int],
        unit_bytes: int,
    ) -> None:
        self._plan = plan
        self._unit_bytes = unit_bytes
        placement = np.full(len(plan.files), -1, np.int64)
        placement[list(placements)] = list(placements.values())
        is_skipped = np.zeros(len(plan.files), bool)
        is_skipped[list(skip)] = True
        self._disk_of_run = placement[plan.files_of_runs]
        self._is_skipped = is_skipped[plan.files_of_runs]
        self._tables = plan.tables_of_gathers
        has_casts = np.array([plan.has_casts(table) for table in range(len(plan.checkpoint.tables))], bool)
        is_counted = ~has_casts[self._tables]
        is_counted[list(counted)] = True
        self._is_idle = is_counted & (plan.gathers.sum_runs(~self._is_skipped) == 0)
        """Which gathers write no row that is not there already."""

    def by_disk(self) -> dict[int, list[int]]:
        """Return the gathers whose rows go to each disk, which may be several; those of disk -1 go to no disk."""
        of_run = self._plan.gathers.of_run
        is_placed = self._disk_of_run >= 0
        found = {-1: np.setdiff1d(np.arange(len(self._plan.gathers)), of_run[is_placed]).tolist()}
        for disk in np.unique(self._disk_of_run[is_placed]).tolist():
            found[disk] = np.unique(of_run[self._disk_of_run == disk]).tolist()
        return found

    def group(self, numbers: Sequence[int], *, owner: int = -1, disk: int = -1) -> list[Unit]:
        """Return units for the gathers ``numbers`` that have something to do. Rows for other disks cost nothing."""
        gathers = self._plan.gathers
        chosen = np.asarray(numbers, np.int64)
        rows = gathers.counts if disk < 0 else np.where(self._disk_of_run == disk, gathers.counts, 0)
        row_bytes = self._row_bytes[chosen]
        sizes = row_bytes * gathers.sum_runs(rows)[chosen]
        reused = row_bytes * gathers.sum_runs(np.where(self._is_skipped, rows, 0))[chosen]
        columns = (chosen, self._tables[chosen], sizes, reused, self._is_idle[chosen])
        units: list[Unit] = []
        last_table = -1
        for number, table, num_bytes, reused_bytes, is_idle in zip(*(c.tolist() for c in columns), strict=True):
            if is_idle:
                last_table = -1
                continue
            is_next = table == last_table and units[-1].end == number
            if is_next and units[-1].num_bytes + num_bytes <= self._unit_bytes:
                joined = units.pop()
                first, whole, whole_reused = (
                    joined.begin,
                    joined.num_bytes + num_bytes,
                    joined.reused_bytes + reused_bytes,
                )
            else:
                first, whole, whole_reused = number, num_bytes, reused_bytes
            units.append(Unit("gather", -1, first, number + 1, False, whole, owner, disk, whole_reused))
            last_table = table
        return units

    @functools.cached_property
    def _row_bytes(self) -> np.ndarray:
        """The bytes (int64) of one row of each gather: those of the slots that it moves."""
        plan = self._plan
        found = np.zeros((len(plan.checkpoint.tables), len(plan.gathers.columns)), np.int64)
        for table in np.unique(self._tables).tolist():
            for place, columns in enumerate(plan.gathers.columns):
                found[table, place] = sum(slot.row_bytes for slot in plan.slots_of(table) if slot.column in columns)
        row_bytes: np.ndarray = found[self._tables, plan.gathers.columns_of]
        return row_bytes


def plan_hash_units(plan: SparsePlan, files: list[int], *, tuning: Tuning = STANDARD) -> list[Unit]:
    """Return units that read whole files back, for files that are already in the target."""
    return [
        Unit("hash", number, begin, end, True, end - begin)
        for number in files
        for begin, end, _ in _runs(plan.files[number].num_bytes, None, tuning)
    ]


def assign(units: list[Unit], num_workers: int) -> list[list[int]]:
    """Assign the units to the threads of all ranks, in runs of equal bytes, so that a file has few writers.

    The cost of a unit is its bytes plus a little for opening files and claiming the unit.
    """
    costs = np.array([unit.num_bytes + 4096 for unit in units], np.int64)
    middles = np.cumsum(costs) - costs / 2
    workers = np.minimum(middles * num_workers / max(int(costs.sum()), 1), num_workers - 1).astype(np.int64)
    edges = np.searchsorted(workers, np.arange(num_workers + 1)).tolist()
    return [list(range(first, last)) for first, last in itertools.pairwise(edges)]


class _CopiedBytes:
    """Counts the bytes of ranges that come from copies or the header, and not from gathers."""

    def __init__(self, plan: SparsePlan) -> None:
        self._copies = plan.copies
        self._before = np.concatenate([[0], np.cumsum(plan.copies.num_bytes)])
        self._headers = np.array([len(file.header) for file in plan.files], np.int64)
        # all files as if one followed the other: then one search finds a file and a place in it
        sizes = np.array([file.num_bytes for file in plan.files], np.int64)
        self._file_begins = np.cumsum(sizes) - sizes
        self._copy_begins = self._file_begins[plan.copies.file] + plan.copies.offset

    def within(self, number: np.ndarray, begin: np.ndarray, end: np.ndarray) -> np.ndarray:
        """Return the bytes (int64) in ``begin`` to ``end`` of output files, all int64."""
        of_headers = np.maximum(0, np.minimum(end, self._headers[number]) - begin)
        found: np.ndarray = of_headers + self._until(number, end) - self._until(number, begin)
        return found

    def _until(self, number: np.ndarray, position: np.ndarray) -> np.ndarray:
        copies = self._copies
        first = np.searchsorted(copies.file, number)
        last = np.searchsorted(self._copy_begins, self._file_begins[number] + position) - 1
        found = np.zeros(len(number), np.int64)
        some = np.flatnonzero(last >= first)
        first, last = first[some], last[some]
        last_bytes = np.minimum(copies.num_bytes[last], position[some] - copies.offset[last])
        found[some] = self._before[last] - self._before[first] + last_bytes
        return found


def _list_runs(
    plan: SparsePlan, copied: _CopiedBytes, skip: frozenset[int], tuning: Tuning
) -> Iterator[tuple[int, int, int, bool, int]]:
    """Yield number, begin, end, whether it has gathered rows, and other bytes, of each run of all files but ``skip``."""
    gathered = _find_gathered_chunks(plan, tuning.chunk_bytes)
    found = [
        (number, *run)
        for number, (file, is_gathered) in enumerate(zip(plan.files, gathered, strict=True))
        if number not in skip
        for run in _runs(file.num_bytes, is_gathered, tuning)
    ]
    columns = np.array(found, np.int64).reshape(-1, 4).T
    sizes = np.where(columns[3], copied.within(*columns[:3]), columns[2] - columns[1])
    for (number, begin, end, is_gathered), num_bytes in zip(found, sizes.tolist(), strict=True):
        yield number, begin, end, is_gathered, num_bytes


def _runs(num_bytes: int, is_gathered: np.ndarray | None, tuning: Tuning) -> list[tuple[int, int, bool]]:
    """Cut a file into runs of whole chunks, all gathered or none, of at most a unit. An empty file is one empty run.

    ``is_gathered``: bool by chunk; None if no chunk has gathered rows.
    """
    chunk_bytes, unit_bytes = tuning.chunk_bytes, tuning.unit_bytes
    kinds = [False] * _count_chunks(num_bytes, chunk_bytes) if is_gathered is None else is_gathered.tolist()
    runs: list[tuple[int, int, bool]] = []
    for chunk, kind in enumerate(kinds):
        begin, end = chunk * chunk_bytes, min((chunk + 1) * chunk_bytes, num_bytes)
        if runs and runs[-1][2] == kind and end - runs[-1][0] <= unit_bytes:
            runs[-1] = (runs[-1][0], end, kind)
        else:
            runs.append((begin, end, kind))
    return runs


def _count_chunks(num_bytes: int, chunk_bytes: int) -> int:
    return max(1, -(-num_bytes // chunk_bytes))


def _find_gathered_chunks(plan: SparsePlan, chunk_bytes: int) -> list[np.ndarray]:
    """Return for each output file which of its chunks (bool) hold gathered rows."""
    if not plan.files:
        return []
    ends = np.cumsum([_count_chunks(file.num_bytes, chunk_bytes) for file in plan.files], dtype=np.int64)
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    steps = np.zeros(int(ends[-1]) + 1, np.int64)
    """By how much the number of runs of rows in a chunk exceeds that in the chunk before it."""
    gathers = plan.gathers
    for table in np.unique(plan.tables_of_gathers).tolist():
        for slot in plan.slots_of(table):
            runs, block = plan.runs_of(table, slot.column)
            first = plan.blocks.offset[block] + gathers.first_target_rows[runs] * slot.row_bytes
            last = first + gathers.counts[runs] * slot.row_bytes - 1  # less than first if rows have no bytes
            of_file = begins[plan.blocks.file[block]]
            np.add.at(steps, of_file + first // chunk_bytes, 1)
            np.add.at(steps, of_file + last // chunk_bytes + 1, -1)
    return np.split(np.cumsum(steps[:-1]) > 0, ends[:-1])
