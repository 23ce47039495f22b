"""Collect ids that arrive in runs, and search them for duplicates."""

from __future__ import annotations

import numpy as np

from dist_export.kernels.protocol import Kernels
from dist_export.kernels.selection import select_kernels

_DEAL_IDS = 1 << 16
"""How many ids are divided into buckets at a time: they stay in the cache, and each bucket gets enough ids to copy."""


class HeldIds:
    """Collects ids that arrive in runs. If there are many, they are divided into buckets of equal hash as they arrive."""

    def __init__(self, capacity: int, *, kernels: Kernels | None = None, deal_ids: int = _DEAL_IDS) -> None:
        """Allocate memory.

        Args:
            capacity: the most ids at a time; 8 bytes each are allocated once and reused.
            kernels: what searches them; by default the kernels of this process.
            deal_ids: how many ids are divided into buckets at a time.
        """
        self._deal_ids = deal_ids
        self._kernels = kernels or select_kernels()
        self._ids = np.empty(capacity, np.int64)
        self.expect(capacity)

    def expect(self, count: int) -> None:
        """Forget all ids and prepare for at most ``count`` new ones. Memory is reused, because new memory is slow at first."""
        self._room = min(count, len(self._ids))
        self._bits = self._kernels.count_bucket_bits(count)
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
        if self._bits and end - self._num_dealt >= self._deal_ids:
            self._deal()
        return True

    def has_duplicates(self) -> bool:
        """Return whether an id is duplicate among all ids so far."""
        ids = self._ids[: self._count]
        if not self._bits:
            return self._kernels.has_duplicates(ids)
        self._deal()
        return self._kernels.has_duplicates_dealt(ids, np.stack(self._edges))

    def sorted_ids(self) -> np.ndarray:
        """Return all ids, sorted in place. Call it last."""
        ids = self._ids[: self._count]
        ids.sort()
        return ids

    def _deal(self) -> None:
        """Order the ids that arrived since the last call by bucket."""
        fresh = self._ids[self._num_dealt : self._count]
        self._edges.append(self._num_dealt + self._kernels.deal_ids(fresh, self._bits))
        self._num_dealt = self._count
