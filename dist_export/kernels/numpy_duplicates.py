"""Check for duplicate ids without sorting, in numpy: it sorts 64-bit integers at 50 ns each, this takes about 10.

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


def has_duplicates(ids: np.ndarray, groups: np.ndarray | None = None, *, few: int = _FEW) -> bool:
    """Return whether an int64 id is duplicate; with ``groups`` (int64, parallel), whether it is within one group.

    ``few``: up to so many ids are sorted.
    """
    left = ids.view(np.uint64)
    for multiplier in _MULTIPLIERS:
        if len(left) <= few:
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


class NumpyDuplicates:
    """The twin of ``CompiledDuplicates``."""

    def __init__(self, *, few: int = _FEW, direct_ids: int = _DIRECT_IDS, bucket_ids: int = _BUCKET_IDS) -> None:
        """Take other sizes than the default ones: of what is sorted, of one table, and of a bucket. For tests."""
        self._few, self._direct_ids, self._bucket_ids = few, direct_ids, bucket_ids

    def has_duplicates(self, ids: np.ndarray, groups: np.ndarray | None = None) -> bool:
        """See the protocol."""
        return has_duplicates(ids, groups, few=self._few)

    def count_bucket_bits(self, num_ids: int) -> int:
        """See the protocol."""
        if num_ids <= self._direct_ids:
            return 0
        return max(1, min(_MAX_BUCKET_BITS, (num_ids // self._bucket_ids).bit_length()))

    def deal_ids(self, ids: np.ndarray, bits: int) -> np.ndarray:
        """See the protocol."""
        mixed = ids.view(np.uint64) * _MULTIPLIERS[-1]
        mixed >>= np.uint64(64 - bits)
        buckets = mixed.astype(np.uint8)
        order = np.argsort(buckets, kind="stable")  # a radix sort, because the keys are bytes
        ids[:] = ids.take(order)
        edges: np.ndarray = np.searchsorted(buckets.take(order), np.arange((1 << bits) + 1))
        return edges

    def has_duplicates_dealt(self, ids: np.ndarray, edges: np.ndarray) -> bool:
        """See the protocol."""
        for bucket in range(edges.shape[1] - 1):
            pieces = [ids[begin:end] for begin, end in edges[:, bucket : bucket + 2].tolist()]
            if has_duplicates(np.concatenate(pieces), few=self._few):
                return True
        return False
