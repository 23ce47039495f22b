"""Find and write the ids of the base that the source has no more. Each shard of the base is the matter of one rank."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.errors import CommitError
from dist_export.formats.deleted_ids import deleted_name, encode_deleted
from dist_export.formats.digests import NONE, XXH3, digest_bytes
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.manifest import DeletedIdsEntry, FileEntry
from dist_export.package.reader import Package
from dist_export.package.served_table import ServedTable
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.workdir.state import Receipt, write_receipt

Seen = Mapping[tuple[int, int], np.ndarray]
"""(table of the source, number of a served part of the base) -> one bit a row of that part (uint8): whether the source has its
id."""


class WrittenIds(NamedTuple):
    """A file of deleted ids, as it is written."""

    file: FileEntry
    entries: Mapping[int, Sequence[DeletedIdsEntry]]
    """By table, in the order of the base's parts."""


def share_seen(
    ranks: Ranks, base: Package, tables: Mapping[int, ServedTable], seen: Seen
) -> dict[tuple[int, int], np.ndarray]:
    """Give each rank what all ranks have found in its shards of the base. All ranks.

    Args:
        tables: the base's tables that lose ids, by the number of the table in the source.
        seen: what this rank has found.

    Returns:
        Every part in the shards of this rank, with the bits of all ranks.
    """
    owner_of = _deal_shards(base, ranks.world_size)
    mine = {
        (table, number): np.zeros(-(-part.entry.rows // 8), np.uint8)
        for table, served in tables.items()
        for number, part in enumerate(served.parts)
        if owner_of[part.entry.file] == ranks.rank
    }

    def give() -> list[tuple[int, int]]:
        others = [key for key in sorted(seen) if key[0] in tables and key not in mine]
        for key in others:
            ranks.shared.put(_name(key, ranks.rank), zlib.compress(seen[key].tobytes(), 1))
        return others

    given = ranks.all_gather("exchange the ids that are still there", give)

    def take() -> None:
        for key in mine.keys() & seen.keys():
            mine[key] |= seen[key]
        for rank, keys in enumerate(given):
            for key in keys:
                if key in mine:
                    held = zlib.decompress(ranks.shared.take(_name(key, rank)))
                    mine[key] |= np.frombuffer(held, np.uint8)

    ranks.all_gather("take the ids that are still there", take)
    return mine


def _name(key: tuple[int, int], rank: int) -> str:
    return f"seen/{key[0]}/{key[1]}/{rank}"


def _deal_shards(base: Package, world_size: int) -> dict[str, int]:
    """Return the rank of each shard of the base, and of those of the same name below it."""
    names = _list_shards(base)
    return {name: number * world_size // len(names) for number, name in enumerate(names)}


def list_files(base: Package) -> list[str]:
    """Return the files that the deleted ids of a delta may be in, in order."""
    return list(map(deleted_name, _list_shards(base)))


def _list_shards(base: Package) -> list[str]:
    """Return the names of the shards of a base and of what is below it, in order."""
    return sorted({part.file for its in base.layers for table in its.manifest.tables for part in table.parts})


def write_deleted(
    target: Directory,
    tables: Mapping[int, ServedTable],
    seen: Seen,
    *,
    digest: str,
    tuning: Tuning = STANDARD,
) -> list[WrittenIds]:
    """Write the ids of these parts that were not found, a file for each name of a shard that has some. Any rank.

    ``tables`` as :func:`share_seen` takes it; ``seen`` as it returns it.
    """
    algorithm = XXH3 if digest == NONE else digest
    written = []
    by_shard: dict[str, list[tuple[int, int]]] = {}
    for table, number in sorted(seen):
        by_shard.setdefault(tables[table].parts[number].entry.file, []).append((table, number))
    for shard, keys in sorted(by_shard.items()):
        lost = {key: ids for key in keys if len(ids := _list_ids(tables[key[0]], key[1], seen[key], tuning.base_rows))}
        if not lost:
            continue
        name = deleted_name(shard)
        content, offsets = encode_deleted(list(lost.values()))
        write_receipt(target, Receipt(plan="", name=name, num_bytes=len(content), digest=""))
        target.write(name, content)
        entries: dict[int, list[DeletedIdsEntry]] = {}
        for ((table, _), ids), offset in zip(lost.items(), offsets, strict=True):
            entries.setdefault(table, []).append(DeletedIdsEntry(file=name, offset=offset, ids=len(ids)))
        file = FileEntry(
            path=name, num_bytes=len(content), digest=digest_bytes(content, algorithm, chunk_bytes=tuning.chunk_bytes)
        )
        written.append(WrittenIds(file, entries))
    return written


def _list_ids(table: ServedTable, number: int, bits: np.ndarray, run_rows: int) -> np.ndarray:
    """Return the ids of a part whose rows are served and whose bits are not set (int64), in ascending order."""
    num_rows = table.parts[number].entry.rows
    lost = np.flatnonzero(np.unpackbits(bits, count=num_rows) == 0)
    found = [lost[:0]]
    for first in range(0, num_rows, run_rows):
        last = min(first + run_rows, num_rows)
        low, high = np.searchsorted(lost, [first, last]).tolist()
        if low < high:
            ids, is_served = table.read_ids(number, first, last)
            mine = lost[low:high] - first
            found.append(ids[mine[is_served[mine]]])
    ids = np.sort(np.concatenate(found))
    if len(ids) and table.is_row_indexed:
        raise CommitError(
            f"table {table.name!r}: {len(ids):,} rows by number of the base are not in the source. No manifest was written; "
            "export everything"
        )
    return ids
