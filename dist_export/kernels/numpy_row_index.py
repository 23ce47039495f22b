"""The row index in numpy: keys, slots and searches. ``formats/row_index.py`` says what it is."""

from __future__ import annotations

import numpy as np

from dist_export.kernels.protocol import Column, DamagedIndexError

_SLOT = np.dtype("<u4")
_EMPTY = np.uint32(0xFFFFFFFF)
_ODD = np.uint64(0xD6E8FEB86659FD93)
"""An odd multiplier with well-mixed bits, from Pelle Evensen's rrxmrrxmsx."""
_GOLDEN = 0x9E3779B97F4A7C15


def hash_ids(ids: np.ndarray, seed: int) -> np.ndarray:
    """Return a hash (uint64, below 2**32) of int64 ids: two rounds of xor-shift and multiplication, and the upper 32 bits."""
    hashed: np.ndarray = ids.view(np.uint64) ^ np.uint64(seed * _GOLDEN % (1 << 64))
    for _ in range(2):
        hashed ^= hashed >> np.uint64(32)
        hashed *= _ODD
    hashed ^= hashed >> np.uint64(29)
    hashed >>= np.uint64(32)
    return hashed


def find_buckets(hashed: np.ndarray, num_buckets: int) -> np.ndarray:
    """Return the bucket (int64) of hashes, which are changed in place: ``hash * num_buckets >> 32``."""
    whole, rest = num_buckets >> 32, num_buckets & ((1 << 32) - 1)
    if not whole:
        hashed *= np.uint64(rest)
        hashed >>= np.uint64(32)
        return hashed.view(np.int64)
    buckets: np.ndarray = hashed * np.uint64(rest)  # the product with all of it would not fit in 64 bits
    buckets >>= np.uint64(32)
    hashed *= np.uint64(whole)
    buckets += hashed
    return buckets.view(np.int64)


class NumpyRowIndex:
    """The twin of ``CompiledRowIndex``."""

    def encode_keys(self, ids: np.ndarray, first_row: int, seed: int) -> np.ndarray:
        """See the protocol."""
        keys = hash_ids(ids, seed)
        keys <<= np.uint64(32)
        keys |= np.arange(first_row, first_row + len(ids), dtype=np.uint64)
        return keys

    def fill_slots(self, keys: np.ndarray, *, num_buckets: int, num_slots: int) -> tuple[np.ndarray, int]:
        """See the protocol."""
        buckets = find_buckets(keys >> np.uint64(32), num_buckets)
        numbers = np.arange(len(keys))
        # each row gets its bucket, or the slot after that of the row before it
        positions = buckets - numbers
        positions[0] = max(int(positions[0]), num_slots)
        np.maximum.accumulate(positions, out=positions)
        positions += numbers
        slots = np.full(int(positions[-1]) + 1 - num_slots, _EMPTY, _SLOT)
        slots[positions - num_slots] = keys.astype(np.uint32)
        return slots, int((positions - buckets).max())

    def find_rows(
        self,
        slots: Column,
        ids: Column,
        sought: np.ndarray,
        *,
        num_slots: int,
        num_rows: int,
        num_buckets: int,
        seed: int,
        longest_probe: int,
    ) -> np.ndarray:
        """See the protocol."""
        found = np.full(len(sought), -1, np.int64)
        positions = find_buckets(hash_ids(sought, seed), num_buckets)
        asked: np.ndarray | None = None  # the numbers in ``found``; None for all
        for _ in range(longest_probe + 1):
            if not len(positions):
                break
            if int(positions.max()) >= num_slots:
                raise DamagedIndexError(f"it has {num_slots:,} slots, and a search goes beyond them")
            rows = slots.take(positions).astype(np.int64)
            is_used = rows != int(_EMPTY)
            if not is_used.all():
                used = np.flatnonzero(is_used)
                rows, positions, sought = rows[used], positions[used], sought[used]
                asked = used if asked is None else asked[used]
                if not len(rows):
                    break
            if int(rows.max()) >= num_rows:
                raise DamagedIndexError(f"it holds row {int(rows.max()):,}, and the part has {num_rows:,} rows")
            is_hit = ids.take(rows) == sought
            hits = np.flatnonzero(is_hit)
            found[hits if asked is None else asked[hits]] = rows[hits]
            left = np.flatnonzero(~is_hit)
            asked = left if asked is None else asked[left]
            positions, sought = positions[left] + 1, sought[left]
        return found

    def count_rows_at(
        self,
        slots: Column,
        ids: np.ndarray,
        first_row: int,
        *,
        num_slots: int,
        num_buckets: int,
        seed: int,
        longest_probe: int,
    ) -> int:
        """See the protocol."""
        positions = find_buckets(hash_ids(ids, seed), num_buckets)
        rows = np.arange(first_row, first_row + len(ids))
        num_found = 0
        for _ in range(longest_probe + 1):
            inside = positions < num_slots
            positions, rows = positions[inside], rows[inside]
            there = slots.take(positions)
            is_hit = there == rows
            num_found += int(np.count_nonzero(is_hit))
            left = np.flatnonzero(~is_hit & (there != _EMPTY))
            positions, rows = positions[left] + 1, rows[left]
            if not len(rows):
                break
        return num_found

    def take_rows(
        self, block: np.ndarray, found: np.ndarray, targets: np.ndarray, *, rows: np.ndarray, has_row: np.ndarray
    ) -> None:
        """See the protocol."""
        hits = np.flatnonzero(found >= 0)
        rows[targets[hits]] = block.take(found[hits], axis=0)
        has_row[targets[hits]] = True
