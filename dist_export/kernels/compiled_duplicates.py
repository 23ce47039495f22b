"""Duplicates, compiled: see ``src/duplicates.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT, INT64, POINTER, UINT64, CompiledBase, at, checked
from dist_export.kernels.numpy_duplicates import has_duplicates

_DIRECT_IDS = 1 << 17
"""Up to this many ids the table of one sweep stays in a core's cache. More ids are divided into buckets as they arrive."""

_BUCKET_IDS = 1 << 15
_MAX_BUCKET_BITS = 10


class CompiledDuplicates(CompiledBase):
    """The twin of ``NumpyDuplicates``."""

    def __init__(
        self,
        library: ctypes.CDLL,
        *,
        level: int,
        direct_ids: int = _DIRECT_IDS,
        bucket_ids: int = _BUCKET_IDS,
        **settings: Any,
    ) -> None:
        """See the base. Sizes other than the default ones, of one table and of a bucket, are for tests."""
        super().__init__(library, level=level, **settings)
        self._direct_ids, self._bucket_ids = direct_ids, bucket_ids
        self._has_duplicates = self._declare(
            "has_duplicates", [POINTER, POINTER, INT64, POINTER, POINTER, UINT64, INT, POINTER], INT
        )
        self._deal = self._declare("deal", [POINTER, INT64, POINTER, POINTER, INT, UINT64])
        self._first_multiplier = self._declare("first_multiplier", [UINT64], UINT64)
        self._has_duplicates_dealt = self._declare(
            "has_duplicates_dealt", [POINTER, POINTER, INT64, INT, POINTER, POINTER, UINT64, INT, POINTER], INT
        )

    def has_duplicates(self, ids: np.ndarray, groups: np.ndarray | None = None) -> bool:
        """See the protocol."""
        ids = checked(ids, np.int64)
        num_ids = len(ids)
        if num_ids < 2:
            return False
        if groups is not None:
            groups = checked(groups, np.int64, count=num_ids)
        found, _ = self.search(ids, groups)
        # with groups, what is compared is a sum over id and group, which two groups may share by chance
        return found if groups is None or not found else has_duplicates(ids, groups)

    def search(self, ids: np.ndarray, groups: np.ndarray | None) -> tuple[bool, int]:
        """Return whether there may be a duplicate, and how many ids all sweeps together had."""
        num_swept = np.zeros(1, np.int64)
        if groups is None and len(ids) > self._direct_ids:
            dealt = np.empty(len(ids), np.int64)
            edges = self._deal_into(dealt, ids, self.count_bucket_bits(len(ids)))
            return self._search_dealt(dealt, edges[None], num_swept), int(num_swept[0])
        table, spare = self._allocate(len(ids))
        where = None if groups is None else at(groups)
        found = self._has_duplicates(
            at(ids), where, len(ids), at(table), at(spare), self._seed, self._level, at(num_swept)
        )
        return bool(found), int(num_swept[0])

    def first_multiplier(self) -> int:
        """Return the odd number that mixes the ids of the first sweep: for tests and benchmarks, which craft ids for it."""
        multiplier: int = self._first_multiplier(self._seed)
        return multiplier

    def count_bucket_bits(self, num_ids: int) -> int:
        """See the protocol."""
        if num_ids <= self._direct_ids:
            return 0
        return max(1, min(_MAX_BUCKET_BITS, (num_ids // self._bucket_ids).bit_length()))

    def deal_ids(self, ids: np.ndarray, bits: int) -> np.ndarray:
        """See the protocol."""
        source = self._scratch.get("dealt", len(ids))[: len(ids)].view(np.int64)
        source[:] = ids
        return self._deal_into(ids, source, bits)

    def _deal_into(self, dealt: np.ndarray, ids: np.ndarray, bits: int) -> np.ndarray:
        if dealt.dtype != np.int64 or not dealt.flags.c_contiguous:
            raise TypeError("ids are dealt in a contiguous array of int64")
        if not 0 < bits <= 16:
            raise ValueError(f"ids cannot be dealt into 1 << {bits} buckets")
        edges = np.empty((1 << bits) + 1, np.int64)
        multiplier = (self._seed << 1 | 1) & ((1 << 64) - 1)
        self._deal(at(ids), len(ids), at(dealt), at(edges), bits, multiplier)
        return edges

    def has_duplicates_dealt(self, ids: np.ndarray, edges: np.ndarray) -> bool:
        """See the protocol."""
        return self._search_dealt(checked(ids, np.int64), checked(edges, np.int64), np.zeros(1, np.int64))

    def _search_dealt(self, ids: np.ndarray, edges: np.ndarray, num_swept: np.ndarray) -> bool:
        if not edges.size:
            return False
        if edges.min() < 0 or edges.max() > len(ids) or (edges[:, 1:] < edges[:, :-1]).any():
            raise ValueError("the edges of the buckets are not in order")
        num_deals, num_buckets = len(edges), edges.shape[1] - 1
        by_bucket = np.ascontiguousarray(edges.T)
        sums = by_bucket.sum(axis=1)
        most = int((sums[1:] - sums[:-1]).max())
        table, spare = self._allocate(most)
        return bool(
            self._has_duplicates_dealt(
                at(ids),
                at(by_bucket),
                num_deals,
                num_buckets.bit_length() - 1,
                at(table),
                at(spare),
                self._seed,
                self._level,
                at(num_swept),
            )
        )

    def _allocate(self, num_ids: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the table of a sweep over so many ids, and the list of those that go on. C uses the same size."""
        bits = 3 if num_ids < 4 else (num_ids - 1).bit_length() + 1
        return self._scratch.get("table", 1 << bits), self._scratch.get("list", num_ids + 1)
