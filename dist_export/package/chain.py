"""A chain: deltas on top of each other and of a full package. The ids of all its links are merged once for each table.

The last link that says anything of an id has the last word. So a lookup asks the merged ids and the full package, however many
links there are.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dist_export.formats.delta_entries import DeltaEntry
from dist_export.formats.id_list import IdSieve
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_index import SlotFiller, encode_keys, find_rows
from dist_export.manifest import Manifest, SlotEntry, TableEntry, list_entries
from dist_export.package.layers import DeltaIds, LayeredReader
from dist_export.package.slot_reader import SlotReader

logger = logging.getLogger(__name__)

DELETED = -1
"""In place of a link and of a row: the id has no row."""
BYTES_OF_ID = 28
"""What a merged id takes in memory, at most: the id, where its row is, its slot in the index, and its bits in the sieve."""
_SPREAD = 4
"""2 to the power of this is how many bits the sieve has for each id, at least."""
_SEED = 0
_MOST_SHORT = 1 << 15
"""Parts up to this many are sorted as short numbers, which is faster."""
_RUN_ROWS = 1 << 20
_MOST_MERGED = 1 << 26
"""More ids are not merged for lookups: they would take too long to merge, and too much memory. The links are asked in turn."""


class Layer(Protocol):
    """An open :class:`~dist_export.package.reader.Package`."""

    manifest: Manifest
    delta_ids: DeltaIds

    def rows_of(self, table: str, *, slot: str = ...) -> SlotReader:
        """Return what reads its own rows."""


class LinkRows(NamedTuple):
    """What a link has of one table."""

    table: TableEntry
    reader: SlotReader
    """Of any slot."""
    ids: DeltaIds


class FoundRows(NamedTuple):
    """Ids whose rows are in one part of one link."""

    link: int
    part: int
    positions: np.ndarray
    """Of the ids, int64."""
    rows: np.ndarray
    """Within the part, int64."""


class MergedIds:
    """The ids of one table of which any link of a chain says anything. Any thread may ask."""

    def __init__(self, links: Sequence[LinkRows]) -> None:
        """Read and merge the ids. ``links``: the last one first. PackageError if one of them is damaged."""
        started = time.monotonic()
        self._parts = [(link, number) for link, its in enumerate(links) for number in range(len(its.table.parts))]
        sizes = [links[link].table.parts[number].rows for link, number in self._parts]
        self._begins = np.cumsum([0, *sizes])
        """Where the rows of each part begin, if all parts lie behind each other."""
        found, spots = _read_ids(links, dict(zip(self._parts, self._begins.tolist(), strict=False)))
        ids, first = np.unique(found, return_index=True)  # of an id that several links have, that of the last link
        self._ids, self._spots = ids, spots[first]
        self._sieve = IdSieve(len(ids), spread=_SPREAD)
        self._sieve.add(ids)
        filler = SlotFiller(len(ids))
        keys = np.sort(encode_keys(ids, 0, _SEED))
        self._slots = np.concatenate([*filler.add(keys), filler.finish()])
        self._longest_probe = filler.longest_probe
        logger.debug(
            "table %r: %s ids of %d deltas merged in %.2f s; they take %s bytes",
            links[0].table.name,
            f"{len(ids):,}",
            len(links),
            time.monotonic() - started,
            f"{self.num_bytes:,}",
        )

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def num_bytes(self) -> int:
        """Bytes that they take in memory."""
        return self._ids.nbytes + self._spots.nbytes + self._slots.nbytes + self._sieve.num_bytes

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of ids (int64, (n,)) of which a link says anything, and where their rows are, or ``DELETED``."""
        positions = np.flatnonzero(self._sieve.passes(ids))
        if not len(self._ids):
            return positions[:0], self._spots
        found = find_rows(
            self._slots,
            self._ids,
            ids[positions],
            num_slots=len(self._slots),
            num_rows=len(self._ids),
            seed=_SEED,
            longest_probe=self._longest_probe,
        )
        is_there = found >= 0
        return positions[is_there], self._spots[found[is_there]]

    def deal(self, positions: np.ndarray, spots: np.ndarray) -> Iterator[FoundRows]:
        """Yield the parts that hold rows, for what :meth:`find` returned. Ids that are gone are passed over."""
        is_there = spots != DELETED
        positions, spots = positions[is_there], spots[is_there]
        numbers = np.searchsorted(self._begins, spots, side="right") - 1
        order = np.argsort(numbers.astype(np.int16) if len(self._parts) <= _MOST_SHORT else numbers, kind="stable")
        positions, spots = positions[order], spots[order]
        edges = np.searchsorted(numbers[order], np.arange(len(self._parts) + 1)).tolist()
        for number, (link, part) in enumerate(self._parts):
            mine = slice(edges[number], edges[number + 1])
            if mine.start < mine.stop:
                yield FoundRows(link, part, positions[mine], spots[mine] - self._begins[number])

    def are_last(self, ids: np.ndarray, link: int, part: int, first_row: int) -> np.ndarray:
        """Return which of the rows of a part from ``first_row`` on, whose ids these are, no later link replaces or takes away."""
        begin = self._begins[self._parts.index((link, part))]
        positions, spots = self.find(ids)
        is_last = np.zeros(len(ids), bool)
        is_last[positions] = spots == begin + first_row + positions
        return is_last


def _read_ids(links: Sequence[LinkRows], begins: dict[tuple[int, int], int]) -> tuple[np.ndarray, np.ndarray]:
    """Return all ids of all links and where their rows are; those of a later link come first."""
    ids, spots = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number, link in enumerate(links):
        for part, entry in enumerate(link.table.parts):
            for first in range(0, entry.rows, _RUN_ROWS):
                ids.append(link.reader.read_ids(part, first, min(first + _RUN_ROWS, entry.rows)))
                spots.append(begins[number, part] + first + np.arange(len(ids[-1])))
        deleted = link.ids.deleted(link.table)
        if deleted is not None:
            ids.append(deleted.ids)
            spots.append(np.full(len(deleted), DELETED))
    return np.concatenate(ids), np.concatenate(spots)


def count_ids(tables: Sequence[TableEntry]) -> int:
    """Return how many ids deltas have of tables, at most. ``tables``: their entries in the manifests."""
    deleted = sum(table.delta.deleted for table in tables if isinstance(table.delta, DeltaEntry))
    return deleted + sum(part.rows for table in tables for part in table.parts)


class Merging:
    """The merged ids of a chain by table. Any thread; each table is merged once."""

    def __init__(self) -> None:
        self._merged: dict[str, MergedIds] = {}
        self._lock = threading.Lock()

    def get(self, links: Sequence[LinkRows]) -> MergedIds:
        """Return the merged ids of a table. ``links`` as :class:`MergedIds` takes them."""
        name = links[0].table.name
        with self._lock:
            if name not in self._merged:
                self._merged[name] = MergedIds(links)
            return self._merged[name]


class ChainReader:
    """Reads rows of one slot of a table from a chain. Any thread."""

    def __init__(self, links: Sequence[LinkRows], base: SlotReader | None, merging: Merging) -> None:
        """Prepare to read.

        Args:
            links: the last one first; each reads the slot.
            base: of the full package; None if it has no such table.
            merging: of the chain.
        """
        self._links = links
        self._base = base
        self._merging = merging
        self._is_merged = count_ids([link.table for link in links]) <= _MOST_MERGED
        self.slot: SlotEntry = links[0].reader.slot

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of ids and which ids have one, as :meth:`SlotReader.read` does."""
        rows, has_row = self._links[0].reader.allocate(len(ids))
        if self._base is not None:
            self._base.fill(ids, rows, has_row)
        if self._is_merged:
            merged = self._merging.get(self._links)
            positions, spots = merged.find(ids)
            has_row[positions[spots == DELETED]] = False
            for found in merged.deal(positions, spots):
                self._links[found.link].reader.copy_rows(found.part, found.rows, found.positions, rows, has_row)
        else:
            for link in reversed(self._links):
                if (deleted := link.ids.deleted(link.table)) is not None:
                    has_row[deleted.contains(ids)] = False
                link.reader.fill(ids, rows, has_row)
        rows[~has_row] = 0
        return rows, has_row

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids (int64, (n,)) have a row, bool (n,). Rows are not read."""
        has_row = np.zeros(len(ids), bool) if self._base is None else self._base.contains(ids)
        for link in reversed(self._links):
            if (deleted := link.ids.deleted(link.table)) is not None:
                has_row[deleted.contains(ids)] = False
            has_row |= link.reader.contains(ids)
        return has_row


def list_links(layers: Sequence[Layer], table: str, slot: str) -> tuple[list[LinkRows], SlotReader | None]:
    """Return what the deltas of a chain have of a table, the last one first, and what the full package below them has.

    ``layers``: the packages of the chain, the full one last. PackageError as :meth:`Package.rows_of` raises it.
    """
    entries = list_entries([layer.manifest for layer in layers], table)
    links = [
        LinkRows(entry, layer.rows_of(table, slot=slot), layer.delta_ids)
        for layer, entry in zip(layers[:-1], entries, strict=False)
    ]
    return links, layers[-1].rows_of(table, slot=slot) if len(entries) == len(layers) else None


def merge_all(layers: Sequence[Layer], merging: Merging) -> None:
    """Merge the ids of all tables now, and not at their first lookup. PackageError if one of the packages is damaged."""
    for table in layers[0].manifest.tables:
        slot = next((its.name for its in table.kept if its.name != ID_SLOT), None)
        links = [] if slot is None else list_links(layers, table.name, slot)[0]
        if len(links) > 1 and count_ids([link.table for link in links]) <= _MOST_MERGED:
            merging.get(links)


def read_layers(layers: Sequence[Layer], table: str, slot: str, merging: Merging) -> LayeredReader | ChainReader:
    """Return what reads one slot of a table from a chain, as :func:`list_links` takes it. One delta needs no merged ids."""
    links, base = list_links(layers, table, slot)
    if len(links) == 1:
        return LayeredReader(links[0].table, base, links[0].reader, links[0].ids)
    return ChainReader(links, base, merging)
