"""Find ids in a long sorted list. Pure: arrays in, arrays out."""

from __future__ import annotations

import numpy as np
import xxhash

from dist_export.formats.recis import mix

_PIECE_IDS = 1 << 16

_BLOCK_IDS = 256
"""Ids in a block of a list. The first id of each block stays in a core's cache."""


class IdSieve:
    """Tells most ids that are not in a set from those that may be. Any thread may ask it."""

    def __init__(self, num_ids: int, *, spread: int) -> None:
        """Make room for ``num_ids`` ids.

        ``spread``: there are 2 to the power of ``spread`` bits for each id, or up to twice as many. At most one in so many other
        ids passes.
        """
        bits = max(num_ids.bit_length() + spread, 3)
        self._shift = np.uint64(64 - bits)
        self._bits = np.zeros(1 << (bits - 3), np.uint8)

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in memory."""
        return self._bits.nbytes

    def add(self, ids: np.ndarray) -> None:
        """Let these int64 ids pass from now on."""
        for first in range(0, len(ids), _PIECE_IDS):
            byte, bit = self._locate(ids[first : first + _PIECE_IDS])
            np.bitwise_or.at(self._bits, byte, np.uint8(1) << bit)

    def passes(self, ids: np.ndarray) -> np.ndarray:
        """Return which int64 ids may be in the set (bool)."""
        byte, bit = self._locate(ids)
        passed: np.ndarray = ((self._bits.take(byte) >> bit) & np.uint8(1)).view(bool)
        return passed

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the byte (int64) and the number of the bit in it (uint8) that an id sets."""
        hashed = mix(ids) >> self._shift
        return (hashed >> np.uint64(3)).view(np.int64), hashed.astype(np.uint8) & np.uint8(7)


class IdList:
    """Finds ids in a list. Safe to use from any thread."""

    def __init__(self, ids: np.ndarray) -> None:
        """Build the sieve for ``ids``: int64, sorted, without duplicates."""
        self.ids = ids
        self.digest = xxhash.xxh3_128_digest(ids.data)
        self._heads = ids[::_BLOCK_IDS].copy()
        self._sieve = IdSieve(len(ids), spread=3)
        self._sieve.add(ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_bytes(self) -> int:
        """Bytes that the list takes in memory."""
        return int(self.ids.nbytes + self._heads.nbytes + self._sieve.num_bytes)

    def contains(self, ids: np.ndarray) -> np.ndarray:
        """Return which int64 ids are in the list (bool)."""
        found = self._sieve.passes(ids)
        candidates = np.flatnonzero(found)
        found[candidates] = self._holds(ids[candidates])
        return found

    def _holds(self, ids: np.ndarray) -> np.ndarray:
        """Return which ids are in the list (bool). Each step of the binary search is one pass, so that memory waits overlap."""
        if not len(ids):
            return np.zeros(0, bool)
        last = len(self.ids) - 1
        place = np.maximum(np.searchsorted(self._heads, ids, side="right") - 1, 0) * _BLOCK_IDS
        step = _BLOCK_IDS // 2
        while step:
            probe = np.minimum(place + step, last)
            place = np.where(self.ids[probe] <= ids, probe, place)
            step //= 2
        found: np.ndarray = self.ids[place] == ids
        return found
