"""Find out whether an id stands twice, without sorting: numpy sorts 64-bit integers at 50 ns each, this costs about 10.

Each id writes its number into a hash table in one sweep, then looks who wrote last. Who finds another number there has
lost to an id of equal hash: if the two are equal, that is a repeat; else the losers, a fifth of all, try again among
themselves under another hash. Nothing is left to chance: equal ids always meet.
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
"""Of one hash each: odd constants with well-mixed bits, from the finalizers of murmur3 and splitmix64 and from xxh64."""

_FEW = 1 << 10
"""So many ids are sorted: a sweep costs more than that."""

_DIRECT_IDS = 1 << 19
"""Up to so many ids the table of one sweep stays near the cores; more are dealt into buckets as they come."""

_BUCKET_IDS = 1 << 17
_MAX_BUCKET_BITS = 8

_DEAL_IDS = 1 << 16
"""So many ids are dealt at a time: they stay near the core, and each bucket gets a piece worth copying."""


def has_repeats(ids: np.ndarray, groups: np.ndarray | None = None) -> bool:
    """Whether an int64 id stands twice, within one group where ``groups`` (int64, parallel) are given."""
    left = ids.view(np.uint64)
    for multiplier in _MULTIPLIERS:
        if len(left) <= _FEW:
            break
        bits = (len(left) - 1).bit_length() + 1
        hashed = left * multiplier
        if groups is not None:
            hashed ^= groups.view(np.uint64) * _MULTIPLIERS[-1]
        hashed >>= np.uint64(64 - bits)
        places = hashed.view(np.int64)
        table = np.empty(1 << bits, np.int32)
        numbers = np.arange(len(left), dtype=np.int32)
        table[places] = numbers
        winners = table[places]
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
    """Ids that come in runs, held until all are there; many are dealt into buckets of equal hash on the way."""

    def __init__(self, capacity: int) -> None:
        """``capacity``: the most ids that will be held at once; 8 bytes each are taken now, for all that come."""
        self._ids = np.empty(capacity, np.int64)
        self.expect(capacity)

    def expect(self, count: int) -> None:
        """Forget all ids and wait for at most ``count`` new ones. Memory once touched is dear, so it is used again."""
        self._room = min(count, len(self._ids))
        self._bits = 0
        if count > _DIRECT_IDS:
            self._bits = min(_MAX_BUCKET_BITS, (count // _BUCKET_IDS).bit_length())
        self._edges: list[np.ndarray] = []
        """For each deal, where the ids of each bucket begin, and the end of the last."""
        self._num_dealt = 0
        self._count = 0

    def add(self, ids: np.ndarray) -> bool:
        """Take in a run of ids; False where there is no room for them."""
        end = self._count + len(ids)
        if end > self._room:
            return False
        self._ids[self._count : end] = ids
        self._count = end
        if self._bits and end - self._num_dealt >= _DEAL_IDS:
            self._deal()
        return True

    def has_repeats(self) -> bool:
        """Whether an id stands twice among all that came."""
        if not self._bits:
            return has_repeats(self._ids[: self._count])
        self._deal()
        edges = np.stack(self._edges)
        for bucket in range(1 << self._bits):
            pieces = [self._ids[begin:end] for begin, end in edges[:, bucket : bucket + 2].tolist()]
            if has_repeats(np.concatenate(pieces)):
                return True
        return False

    def sorted_ids(self) -> np.ndarray:
        """Return all ids, sorted in place. The last thing to ask for."""
        ids = self._ids[: self._count]
        ids.sort()
        return ids

    def _deal(self) -> None:
        """Order the ids that came since the last time by bucket."""
        fresh = self._ids[self._num_dealt : self._count]
        mixed = fresh.view(np.uint64) * _MULTIPLIERS[-1]
        mixed >>= np.uint64(64 - self._bits)
        buckets = mixed.astype(np.uint8)
        order = np.argsort(buckets, kind="stable")  # a radix sort, for bytes are short
        fresh[:] = fresh.take(order)
        self._edges.append(self._num_dealt + np.searchsorted(buckets.take(order), np.arange((1 << self._bits) + 1)))
        self._num_dealt = self._count
