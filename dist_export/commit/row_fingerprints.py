"""Write the row fingerprints of the shards, from the rows that are read back from the written files."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from dist_export.commit.staged_file import StagedFile, find_finished
from dist_export.formats.digests import NONE, XXH3
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_fingerprints import (
    FINGERPRINT,
    MAGIC,
    Fingerprinter,
    PartSlots,
    Piece,
    SlotBlock,
    fingerprints_name,
    group_pieces,
    lay_out,
)
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.manifest import FileEntry, RowFingerprintsEntry, TableEntry
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders
from dist_export.storage.staging import Staging
from dist_export.workdir.state import Receipt


class PlannedFingerprints(NamedTuple):
    """The row fingerprints of one shard. They follow from the plan, so every rank knows them."""

    name: str
    num_bytes: int
    blocks: tuple[int, ...]
    """The first block of each part with rows, as a number of the plan's blocks, in the order of the file."""
    parts: tuple[PartSlots, ...]
    """Parallel: the rows of the part."""
    offsets: tuple[int, ...]
    """Parallel: the position of the first fingerprint, in bytes."""


def plan_fingerprints(plan: SparsePlan, numbers: Collection[int]) -> dict[int, PlannedFingerprints]:
    """Return what the files of row fingerprints beside these shards hold, by shard. A shard without rows has none."""
    found: dict[int, list[tuple[int, int, PartSlots]]] = {}
    for table in range(len(plan.checkpoint.tables)):
        for block, part in _find_parts(plan, table, numbers):
            found.setdefault(int(plan.blocks.file[block]), []).append((int(plan.blocks.offset[block]), block, part))
    planned = {}
    for number, its in sorted(found.items()):
        _, blocks, parts = zip(*sorted(its), strict=True)
        offsets, num_bytes = lay_out([part.num_rows for part in parts])
        name = fingerprints_name(plan.files[number].name)
        planned[number] = PlannedFingerprints(name, num_bytes, blocks, parts, tuple(offsets))
    return planned


def _find_parts(plan: SparsePlan, table: int, numbers: Collection[int]) -> list[tuple[int, PartSlots]]:
    """Return the first block of each part of a table that is in these shards, and the part's slots without ids."""
    blocks, kept = plan.blocks, plan.slots_of(table)
    first = plan.blocks_of(table, kept[0].column)
    first = first[(blocks.rows[first] > 0) & np.isin(blocks.file[first], np.array(list(numbers), np.int64))]
    if not len(first):
        return []
    columns = []
    for slot in kept:
        if slot.name != ID_SLOT:
            its = plan.blocks_of(table, slot.column)  # by target; in a copy, parts without rows may lack some
            its = its[np.searchsorted(blocks.target[its], blocks.target[first])]
            positions = zip(blocks.file[its].tolist(), blocks.offset[its].tolist(), strict=True)
            columns.append([SlotBlock(file, offset, slot.row_bytes) for file, offset in positions])
    slots = zip(*columns, strict=True) if columns else [()] * len(first)
    rows = blocks.rows[first].tolist()
    return [(block, PartSlots(n, its)) for block, n, its in zip(first.tolist(), rows, slots, strict=True)]


class FingerprintWriter:
    """Writes the row fingerprints of some shards. One for each thread; no collective."""

    def __init__(
        self,
        plan: SparsePlan,
        target: Directory,
        *,
        window_bytes: int,
        digest: str,
        in_place: bool,
        tuning: Tuning = STANDARD,
    ) -> None:
        """Prepare to write.

        Args:
            plan: the plan of the shards.
            target: the directory of the shards, which are all written.
            window_bytes: how many bytes of rows may be read from a store at once.
            digest: the algorithm of the digests; xxh3 if it is ``none``.
            in_place: whether the directory is a checkpoint, in which nothing but the package's files is written.
            tuning: how much is read from a disk at once, and the chunks of digests.
        """
        self._plan = plan
        self._target = target
        self._piece_bytes = tuning.fingerprint_bytes if target.is_local else window_bytes
        self._digest = XXH3 if digest == NONE else digest
        self._in_place = in_place
        self._chunk_bytes = tuning.chunk_bytes
        self._piece_rows = tuning.fingerprint_rows

    def write(self, numbers: Collection[int]) -> list[FileEntry]:
        """Write the files beside these shards, and return their entries. A file that an interrupted export finished stays."""
        plan, target = self._plan, self._target
        planned = plan_fingerprints(plan, numbers)
        with (
            contextlib.closing(Staging(target)) as staging,
            OpenReaders(lambda number: target.open_reader(plan.files[number].name)) as readers,
        ):
            receipts = [
                find_finished(
                    target,
                    plan,
                    its.name,
                    digest=self._digest,
                    in_place=self._in_place,
                    chunk_bytes=self._chunk_bytes,
                )
                or self._write(its, staging, readers)
                for its in planned.values()
            ]
        return [FileEntry(path=one.name, num_bytes=one.num_bytes, digest=one.digest) for one in receipts]

    def _write(self, planned: PlannedFingerprints, staging: Staging, readers: OpenReaders) -> Receipt:
        staged = StagedFile(staging, planned.name)
        try:
            hasher = xxhash.xxh3_128(MAGIC)
            staged.write(memoryview(MAGIC), 0)
            end = len(MAGIC)
            pieces = [Piece(place, 0, part.num_rows) for place, part in enumerate(planned.parts)]
            fingerprinter = Fingerprinter(planned.parts, lambda file, ranges: readers[file].read_many(ranges))
            for group in group_pieces(pieces, planned.parts, self._piece_bytes, most_rows=self._piece_rows):
                for piece, fingerprints in zip(group, fingerprinter.compute(group), strict=True):
                    gap = bytes(planned.offsets[piece.part] + piece.first_row * FINGERPRINT.itemsize - end)
                    for data in (memoryview(gap), fingerprints.astype(FINGERPRINT, copy=False).data.cast("B")):
                        hasher.update(data)
                        staged.write(data, end)
                        end += len(data)
            staged.expect(0, end, hasher.digest())
            return staged.publish(
                self._target,
                self._plan,
                num_bytes=end,
                digest=self._digest,
                in_place=self._in_place,
                chunk_bytes=self._chunk_bytes,
            )
        finally:
            staged.abandon()


def add_fingerprints(plan: SparsePlan, entries: Sequence[TableEntry]) -> tuple[TableEntry, ...]:
    """Return the tables' entries with the row fingerprints of their parts."""
    found = {}
    for planned in plan_fingerprints(plan, range(len(plan.files))).values():
        for block, offset in zip(planned.blocks, planned.offsets, strict=True):
            found[planned.name, plan.blocks.key[block]] = RowFingerprintsEntry(file=planned.name, offset=offset)
    added = []
    for table in entries:
        keys = [(fingerprints_name(part.file), part.keys.get(table.kept[0].name, "")) for part in table.parts]
        parts = [
            msgspec.structs.replace(part, row_fingerprints=found[key]) if key in found else part
            for part, key in zip(table.parts, keys, strict=True)
        ]
        added.append(msgspec.structs.replace(table, parts=tuple(parts)))
    return tuple(added)
