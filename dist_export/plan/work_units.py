"""Cut the plan into work units and assign them to the threads of the ranks. Pure.

A copy unit is a run of whole digest chunks of one output file, so that the thread that writes it also hashes it. Chunks
with gathered rows are read back from the file and hashed later, in separate units.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.plan.disk_placement import files_of, owners_of
from dist_export.plan.multipart import FileParts
from dist_export.plan.plan import SparsePlan
from dist_export.tuning import STANDARD, Tuning


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
    gathered = _chunks_with_gathers(plan, tuning.chunk_bytes)
    copied = _CopiedBytes(plan)
    writing: list[Unit] = []
    hashing: list[Unit] = []
    for number, file in enumerate(plan.files):
        if number in skip or number in by_parts:
            continue
        for begin, end, is_gathered in _runs(file.num_bytes, gathered.get(number, frozenset()), tuning):
            num_bytes = copied.within(number, begin, end) if is_gathered else end - begin
            if num_bytes or not is_gathered:
                writing.append(
                    Unit("copy", number, begin, end, not is_gathered, num_bytes, disk=placements.get(number, -1))
                )
            if is_gathered:
                hashing.append(Unit("hash", number, begin, end, True, end - begin, disk=placements.get(number, -1)))
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
        ranks = plan.pruning.rank_of_part[[gather.part for gather in plan.gathers]] if plan.gathers else np.zeros(0)
        for owner in np.unique(ranks).tolist():
            writing += gathers.group(np.flatnonzero(ranks == owner).tolist(), owner=owner)
    elif placements:
        by_disk: dict[int, list[int]] = {}
        for number, gather in enumerate(plan.gathers):
            for disk in {placements[file] for file in files_of(plan, gather).tolist() if file in placements} or {-1}:
                by_disk.setdefault(disk, []).append(number)
        for disk in sorted(by_disk):
            writing += gathers.group(by_disk[disk], disk=disk)
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
                writing.append(Unit("copy", number, begin, end, False, copied.within(number, begin, end), disk=disk))
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
        self._skip = np.array(sorted(skip), np.int64)
        self._counted = counted
        self._placement = np.full(len(plan.files), -1, np.int64)
        self._placement[list(placements)] = list(placements.values())

    def group(self, numbers: Sequence[int], *, owner: int = -1, disk: int = -1) -> list[Unit]:
        """Return units for the gathers ``numbers`` that have something to do. Rows for other disks cost nothing."""
        plan = self._plan
        units: list[Unit] = []
        last_table = -1
        for number in numbers:
            gather = plan.gathers[number]
            table = int(plan.checkpoint.parts.table[gather.part])
            files = files_of(plan, gather)
            is_counted = number in self._counted or not plan.has_casts(gather)
            if is_counted and np.isin(files, self._skip).all():
                last_table = -1
                continue
            row_bytes = sum(s.row_bytes for s in plan.slots_of(table) if s.column in gather.columns)
            rows = gather.counts if disk < 0 else np.where(self._placement[files] == disk, gather.counts, 0)
            num_bytes = row_bytes * int(rows.sum())
            reused_bytes = row_bytes * int(rows[np.isin(files, self._skip)].sum())
            is_next = table == last_table and units[-1].end == number
            if is_next and units[-1].num_bytes + num_bytes <= self._unit_bytes:
                num_bytes, reused_bytes = num_bytes + units[-1].num_bytes, reused_bytes + units[-1].reused_bytes
                units[-1] = units[-1]._replace(end=number + 1, num_bytes=num_bytes, reused_bytes=reused_bytes)
            else:
                units.append(Unit("gather", -1, number, number + 1, False, num_bytes, owner, disk, reused_bytes))
            last_table = table
        return units


def plan_hash_units(plan: SparsePlan, files: list[int], *, tuning: Tuning = STANDARD) -> list[Unit]:
    """Return units that read whole files back, for files that are already in the target."""
    return [
        Unit("hash", number, begin, end, True, end - begin)
        for number in files
        for begin, end, _ in _runs(plan.files[number].num_bytes, frozenset(), tuning)
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
    """Counts the bytes of a range that come from copies or the header, and not from gathers."""

    def __init__(self, plan: SparsePlan) -> None:
        self._plan = plan
        self._before = np.concatenate([[0], np.cumsum(plan.copies.num_bytes)])

    def within(self, number: int, begin: int, end: int) -> int:
        """Return the bytes in ``begin`` to ``end`` of an output file."""
        header = len(self._plan.files[number].header)
        return max(0, min(end, header) - begin) + self._until(number, end) - self._until(number, begin)

    def _until(self, number: int, position: int) -> int:
        copies = self._plan.copies
        first, last = np.searchsorted(copies.file, [number, number + 1])
        place = first + int(np.searchsorted(copies.offset[first:last], position))
        if place == first:
            return 0
        last_bytes = min(int(copies.num_bytes[place - 1]), position - int(copies.offset[place - 1]))
        return int(self._before[place - 1] - self._before[first]) + last_bytes


def _runs(num_bytes: int, gathered: frozenset[int], tuning: Tuning) -> list[tuple[int, int, bool]]:
    """Cut a file into runs of whole chunks, all gathered or none, of at most a unit. An empty file is one empty run."""
    runs: list[tuple[int, int, bool]] = []
    chunk_bytes, unit_bytes = tuning.chunk_bytes, tuning.unit_bytes
    for chunk in range(max(1, -(-num_bytes // chunk_bytes))):
        begin, end = chunk * chunk_bytes, min((chunk + 1) * chunk_bytes, num_bytes)
        kind = chunk in gathered
        if runs and runs[-1][2] == kind and end - runs[-1][0] <= unit_bytes:
            runs[-1] = (runs[-1][0], end, kind)
        else:
            runs.append((begin, end, kind))
    return runs


def _chunks_with_gathers(plan: SparsePlan, chunk_bytes: int) -> dict[int, frozenset[int]]:
    found: dict[int, set[int]] = {}
    for gather in plan.gathers:
        table = int(plan.checkpoint.parts.table[gather.part])
        for slot in plan.slots_of(table):
            if slot.column not in gather.columns:
                continue
            block = plan.blocks_of(table, slot.column)[gather.targets]
            begins = plan.blocks.offset[block] + gather.first_target_rows * slot.row_bytes
            lasts = begins + gather.counts * slot.row_bytes - 1  # less than begin if rows have no bytes
            for file, begin, last in zip(
                plan.blocks.file[block].tolist(), begins.tolist(), lasts.tolist(), strict=True
            ):
                found.setdefault(file, set()).update(range(begin // chunk_bytes, last // chunk_bytes + 1))
    return {file: frozenset(chunks) for file, chunks in found.items()}
