"""Write the row indexes of the shards, from the ids that are read back to check the shards."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import xxhash

from dist_export.commit.staged_file import StagedFile, find_finished, hash_bytes
from dist_export.formats.digests import NONE, XXH3
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
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.ids.columns import IdRun, Readers, read_runs
from dist_export.manifest import FileEntry, RowIndexEntry, TableEntry
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory
from dist_export.storage.staging import Staging
from dist_export.workdir.state import Receipt

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
        self,
        plan: SparsePlan,
        target: Directory,
        readers: Readers,
        *,
        held_ids: int,
        digest: str,
        in_place: bool,
        tuning: Tuning = STANDARD,
    ) -> None:
        """Prepare to write.

        Args:
            plan: the plan of the shards.
            target: the directory of the shards.
            readers: the shards by number, for parts whose ids do not fit in memory.
            held_ids: how many keys of 8 bytes may be held at once.
            digest: the algorithm of the digests; xxh3 if it is ``none``.
            in_place: whether the directory is a checkpoint, in which nothing but the package's files is written.
            tuning: the sizes of runs of ids and of the chunks of digests.
        """
        self._plan = plan
        self._target = target
        self._readers = readers
        self._held_ids = held_ids
        self._digest = XXH3 if digest == NONE else digest
        self._in_place = in_place
        self._tuning = tuning
        self._staging = Staging(target)
        self._written: list[WrittenIndex] = []
        self._reused: set[int] = set()
        self._file = -1
        self._staged: StagedFile | None = None
        self._keys = np.zeros(0, np.uint64)

    def begin(self, number: int) -> None:
        """Take over the row indexes of a shard that an interrupted export has finished."""
        name = index_name(self._plan.files[number].name)
        receipt = find_finished(
            self._target,
            self._plan,
            name,
            digest=self._digest,
            in_place=self._in_place,
            chunk_bytes=self._tuning.chunk_bytes,
        )
        if receipt is not None:
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
        if self._staged is not None:
            self._staged.abandon()
        self._staging.close()

    # ---- within ----

    def _open(self, number: int) -> None:
        self._entries: dict[str, RowIndexEntry | None] = {}
        self._staged = StagedFile(self._staging, index_name(self._plan.files[number].name))
        self._file = number
        self._staged.write(memoryview(MAGIC), 0)
        self._end = len(MAGIC)
        self._staged.expect(0, self._end, hash_bytes(MAGIC))

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
        staged = self._staged
        assert staged is not None
        rows, key = int(self._plan.blocks.rows[block]), self._plan.blocks.key[block]
        begin = -(-self._end // ALIGNMENT) * ALIGNMENT
        self._entries[key] = None
        for seed in range(SEEDS if rows <= MOST_ROWS else 0):
            filler, hasher = SlotFiller(rows), xxhash.xxh3_128()
            runs = [keys] if keys is not None and not seed else self._read_keys(block, seed)
            for run in runs:
                for slots in filler.add(run):
                    hasher.update(slots.data)
                    staged.write(slots.data.cast("B"), begin + (filler.num_slots - len(slots)) * SLOT.itemsize)
                if filler.longest_probe > MOST_PROBES:
                    break
            else:
                slots = filler.finish()
                hasher.update(slots.data)
                staged.write(slots.data.cast("B"), begin + (filler.num_slots - len(slots)) * SLOT.itemsize)
                self._end = begin + filler.num_slots * SLOT.itemsize
                staged.expect(begin, self._end - begin, hasher.digest())
                self._entries[key] = RowIndexEntry(
                    file=staged.name,
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
        columns = blocks.file[chosen], blocks.offset[chosen], blocks.rows[chosen]
        for run in read_runs(self._readers, *columns, run_rows=self._tuning.run_rows):
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

    def _close(self) -> None:
        """Publish the file of the current shard, if there is one."""
        if self._staged is None:
            return
        receipt = self._staged.publish(
            self._target,
            self._plan,
            num_bytes=self._end,
            digest=self._digest,
            in_place=self._in_place,
            row_indexes=self._entries,
            chunk_bytes=self._tuning.chunk_bytes,
        )
        self._staged, self._file = None, -1
        self._note(receipt)

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
