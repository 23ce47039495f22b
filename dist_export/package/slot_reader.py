"""Read rows of one slot of a table from the shards of an open package."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.errors import PackageError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import ID_SLOT, Slice, is_in_slice, parse_slice
from dist_export.formats.row_index import (
    MAGIC,
    SLOT,
    find_fault,
    find_rows,
)
from dist_export.kernels.protocol import Column, DamagedIndexError
from dist_export.kernels.selection import select_kernels
from dist_export.manifest import PartEntry, RowIndexEntry, SlotEntry, TableEntry
from dist_export.package.columns import StoredColumn, map_column, read_rows
from dist_export.package.local_cache import LocalCache
from dist_export.package.opened_files import OpenedFiles
from dist_export.package.shard_headers import ShardHeaders
from dist_export.package.slice_edges import find_edges

logger = logging.getLogger(__name__)

_RUN_ROWS = 1 << 20
_IDS = np.dtype("<i8")
_MAX_NUMBER = int(np.iinfo(np.int64).max)


class _PartBlocks(NamedTuple):
    """Where a part's ids and rows are. Offsets are absolute, in bytes."""

    id_file: str
    id_offset: int
    slot_file: str
    slot_offset: int


class PartRun(NamedTuple):
    """Neighbouring rows of one part."""

    ids: np.ndarray
    """int64, (n,); the numbers of the rows for a row-indexed table."""
    rows: np.ndarray
    """As they are stored: uint8, (n, row_bytes)."""


class SlotReader:
    """Reads rows of one slot of a table. Any thread may use it."""

    def __init__(
        self,
        files: OpenedFiles,
        headers: ShardHeaders,
        table: TableEntry,
        slot: SlotEntry,
        *,
        row_bytes: int,
        cache: LocalCache | None = None,
    ) -> None:
        """Prepare to read; no file is read yet. PackageError if a part of the manifest has no slice or lacks the slot."""
        self._cache = cache
        self._files = files
        self._headers = headers
        self._table = table
        self.slot = slot
        self._slot = slot.name
        self._row_bytes = row_bytes
        self._located: dict[int, _PartBlocks] = {}
        self._checked: set[int] = set()
        self._offsets: dict[int, int] = {}
        """Where the rows of a part of a row-indexed table begin."""
        self._has_told = False
        self._slices: list[Slice] = []
        if table.is_row_indexed:
            return
        for part in table.parts:
            found = parse_slice(part.slice)
            if found is None:
                raise PackageError(f"{files.url}: table {table.name!r} has the slice {part.slice!r} in its manifest")
            if not {ID_SLOT, self._slot} <= set(part.keys):
                raise PackageError(f"{files.url}: a part of table {table.name!r} has no {ID_SLOT} or no {self._slot}")
            self._slices.append(found)
        self._edges = find_edges(self._slices)

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of ids (int64, (n,)) as they are stored: uint8 (n, row_bytes), and which ids have one, bool (n,).

        Rows of ids without a row are zeros.
        """
        rows, has_row = self.allocate(len(ids))
        self.fill(ids, rows, has_row)
        rows[~has_row] = 0
        return rows, has_row

    def fill(self, ids: np.ndarray, rows: np.ndarray, has_row: np.ndarray) -> None:
        """Write the rows of those ids that have one into arrays of :meth:`allocate`. What belongs to other ids stays as it is."""
        if self._table.is_row_indexed:
            for number in range(len(self._table.parts)):
                self._read_numbers(number, ids, has_row, rows)
        else:
            self._read_ids(ids, has_row, rows)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids (int64, (n,)) have a row, bool (n,). Rows are not read."""
        has_row = np.zeros(len(ids), bool)
        if self._table.is_row_indexed:
            for part in self._table.parts:
                has_row[self._find_numbers(part, ids)] = True
            return has_row
        for number, wanted in self.deal(ids):
            has_row[wanted] = self._find(number, ids[wanted]) >= 0
        return has_row

    def read_run(self, number: int, first: int, last: int) -> PartRun:
        """Return rows ``first`` to ``last`` - 1 of a part. PackageError if its headers are not what the manifest says."""
        part, (rows, _) = self._table.parts[number], self.allocate(last - first)
        if self._table.is_row_indexed:
            ids = np.arange(first, last) + self._first_row(part)
            file, offset = part.file, self._find_block(part)
        else:
            ids = self.read_ids(number, first, last)
            place = self._locate(number)
            file, offset = place.slot_file, place.slot_offset
        if rows.size:
            with self._files.open_reader(file) as reader:
                reader.read_into(rows.reshape(-1).data, offset + first * self._row_bytes)
        return PartRun(ids.astype(np.int64, copy=False), rows)

    def read_ids(self, number: int, first: int, last: int) -> np.ndarray:
        """Return the ids (int64) of rows ``first`` to ``last`` - 1 of a part of a hash table."""
        place, ids = self._locate(number), np.empty(last - first, _IDS)
        with self._files.open_reader(place.id_file) as reader:
            reader.read_into(ids.data.cast("B"), place.id_offset + first * _IDS.itemsize)
        return ids

    @property
    def table(self) -> TableEntry:
        """The table's entry in the manifest."""
        return self._table

    def find_numbers(self, number: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions of the ids that are numbers of a part's rows, and their rows there (both int64)."""
        mine = self._find_numbers(self._table.parts[number], ids)
        return mine, ids[mine] - self._first_row(self._table.parts[number])

    def find_in(self, number: int, sought: np.ndarray) -> np.ndarray:
        """Return the rows of ids in a part of a hash table (int64); -1 for an id without a row.

        PackageError: the part has no row index, or a damaged one.
        """
        index = self._table.parts[number].row_index
        if index is msgspec.UNSET:
            raise PackageError(
                f"{self._files.url}: table {self._table.name!r} has no row index; export it with row_index: true"
            )
        return self._find_in(number, index, sought)

    @contextlib.contextmanager
    def open_ids(self, number: int) -> Iterator[Column]:
        """Open the ids of a part of a hash table."""
        place = self._locate(number)
        with self._open_column(place.id_file, place.id_offset, self._table.parts[number].rows, _IDS) as column:
            yield column

    def take(self, number: int, found: np.ndarray) -> np.ndarray:
        """Return rows of a part as they are stored: uint8, (n, row_bytes). ``found`` (int64, (n,)) are rows within it."""
        rows, has_row = self.allocate(len(found))
        self._take(number, np.arange(len(found)), found, has_row, rows)
        return rows

    def copy_rows(
        self, number: int, found: np.ndarray, targets: np.ndarray, rows: np.ndarray, has_row: np.ndarray
    ) -> None:
        """Write rows ``found`` (int64) of a part into ``rows[targets]``, in arrays of :meth:`allocate`."""
        self._take(number, targets, found, has_row, rows)

    def allocate(self, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Return room for rows, uint8 (n, row_bytes), and for which ids have one, bool (n,), all false.

        PackageError if that does not fit into memory.
        """
        try:
            # rows that are found are written once, not zeroed before
            return np.empty((num_rows, self._row_bytes), np.uint8), np.zeros(num_rows, bool)
        except (MemoryError, ValueError):
            raise PackageError(
                f"{self._files.url}: {num_rows:,} rows of table {self._table.name!r}, of {self._row_bytes:,} bytes each by its "
                "manifest, do not fit into memory; ask for fewer ids"
            ) from None

    # ---- hash tables ----

    def _read_ids(self, ids: np.ndarray, has_row: np.ndarray, rows: np.ndarray) -> None:
        for number, wanted in self.deal(ids):
            if self._table.parts[number].rows:
                self._take(number, wanted, self._find(number, ids[wanted]), has_row, rows)

    def _find(self, number: int, sought: np.ndarray) -> np.ndarray:
        """Return the rows of ids in a part (int64); -1 for an id without a row."""
        part = self._table.parts[number]
        if not part.rows:
            return np.full(len(sought), -1, np.int64)
        if part.row_index is msgspec.UNSET:
            return self._scan(number, sought)
        return self._find_in(number, part.row_index, sought)

    def deal(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield each part that owns ids, with the positions of these ids: all positions, in order, where one part has all."""
        if self._edges is None:  # slices of different sizes, or that overlap
            for number, part_slice in enumerate(self._slices):
                wanted = np.flatnonzero(is_in_slice(ids, part_slice))
                if len(wanted):
                    yield number, wanted
            return
        if len(ids):
            yield from self._edges.deal(ids)

    def _locate(self, number: int) -> _PartBlocks:
        """Return where a part is. Its headers are compared with the manifest once."""
        place = self._located.get(number)
        if place is not None:
            return place
        part = self._table.parts[number]
        file, id_key, slot_key = part.file, part.keys[ID_SLOT], part.keys[self._slot]
        header = self._headers.of(file)
        # in a copy, the trainer may have written ids and rows into different files
        slot_file = file if slot_key in header.keys else self._headers.file_of(slot_key)
        slot_header = self._headers.of(slot_file)
        if id_key not in header.keys or slot_key not in slot_header.keys:
            raise PackageError(f"{self._files.describe(file)} holds no {id_key!r} or no {slot_key!r}")
        id_place, slot_place = header.keys.index(id_key), slot_header.keys.index(slot_key)
        id_shape, shape = header.shape(id_place), slot_header.shape(slot_place)
        width = int(np.prod(shape[1:], dtype=np.int64)) * DTYPES[int(slot_header.dtypes[slot_place])].itemsize
        if len(id_shape) != 1 or width != self._row_bytes or shape[:1] != id_shape or id_shape[0] != part.rows:
            raise PackageError(f"{self._files.describe(file)}: {slot_key!r} is not what the manifest says of it")
        place = _PartBlocks(file, int(header.begins[id_place]), slot_file, int(slot_header.begins[slot_place]))
        self._located[number] = place
        return place

    def _find_in(self, number: int, index: RowIndexEntry, sought: np.ndarray) -> np.ndarray:
        """Return the rows of ids in a part by its row index (int64); -1 for an id without a row."""
        place, num_rows = self._locate(number), self._table.parts[number].rows
        if number not in self._checked:
            self._check_index(index, num_rows)
            self._checked.add(number)
        with (
            self._open_column(index.file, index.offset, index.num_slots, SLOT) as slots,
            self._open_column(place.id_file, place.id_offset, num_rows, _IDS) as id_column,
        ):
            try:
                return find_rows(
                    slots,
                    id_column,
                    sought,
                    num_slots=index.num_slots,
                    num_rows=num_rows,
                    seed=index.seed,
                    longest_probe=index.longest_probe,
                )
            except DamagedIndexError as error:
                raise self._refuse_index(index, str(error)) from None

    def _take(self, number: int, wanted: np.ndarray, found: np.ndarray, has_row: np.ndarray, rows: np.ndarray) -> None:
        """Read rows of a part: row ``found[i]`` into ``rows[wanted[i]]``, where ``found`` is not -1."""
        if self._row_bytes:
            part = self._table.parts[number]
            if self._table.is_row_indexed:
                file, offset = part.file, self._offset_of(number)
            else:
                place = self._locate(number)
                file, offset = place.slot_file, place.slot_offset
            with self._files.open_mapped(file) as slot_file:
                if isinstance(slot_file, np.ndarray):
                    block = slot_file[offset : offset + part.rows * self._row_bytes].reshape(part.rows, self._row_bytes)
                    select_kernels().take_rows(block, found, wanted, rows=rows, has_row=has_row)
                    return
                hits = np.flatnonzero(found >= 0)
                if len(hits):
                    rows[wanted[hits]] = read_rows(slot_file, offset, self._row_bytes, found[hits])
        has_row[wanted[found >= 0]] = True

    @contextlib.contextmanager
    def _open_column(self, name: str, offset: int, num_values: int, dtype: np.dtype) -> Iterator[Column]:
        """Open a column of a file: mapped from a disk or from the cache, else by ranges of the store."""
        if self._cache is not None:
            data = self._cache.map(name, offset, num_values * dtype.itemsize)
            yield map_column(data, 0, num_values, dtype)
            return
        with self._files.open_mapped(name) as file:
            if isinstance(file, np.ndarray):
                yield map_column(file, offset, num_values, dtype)
            else:
                yield StoredColumn(file, offset, num_values, dtype)

    def _check_index(self, index: RowIndexEntry, num_rows: int) -> None:
        """Refuse an entry of the manifest that cannot be, and a file that is none of row indexes. PackageError."""
        fault = find_fault(
            offset=index.offset,
            num_slots=index.num_slots,
            seed=index.seed,
            longest_probe=index.longest_probe,
            num_rows=num_rows,
            file_size=self._files.stat(index.file).size,
        )
        if fault is not None:
            raise self._refuse_index(index, fault)
        with self._files.open_reader(index.file) as reader:
            magic = reader.fetch(0, len(MAGIC))
        if magic != MAGIC:
            raise self._refuse_index(index, f"it begins with {magic[:8]!r}, which no file of row indexes does")

    def _refuse_index(self, index: RowIndexEntry, reason: str) -> PackageError:
        return PackageError(
            f"{self._files.describe(index.file)}: the row index of table {self._table.name!r} is damaged: {reason}. "
            "Run verify, and export again"
        )

    def _scan(self, number: int, ids: np.ndarray) -> np.ndarray:
        """Return the same as :meth:`_find_in` for a part without a row index, by reading all its ids."""
        if not self._has_told:
            self._has_told = True
            logger.info(
                "%s: table %r has no row index, so each lookup reads its ids; export it with row_index: true",
                self._files.url,
                self._table.name,
            )
        place, num_rows = self._locate(number), self._table.parts[number].rows
        sought, inverse = np.unique(ids, return_inverse=True)
        row_of = np.full(len(sought), -1, np.int64)
        with self._files.open_reader(place.id_file) as reader:
            for first in range(0, num_rows, _RUN_ROWS):
                run = np.empty(min(_RUN_ROWS, num_rows - first), np.int64)
                reader.read_into(run.data.cast("B"), place.id_offset + first * 8)
                positions = np.minimum(np.searchsorted(sought, run), len(sought) - 1)
                hits = np.flatnonzero(sought[positions] == run)
                row_of[positions[hits]] = first + hits
        found: np.ndarray = row_of[inverse]
        return found

    # ---- row-indexed tables ----

    def _read_numbers(self, number: int, ids: np.ndarray, has_row: np.ndarray, rows: np.ndarray) -> None:
        """Read the rows of ``ids``, as far as they are in a part, into ``rows``."""
        part = self._table.parts[number]
        wanted = self._find_numbers(part, ids)
        if len(wanted):
            self._take(number, wanted, ids[wanted] - self._first_row(part), has_row, rows)

    def _find_numbers(self, part: PartEntry, ids: np.ndarray) -> np.ndarray:
        """Return the positions of the ids that are numbers of a part's rows."""
        first_row = self._first_row(part)
        return np.flatnonzero((ids >= first_row) & (ids < min(first_row + part.rows, _MAX_NUMBER)))

    def _offset_of(self, number: int) -> int:
        """Return the position of the rows of a part. Its header is compared with the manifest once."""
        offset = self._offsets.get(number)
        if offset is None:
            offset = self._offsets[number] = self._find_block(self._table.parts[number])
        return offset

    def _first_row(self, part: PartEntry) -> int:
        if not isinstance(part.first_row, int) or self._slot not in part.keys:
            raise PackageError(
                f"{self._files.url}: a part of table {self._table.name!r} has no first_row or no {self._slot}"
            )
        return part.first_row

    def _find_block(self, part: PartEntry) -> int:
        """Return the position of a part's rows in its file, after comparing its header with the manifest."""
        header, key = self._headers.of(part.file), part.keys[self._slot]
        place = header.keys.index(key) if key in header.keys else -1
        num_bytes = int(header.ends[place] - header.begins[place]) if place >= 0 else -1
        if place < 0 or int(header.rows[place]) != part.rows or num_bytes != part.rows * self._row_bytes:
            raise PackageError(f"{self._files.describe(part.file)}: {key!r} is not what the manifest says of it")
        return int(header.begins[place])
