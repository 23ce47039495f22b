"""Compare the rows of a source with those of a base, as they are written: after casts, bit by bit."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.row_reader import RowReader
from dist_export.delta.mismatch import find_ignored
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_encodings import RowCast
from dist_export.formats.row_fingerprints import fingerprint_rows
from dist_export.formats.tuning import STANDARD
from dist_export.kernels.selection import select_kernels
from dist_export.package.reader import Package
from dist_export.package.row_fingerprints import PartFingerprints
from dist_export.package.served_table import ServedTable, estimate_bytes
from dist_export.plan.casts import cast_of
from dist_export.plan.selection import Selection


class Compared(NamedTuple):
    """Rows of one table, as they stand to the base."""

    same: int = 0
    changed: int = 0
    new: int = 0

    def plus(self, other: Compared) -> Compared:
        """Return the sums."""
        return Compared(self.same + other.same, self.changed + other.changed, self.new + other.new)


class _Slot(NamedTuple):
    column: int
    stored_bytes: int
    written_bytes: int
    cast: RowCast | None
    name: str
    """In the base."""


class _Rows:
    """Neighbouring rows of a part of the source as they are written. They are read once, if they are asked for."""

    def __init__(self, slots: Sequence[_Slot], part: int, first_row: int, num_rows: int, reader: RowReader) -> None:
        self._slots = slots
        self._part = part
        self._first_row = first_row
        self._num_rows = num_rows
        self._reader = reader

    @functools.cached_property
    def slots(self) -> list[np.ndarray]:
        """The rows of each slot: uint8, (num_rows, bytes)."""
        return [self._read(slot) for slot in self._slots]

    @functools.cached_property
    def fingerprints(self) -> np.ndarray:
        """The fingerprints of the rows: uint64, (num_rows,)."""
        return fingerprint_rows(self._num_rows, [rows for rows in self.slots if rows.shape[1]])

    def _read(self, slot: _Slot) -> np.ndarray:
        held = np.empty(self._num_rows * slot.stored_bytes, np.uint8)
        self._reader.read_into(held, self._part, slot.column, self._first_row, self._num_rows)
        rows = held.reshape(self._num_rows, slot.stored_bytes)
        return rows if slot.cast is None else slot.cast.encode(rows)


class BaseRows:
    """Which rows of the source the base has with the same bytes. Any thread. See :class:`~dist_export.plan.prune.LeftRows`.

    Rows of a part that are asked for in their order for the first time are compared, and the answer is kept, one bit a row.
    So the census compares, and the gathers of the same rank read what it found. A rank that is asked for other parts compares
    again.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        base: Package,
        *,
        is_exact: bool,
        ignored: Sequence[str] = (),
        dropped_in: Callable[[int, int, int], np.ndarray] | None = None,
        piece_bytes: int = STANDARD.compared_bytes,
    ) -> None:
        """Prepare to compare; no row is read yet.

        Args:
            checkpoint: the source, with row numbers as ids where the base goes by row numbers.
            selection: its kept slots, as they are written.
            base: the base, with row fingerprints or without. :func:`~dist_export.delta.mismatch.find_mismatch` has found nothing.
            is_exact: read the base's rows, even if it has fingerprints of them.
            ignored: slots that are not compared.
            dropped_in: (part, first row, number of rows) -> those that are dropped (int64, from the first row on), and so are
                not compared; None if no row is.
            piece_bytes: bytes of a slot, as they are written, that are compared at once.
        """
        self._checkpoint = checkpoint
        self._base = base
        self._is_exact = is_exact
        self._fingerprints: dict[tuple[int, int], PartFingerprints | None] = {}
        self._dropped_in = dropped_in
        self._piece_bytes = piece_bytes
        self.ignored = find_ignored(selection, ignored)
        """By table, which of its slots are not compared."""
        slots_of = [self._list_slots(table, selection) for table in range(len(checkpoint.tables))]
        self.served = [
            ServedTable(base, table.name, slot=slots[0].name)
            for table, slots in zip(checkpoint.tables, slots_of, strict=True)
        ]
        """By table, the rows that base and what is below it serve."""
        self._slots = [
            [slot for slot in slots if slot.name not in self.ignored[table]] for table, slots in enumerate(slots_of)
        ]
        self._bits: dict[int, np.ndarray] = {}
        """By part, one bit a row: whether it is the same."""
        self._known: dict[int, int] = {}
        """By part, how many rows were compared."""
        self._seen: dict[tuple[int, int], np.ndarray] = {}
        """By table and part of the base, one bit a row: whether the source has its id."""
        self._counts: dict[int, Compared] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds in memory for long, apart from one bit a row: the merged ids of a chain."""
        return estimate_bytes(self._base)

    def digest(self) -> bytes:
        """Return a digest of the base and of what is not compared."""
        return repr((self._base.manifest.digest, list(map(sorted, self.ignored)))).encode()

    @property
    def counts(self) -> dict[int, Compared]:
        """By table, what was compared on this rank."""
        return dict(self._counts)

    @property
    def seen(self) -> dict[tuple[int, int], np.ndarray]:
        """By table and number of a served part, which of its rows this rank has found in the source: one bit a row, uint8."""
        return dict(self._seen)

    def find(self, part: int, first_row: int, ids: np.ndarray, is_kept: np.ndarray, reader: RowReader) -> np.ndarray:
        """Return which rows are the same; see :class:`~dist_export.plan.prune.LeftRows`."""
        known, end = self._known.get(part, 0), first_row + len(ids)
        if end <= known:
            first_byte = first_row // 8
            bits = np.unpackbits(self._bits[part][first_byte : -(-end // 8)])
            kept: np.ndarray = bits[first_row - first_byte * 8 :][: len(ids)].astype(bool) & is_kept
            return kept
        is_first = first_row == known
        is_asked = is_kept.copy()
        if self._dropped_in is not None:
            is_asked[self._dropped_in(part, first_row, len(ids))] = False
        is_same = self._compare(part, first_row, ids, is_asked, reader, is_first=is_first)
        if is_first:
            self._keep(part, first_row, is_same)
        return is_same

    # ---- within ----

    def _list_slots(self, table: int, selection: Selection) -> list[_Slot]:
        meta = self._checkpoint.tables[table]
        slots = []
        for written in selection.kept[table]:
            if written.name == ID_SLOT:
                continue
            stored = meta.slots[written.column]
            cast = cast_of(stored, written)
            slots.append(_Slot(written.column, stored.row_bytes, written.row_bytes, cast, written.name))
        return slots

    def _compare(
        self, part: int, first_row: int, ids: np.ndarray, is_asked: np.ndarray, reader: RowReader, *, is_first: bool
    ) -> np.ndarray:
        table = int(self._checkpoint.parts.table[part])
        slots = self._slots[table]
        widest = max([1, *(max(slot.stored_bytes, slot.written_bytes) for slot in slots)])
        step = max(1, self._piece_bytes // widest)
        is_same = np.zeros(len(ids), bool)
        total = Compared()
        for begin in range(0, len(ids), step):
            end = min(begin + step, len(ids))
            num_asked = int(np.count_nonzero(is_asked[begin:end]))
            if not num_asked:
                continue
            asked = None if num_asked == end - begin else np.flatnonzero(is_asked[begin:end])
            rows = _Rows(slots, part, first_row + begin, end - begin, reader)
            num_found = self._compare_piece(table, ids[begin:end], asked, rows, is_same[begin:end], is_first=is_first)
            num_same = int(np.count_nonzero(is_same[begin:end]))
            total = total.plus(Compared(num_same, num_found - num_same, num_asked - num_found))
        if is_first:
            with self._lock:
                self._counts[table] = self._counts.get(table, Compared()).plus(total)
        return is_same

    def _compare_piece(
        self, table: int, ids: np.ndarray, asked: np.ndarray | None, now: _Rows, is_same: np.ndarray, *, is_first: bool
    ) -> int:
        """Set which rows of a piece are the same, all false before, and return how many ids of it the base has.

        ``asked``: which rows to compare (int64); None for all.
        """
        num_found = 0
        for number, wanted, rows_there in self.served[table].find(ids if asked is None else ids[asked]):
            positions, found = wanted if asked is None else asked[wanted], rows_there
            if len(found) and found.min() < 0:
                positions, found = positions[found >= 0], found[found >= 0]
            num_found += len(found)
            its = slice(None) if len(found) == len(ids) else positions  # of all rows, in order, none is picked out
            if is_first:
                self._mark(table, number, found)
            in_base = None if self._is_exact else self._fingerprints_of(table, number)
            if in_base is not None:
                is_same[its] = now.fingerprints[its] == in_base.fingerprints(found)
                continue
            is_equal = np.ones(len(found), bool)
            for slot, rows in zip(self._slots[table], now.slots, strict=True):
                is_equal &= _are_equal(rows[its], self.served[table].take(number, found, slot=slot.name))
            is_same[its] = is_equal
        return num_found

    def _fingerprints_of(self, table: int, number: int) -> PartFingerprints | None:
        """Return the fingerprints of a part of the base; None if it has none."""
        key = (table, number)
        if key not in self._fingerprints:  # two threads may open them both, and either is good
            self._fingerprints[key] = self.served[table].open_fingerprints(number)
        return self._fingerprints[key]

    def _mark(self, table: int, number: int, rows: np.ndarray) -> None:
        """Note rows of a part of the base whose ids the source has."""
        num_rows = self.served[table].parts[number].entry.rows
        with self._lock:  # threads may add to one byte
            bits = self._seen.setdefault((table, number), np.zeros(-(-num_rows // 8), np.uint8))
            select_kernels().mark_rows(bits, rows)

    def _keep(self, part: int, first_row: int, is_same: np.ndarray) -> None:
        num_rows = int(self._checkpoint.parts.rows[part])
        bits = self._bits.setdefault(part, np.zeros(-(-num_rows // 8), np.uint8))
        assert first_row % 8 == 0, "runs of a part begin at whole bytes"
        bits[first_row // 8 : -(-(first_row + len(is_same)) // 8)] = np.packbits(is_same)
        self._known[part] = first_row + len(is_same)


def _are_equal(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return which rows (uint8, (n, bytes)) have the same bytes."""
    if one.shape[1] % 8 == 0:
        one, other = (np.ascontiguousarray(rows).view(np.uint64) for rows in (one, other))
    is_equal: np.ndarray = (one == other).all(axis=1)
    return is_equal
