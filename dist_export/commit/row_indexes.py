"""Write the row indexes of the shards, from the ids that are read back to check the shards."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from dist_export.errors import CommitError
from dist_export.formats.digests import NONE, XXH3, digest_pieces, hash_whole
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_index import (
    ALIGNMENT,
    MAGIC,
    MOST_PROBES,
    MOST_ROWS,
    SEEDS,
    SLOT,
    SUFFIX,
    SlotFiller,
    encode_keys,
)
from dist_export.ids.columns import IdRun, Readers, read_runs
from dist_export.manifest import FileEntry, RowIndexEntry, TableEntry
from dist_export.plan.plan import SparsePlan
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.directory import Directory, digest_file, pieces_of
from dist_export.storage.local_io import close_quietly, naming_any, refuse_zero
from dist_export.storage.staging import Staging
from dist_export.workdir.state import Receipt, read_receipt, write_receipt

_HASHES = 1 << 32
_ROOM = 1.1
"""Random hashes fill a range of them unevenly. This much room is enough for all but crafted ids."""


def index_name(shard: str) -> str:
    """Return the name of the file that holds the row indexes of a shard."""
    return shard.removesuffix(".safetensors") + SUFFIX


class WrittenIndex(NamedTuple):
    """The row indexes of one shard, as they are written."""

    file: FileEntry
    entries: Mapping[str, RowIndexEntry | None]
    """Key of the id block -> where its index is; None if it has none."""


class RowIndexWriter:
    """Writes the row indexes of some shards while their ids are read. One for each thread; no collective.

    Call ``begin`` for each shard. Then call ``add`` with all runs of its ids, shard by shard, and ``finish`` at the end.
    """

    def __init__(
        self, plan: SparsePlan, target: Directory, readers: Readers, *, held_ids: int, digest: str, in_place: bool
    ) -> None:
        """Prepare to write.

        Args:
            plan: the plan of the shards.
            target: the directory of the shards.
            readers: the shards by number, for parts whose ids do not fit in memory.
            held_ids: how many keys of 8 bytes may be held at once.
            digest: the algorithm of the digests; xxh3 if it is ``none``.
            in_place: whether the directory is a checkpoint, in which nothing but the package's files is written.
        """
        self._plan = plan
        self._target = target
        self._readers = readers
        self._held_ids = held_ids
        self._digest = XXH3 if digest == NONE else digest
        self._in_place = in_place
        self._staging = Staging(target)
        self._written: list[WrittenIndex] = []
        self._reused: set[int] = set()
        self._file = -1
        self._keys = np.zeros(0, np.uint64)

    def begin(self, number: int) -> None:
        """Take over the row indexes of a shard that an interrupted export has finished."""
        name = index_name(self._plan.files[number].name)
        receipt = None if self._in_place else read_receipt(self._target, name)
        if receipt is None or receipt.plan != self._plan.digest or not self._target.exists(name):
            return
        if self._target.stat(name).size == receipt.num_bytes and (
            digest_file(self._target, name, self._digest) == receipt.digest
        ):
            self._reused.add(number)
            self._note(receipt)

    def add(self, blocks: np.ndarray, run: IdRun) -> None:
        """Add a run of ids. ``blocks`` are its blocks, as numbers of the plan's blocks."""
        stops = np.append(run.starts[1:], len(run.ids)).tolist()
        for block, start, stop in zip(blocks.tolist(), run.starts.tolist(), stops, strict=True):
            number = int(self._plan.blocks.file[block])
            if number in self._reused:
                continue
            if number != self._file:
                self._close()
                self._open(number)
            self._add(block, run.ids[start:stop], run.first_row)

    def finish(self) -> list[WrittenIndex]:
        """Return the row indexes of all shards. The last one is written now."""
        self._close()
        return self._written

    def close(self) -> None:
        """Give up what is unfinished. Call it in any case."""
        if self._file >= 0:
            close_quietly(self._fd)
            self._file = -1
            with contextlib.suppress(OSError):  # why it is unfinished is what the user must see
                self._staging.remove(self._name)
        self._staging.close()

    # ---- within ----

    def _open(self, number: int) -> None:
        self._name = index_name(self._plan.files[number].name)
        self._entries: dict[str, RowIndexEntry | None] = {}
        path = self._staging.path(self._name)
        with naming_any(path):
            self._staging.remove(self._name)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._file = number
        self._write(memoryview(MAGIC), 0)
        self._end = len(MAGIC)
        self._sums = [(0, self._end, xxhash.xxh3_128_digest(MAGIC))]

    def _add(self, block: int, ids: np.ndarray, first_row: int) -> None:
        rows = int(self._plan.blocks.rows[block])
        is_last = first_row + len(ids) == rows
        if rows > self._held_ids:  # its ids are read again, in several passes
            if is_last:
                self._write_part(block, None)
            return
        if not first_row:
            self._held = self._reserve(rows)[:rows]
        self._held[first_row : first_row + len(ids)] = encode_keys(ids, first_row, 0)
        if is_last:
            self._held.sort()
            self._write_part(block, self._held)

    def _write_part(self, block: int, keys: np.ndarray | None) -> None:
        """Write the slots of a part. ``keys``: its sorted keys for seed 0, if they are at hand."""
        rows, key = int(self._plan.blocks.rows[block]), self._plan.blocks.key[block]
        begin = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._entries[key] = None
        for seed in range(SEEDS if rows <= MOST_ROWS else 0):
            filler, hasher = SlotFiller(rows), xxhash.xxh3_128()
            runs = [keys] if keys is not None and not seed else self._read_keys(block, seed)
            for run in runs:
                for slots in filler.add(run):
                    hasher.update(slots.data)
                    self._write_slots(slots, begin, filler)
                if filler.longest_probe > MOST_PROBES:
                    break
            else:
                slots = filler.finish()
                hasher.update(slots.data)
                self._write_slots(slots, begin, filler)
                self._end = begin + filler.num_slots * SLOT.itemsize
                self._sums.append((begin, self._end - begin, hasher.digest()))
                self._entries[key] = RowIndexEntry(
                    file=self._name,
                    offset=begin,
                    num_slots=filler.num_slots,
                    seed=seed,
                    longest_probe=filler.longest_probe,
                )
                return

    def _read_keys(self, block: int, seed: int) -> Iterator[np.ndarray]:
        """Yield the sorted keys of a part in ascending runs of at most ``held_ids``."""
        rows = int(self._plan.blocks.rows[block])
        count = -(-int(rows * _ROOM) // self._held_ids)
        edges = [_HASHES * number // count for number in range(count + 1)]
        ranges = list(itertools.pairwise(edges))[::-1]
        while ranges:
            low, high = ranges.pop()
            keys = self._collect(block, seed, low, high)
            if keys is not None:
                yield keys
            elif high - low > 1:
                middle = (low + high) // 2
                ranges += [(middle, high), (low, middle)]
            else:  # crafted ids: this many rows with one hash have too long a probe in any case
                yield np.full(MOST_PROBES + 2, low << 32, np.uint64)

    def _reserve(self, num_keys: int) -> np.ndarray:
        """Return a buffer for at least so many keys. It is reused, because new memory is slow at first."""
        if len(self._keys) < num_keys:
            self._keys = self._held = np.zeros(0, np.uint64)  # freed before the larger one is there
            self._keys = np.empty(num_keys, np.uint64)
        return self._keys

    def _collect(self, block: int, seed: int, low: int, high: int) -> np.ndarray | None:
        """Return the sorted keys whose hash is from ``low`` to below ``high``; None if they do not fit in memory."""
        blocks, chosen = self._plan.blocks, np.array([block])
        held, filled = self._reserve(self._held_ids), 0
        for run in read_runs(self._readers, blocks.file[chosen], blocks.offset[chosen], blocks.rows[chosen]):
            keys = encode_keys(run.ids, run.first_row, seed)
            hashed = keys >> np.uint64(32)
            keys = keys[(hashed >= low) & (hashed < high)]
            if filled + len(keys) > self._held_ids:
                return None
            held[filled : filled + len(keys)] = keys
            filled += len(keys)
        found = held[:filled]
        found.sort()
        return found

    def _write_slots(self, slots: np.ndarray, begin: int, filler: SlotFiller) -> None:
        position = begin + (filler.num_slots - len(slots)) * SLOT.itemsize
        self._write(slots.data.cast("B"), position)

    def _write(self, view: memoryview, position: int) -> None:
        where = self._staging.path(self._name)
        with ACTIVITY.of(where), naming_any(where):
            written = 0
            while written < len(view):
                written += refuse_zero(os.pwrite(self._fd, view[written:], position + written))

    def _close(self) -> None:
        """Publish the file of the current shard, if there is one."""
        if self._file < 0:
            return
        path, fd = self._staging.path(self._name), self._fd
        with ACTIVITY.of(path), naming_any(path):
            os.ftruncate(fd, self._end)  # a part that has no index may have left slots
            os.fsync(fd)
            self._file = -1
            os.close(fd)
        try:
            digest = self._digest_staged()
        except BaseException:
            self._staging.remove(self._name)
            raise
        receipt = Receipt(
            plan=self._plan.digest,
            name=self._name,
            num_bytes=self._end,
            digest=digest,
            row_indexes=self._entries,
        )
        if not self._in_place:
            write_receipt(self._target, receipt)  # first, so that a killed export leaves no file that nobody knows
        self._staging.publish(self._name)
        self._note(receipt)

    def _digest_staged(self) -> str:
        """Return the digest of the file, which must hold what was written. CommitError if the disk has changed it."""
        with contextlib.closing(self._staging.open_reader(self._name)) as reader:
            for begin, num_bytes, expected in self._sums:
                if hash_whole(pieces_of(reader, num_bytes, begin), XXH3) != expected:
                    raise CommitError(
                        f"{self._target.describe(self._name)}: what was read back is not what was written. No manifest was "
                        "written, so there is no package; check the disk and run the export again"
                    )
            return digest_pieces(pieces_of(reader, self._end), self._digest)

    def _note(self, receipt: Receipt) -> None:
        entry = FileEntry(path=receipt.name, num_bytes=receipt.num_bytes, digest=receipt.digest)
        self._written.append(WrittenIndex(entry, receipt.row_indexes))


def add_row_indexes(entries: Sequence[TableEntry], written: Sequence[WrittenIndex]) -> tuple[TableEntry, ...]:
    """Return the tables' entries with the row indexes of their parts."""
    by_place = {(index.file.path, key): entry for index in written for key, entry in index.entries.items()}
    added = []
    for table in entries:
        parts = []
        for part in table.parts:
            found = by_place.get((index_name(part.file), part.keys.get(ID_SLOT, "")))
            parts.append(part if found is None else msgspec.structs.replace(part, row_index=found))
        added.append(msgspec.structs.replace(table, parts=tuple(parts)))
    return tuple(added)


def note_unindexed(written: Sequence[WrittenIndex]) -> list[str]:
    """Return a note on the parts that have no row index; nothing if all have one."""
    keys = sorted(key for index in written for key, entry in index.entries.items() if entry is None)
    if not keys:
        return []
    note = (
        f"{len(keys)} parts have no row index, the first is {keys[0]!r}: they have more than {MOST_ROWS:,} rows, or ids "
        "that were chosen to collide. A lookup in them reads their ids"
    )
    return [note]
