"""Split the memory budget of a rank among its threads. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from dist_export.errors import PlanError
from dist_export.formats.tuning import STANDARD, Tuning

_MOST_WINDOW_BYTES = 8 << 20

DROPPED_ROW_BYTES = 512
"""Bytes of ``max_memory`` that count for each dropped row. A dropped row is held in 25 bytes. Before that, the ranks
exchange and sort all rows of its id, which takes several times as much in addition to the memory of the search."""


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """The memory budget. It is equal on all ranks of an export, because the search for duplicates is split by it."""

    max_memory: int
    """Bytes for all threads of a rank together."""
    threads: int
    tuning: Tuning = STANDARD
    """The sizes of pieces."""

    def __post_init__(self) -> None:
        """Raise PlanError if a thread gets less than 8 MiB."""
        if self._per_thread < 8 << 20:
            raise PlanError(
                f"max_memory leaves {self._per_thread >> 20} MiB to each of {self.threads} threads, which need 8 MiB; "
                "raise max_memory or lower threads"
            )

    @property
    def _per_thread(self) -> int:
        return self.max_memory // self.threads

    @property
    def held_ids(self) -> int:
        """Ids (8 bytes each) that a thread holds at once. Its results from them take at most as much again."""
        most = self._per_thread // 2 // 8
        return most if self.tuning.held_ids is None else min(most, self.tuning.held_ids)

    @property
    def dropped_rows(self) -> int:
        """The most rows that may be dropped. Each rank holds the list of all of them."""
        return self.max_memory // DROPPED_ROW_BYTES

    @property
    def window_bytes(self) -> int:
        """Bytes of a window that a thread reads ahead from a store. The thread holds two windows."""
        return min(_MOST_WINDOW_BYTES, max(1 << 20, self._per_thread // 8))

    @property
    def part_bytes(self) -> int:
        """Bytes of one part of an upload to S3. A thread holds one part at a time."""
        return 16 << 20 if self._per_thread >= 64 << 20 else 8 << 20

    def cast_rows(self, dim: int) -> int:
        """Return how many rows of ``dim`` values are cast at once, with their errors summed up: a power of two.

        The number does not depend on threads and memory, so the sums of errors do not either.
        """
        return 1 << max(0, (self.tuning.cast_values // max(dim, 1)).bit_length() - 1)

    def gather_rows(self, row_bytes: int, num_targets: int) -> int:
        """Return how many rows a gather reads at once. Each target gets its share of them in one write.

        For few targets the rows fit in a cache. For many targets there are more rows, so that each write stays long.
        """
        return self._gather_rows(row_bytes, max(self.tuning.gather_bytes, num_targets * self.tuning.write_bytes))

    def gather_many_rows(self, row_bytes: int, num_targets: int) -> int:
        """Return the same for long ranges: a store takes equally long to start any, and a delta keeps few rows."""
        return self._gather_rows(row_bytes, max(_MOST_WINDOW_BYTES, num_targets * self.tuning.write_bytes))

    def _gather_rows(self, row_bytes: int, wanted: int) -> int:
        # a row is held twice: as read, and in its new order. Its id, owner and position in the order take 18 bytes more
        most = self._per_thread // 2 // (2 * row_bytes + 24)
        return max(1, min(wanted // max(row_bytes, 8), most))
