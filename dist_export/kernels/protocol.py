"""What the kernels do. Both implementations, compiled and numpy, return the same for the same arrays, bit for bit."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Kernels(Protocol):
    """One implementation of all kernels. Any thread may call any method; the compiled ones let other threads run meanwhile."""

    @property
    def description(self) -> str:
        """Which implementation this is, for people."""

    # ---- duplicates ----

    def has_duplicates(self, ids: np.ndarray, groups: np.ndarray | None = None) -> bool:
        """Return whether an int64 id is duplicate; with ``groups`` (int64, parallel), whether it is within one group."""

    def count_bucket_bits(self, num_ids: int) -> int:
        """Return into how many buckets (a power of two) so many ids should be dealt, as an exponent; 0 if they need not be."""

    def deal_ids(self, ids: np.ndarray, bits: int) -> np.ndarray:
        """Order ids in place by bucket, and return where each bucket begins: int64, ``(1 << bits) + 1`` values.

        Equal ids are in one bucket. Which one that is differs between the implementations.
        """

    def has_duplicates_dealt(self, ids: np.ndarray, edges: np.ndarray) -> bool:
        """Return whether an id is duplicate among all ids that were dealt.

        Args:
            ids: int64, all deals one after the other.
            edges: int64 of shape (deals, buckets + 1): where the buckets of each deal begin in ``ids``.
        """
