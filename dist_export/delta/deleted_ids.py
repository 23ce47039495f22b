"""Find and write the ids of the base that the source has no more. Each shard of the base is the matter of one rank."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.errors import CommitError
from dist_export.formats.deleted_ids import deleted_name, encode_deleted
from dist_export.formats.digests import NONE, XXH3, digest_bytes
from dist_export.manifest import DeletedIdsEntry, FileEntry, TableEntry
from dist_export.package.reader import Package
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.workdir.state import Receipt, write_receipt

_RUN_ROWS = 1 << 20

Seen = Mapping[tuple[int, int], np.ndarray]
"""(table of the source, part of the base) -> one bit a row of that part (uint8): whether its id was found in the source."""


class WrittenIds(NamedTuple):
    """A file of deleted ids, as it is written."""

    file: FileEntry
    entries: Mapping[int, Sequence[DeletedIdsEntry]]
    """By table, in the order of the base's parts."""


def share_seen(
    ranks: Ranks, base: Package, tables: Mapping[int, TableEntry], seen: Seen
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
        (table, number): np.zeros(-(-part.rows // 8), np.uint8)
        for table, entry in tables.items()
        for number, part in enumerate(entry.parts)
        if owner_of[part.file] == ranks.rank
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
    """Return the rank of each shard of the base."""
    names = sorted({part.file for table in base.manifest.tables for part in table.parts})
    return {name: number * world_size // len(names) for number, name in enumerate(names)}


def write_deleted(
    target: Directory, base: Package, tables: Mapping[int, TableEntry], seen: Seen, *, digest: str
) -> list[WrittenIds]:
    """Write the ids of these parts that were not found, a file for each shard of the base that has some. Any rank.

    ``tables`` as :func:`share_seen` takes it; ``seen`` as it returns it.
    """
    algorithm = XXH3 if digest == NONE else digest
    written = []
    by_shard: dict[str, list[tuple[int, int]]] = {}
    for table, number in sorted(seen):
        by_shard.setdefault(tables[table].parts[number].file, []).append((table, number))
    for shard, keys in sorted(by_shard.items()):
        lost = {key: ids for key in keys if len(ids := _list_ids(base, tables[key[0]], key[1], seen[key]))}
        if not lost:
            continue
        name = deleted_name(shard)
        content, offsets = encode_deleted(list(lost.values()))
        write_receipt(target, Receipt(plan="", name=name, num_bytes=len(content), digest=""))
        target.write(name, content)
        entries: dict[int, list[DeletedIdsEntry]] = {}
        for ((table, _), ids), offset in zip(lost.items(), offsets, strict=True):
            entries.setdefault(table, []).append(DeletedIdsEntry(file=name, offset=offset, ids=len(ids)))
        file = FileEntry(path=name, num_bytes=len(content), digest=digest_bytes(content, algorithm))
        written.append(WrittenIds(file, entries))
    return written


def _list_ids(base: Package, table: TableEntry, number: int, bits: np.ndarray) -> np.ndarray:
    """Return the ids of a part whose bits are not set (int64), in ascending order."""
    part = table.parts[number]
    lost = np.flatnonzero(np.unpackbits(bits, count=part.rows) == 0)
    if not len(lost):
        return lost
    if table.is_row_indexed:
        raise CommitError(
            f"table {table.name!r}: {len(lost):,} rows by number of the base are not in the source. No manifest was written; "
            "export everything"
        )
    found = [ids[lost[low:high] - first] for first, low, high, ids in _runs(base, table.name, number, part.rows, lost)]
    return np.sort(np.concatenate(found))


def _runs(
    base: Package, table: str, number: int, num_rows: int, lost: np.ndarray
) -> Iterator[tuple[int, int, int, np.ndarray]]:
    """Yield (first row, first and last place in ``lost``, ids of the run) of runs of a part that hold lost rows."""
    reader = base.rows_of(table)
    for first in range(0, num_rows, _RUN_ROWS):
        last = min(first + _RUN_ROWS, num_rows)
        low, high = np.searchsorted(lost, [first, last]).tolist()
        if low < high:
            yield first, low, high, reader.read_ids(number, first, last)
