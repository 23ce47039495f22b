"""Check for duplicate ids without sorting: numpy sorts 64-bit integers at 50 ns each, this takes about 10.

In one sweep each id writes its number into a hash table, then reads which number is there. An id that reads another
number has lost to an id with an equal hash. If the two ids are equal, that is a duplicate. Otherwise the losers, a fifth of
all ids, try again among themselves with another hash. The result does not depend on chance: equal ids always meet.
"""

from __future__ import annotations

import numpy as np

_MULTIPLIERS = tuple(
    np.uint64(odd)
    for odd in (
        0xD6E8FEB86659FD93,
        0xC2B2AE3D27D4EB4F,
        0xFF51AFD7ED558CCD,
        0xC4CEB9FE1A85EC53,
        0x94D049BB133111EB,
        0xBF58476D1CE4E5B9,
    )
)
"""One for each hash: odd constants with well-mixed bits, from the finalizers of murmur3 and splitmix64 and from xxh64."""

_FEW = 1 << 10
"""Up to this many ids are sorted, because a sweep takes longer."""

_DIRECT_IDS = 1 << 19
"""Up to this many ids the table of one sweep stays in the cache. More ids are divided into buckets as they arrive."""

_BUCKET_IDS = 1 << 17
_MAX_BUCKET_BITS = 8

_DEAL_IDS = 1 << 16
"""How many ids are divided into buckets at a time: they stay in the cache, and each bucket gets enough ids to copy."""


def has_duplicates(ids: np.ndarray, groups: np.ndarray | None = None) -> bool:
    """Return whether an int64 id is duplicate; with ``groups`` (int64, parallel), whether it is within one group."""
    left = ids.view(np.uint64)
    for multiplier in _MULTIPLIERS:
        if len(left) <= _FEW:
            break
        bits = (len(left) - 1).bit_length() + 1
        hashed = left * multiplier
        if groups is not None:
            hashed ^= groups.view(np.uint64) * _MULTIPLIERS[-1]
        hashed >>= np.uint64(64 - bits)
        positions = hashed.view(np.int64)
        table = np.empty(1 << bits, np.int32)
        numbers = np.arange(len(left), dtype=np.int32)
        table[positions] = numbers
        winners = table[positions]
        losers = np.flatnonzero(winners != numbers)
        winners = winners[losers]
        is_equal = left[losers] == left[winners]
        if groups is not None:
            is_equal &= groups[losers] == groups[winners]
            groups = groups[losers]
        if is_equal.any():
            return True
        left = left[losers]
    if groups is None:
        ordered = np.sort(left)
        return bool((ordered[1:] == ordered[:-1]).any())
    order = np.lexsort((left, groups))
    return bool(((left[order[1:]] == left[order[:-1]]) & (groups[order[1:]] == groups[order[:-1]])).any())


class HeldIds:
    """Collects ids that arrive in runs. If there are many, they are divided into buckets of equal hash as they arrive."""

    def __init__(self, capacity: int) -> None:
        """Allocate memory. ``capacity``: the most ids at a time; 8 bytes each are allocated once and reused."""
        self._ids = np.empty(capacity, np.int64)
        self.expect(capacity)

    def expect(self, count: int) -> None:
        """Forget all ids and prepare for at most ``count`` new ones. Memory is reused, because new memory is slow at first."""
        self._room = min(count, len(self._ids))
        self._bits = 0
        if count > _DIRECT_IDS:
            self._bits = min(_MAX_BUCKET_BITS, (count // _BUCKET_IDS).bit_length())
        self._edges: list[np.ndarray] = []
        """For each deal, where the ids of each bucket begin, and the end of the last bucket."""
        self._num_dealt = 0
        self._count = 0

    def add(self, ids: np.ndarray) -> bool:
        """Add a run of ids; return False if there is no room for them."""
        end = self._count + len(ids)
        if end > self._room:
            return False
        self._ids[self._count : end] = ids
        self._count = end
        if self._bits and end - self._num_dealt >= _DEAL_IDS:
            self._deal()
        return True

    def has_duplicates(self) -> bool:
        """Return whether an id is duplicate among all ids so far."""
        if not self._bits:
            return has_duplicates(self._ids[: self._count])
        self._deal()
        edges = np.stack(self._edges)
        for bucket in range(1 << self._bits):
            pieces = [self._ids[begin:end] for begin, end in edges[:, bucket : bucket + 2].tolist()]
            if has_duplicates(np.concatenate(pieces)):
                return True
        return False

    def sorted_ids(self) -> np.ndarray:
        """Return all ids, sorted in place. Call it last."""
        ids = self._ids[: self._count]
        ids.sort()
        return ids

    def _deal(self) -> None:
        """Order the ids that arrived since the last call by bucket."""
        fresh = self._ids[self._num_dealt : self._count]
        mixed = fresh.view(np.uint64) * _MULTIPLIERS[-1]
        mixed >>= np.uint64(64 - self._bits)
        buckets = mixed.astype(np.uint8)
        order = np.argsort(buckets, kind="stable")  # a radix sort, because the keys are bytes
        fresh[:] = fresh.take(order)
        self._edges.append(self._num_dealt + np.searchsorted(buckets.take(order), np.arange((1 << self._bits) + 1)))
        self._num_dealt = self._count
