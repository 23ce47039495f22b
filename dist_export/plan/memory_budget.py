"""How much a rank may hold at once, shared out over its threads. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from dist_export.errors import PlanError

_WRITE_BYTES = 128 << 10
"""What one write of a gather should carry at least: less, and the calls cost more than the bytes."""

_MIN_GATHER_BYTES = 1 << 20

_CAST_VALUES = 1 << 15
"""Rows are cast in blocks of about so many values: what is computed from them, at most 3 MB, stays in a core's cache, and in the
half of a thread's share that a gather leaves free."""

_MOST_WINDOW_BYTES = 8 << 20

DROPPED_ROW_BYTES = 512
"""Of ``max_memory`` for each row that is left behind. It is held in 25 bytes, but before that all rows of its id are
exchanged between the ranks and ordered, which takes several times as much, beside what the search took."""


def cast_rows(dim: int) -> int:
    """Return the rows of ``dim`` values that are cast at once, and whose errors are summed up: a power of two.

    It depends on the row alone, so that sums do not depend on threads and memory.
    """
    return 1 << max(0, (_CAST_VALUES // max(dim, 1)).bit_length() - 1)


@dataclass(frozen=True, slots=True)
class Limits:
    """The same on all ranks of an export: the search for ids that stand twice is dealt out by it."""

    max_memory: int
    """Bytes, for all threads of a rank together."""
    threads: int

    def __post_init__(self) -> None:
        """Refuse more threads than the memory has room for."""
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
        """Ids (8 bytes each) that a thread holds at once; what it computes from them takes as much again at most."""
        return self._per_thread // 2 // 8

    @property
    def dropped_rows(self) -> int:
        """The most rows that may be left behind: each rank knows all of them."""
        return self.max_memory // DROPPED_ROW_BYTES

    @property
    def window_bytes(self) -> int:
        """Of what a thread reads ahead from a store it holds two such windows."""
        return min(_MOST_WINDOW_BYTES, max(1 << 20, self._per_thread // 8))

    @property
    def part_bytes(self) -> int:
        """Of the parts in which a shard is sent to S3: a thread holds one of them."""
        return 16 << 20 if self._per_thread >= 64 << 20 else 8 << 20

    def gather_rows(self, row_bytes: int, num_targets: int) -> int:
        """Return the rows that a gather takes in at once, of which each target gets a share in one write.

        Few targets need no more than a cache holds; many need longer chunks for their writes to stay long.
        """
        return self._gather_rows(row_bytes, max(_MIN_GATHER_BYTES, num_targets * _WRITE_BYTES))

    def gather_rows_of_store(self, row_bytes: int, num_targets: int) -> int:
        """Return the same for a source on a store, which takes as long to begin with a short range as with a long one."""
        return self._gather_rows(row_bytes, max(_MOST_WINDOW_BYTES, num_targets * _WRITE_BYTES))

    def _gather_rows(self, row_bytes: int, wanted: int) -> int:
        # a row is held twice, as read and in its new place; its id, owner and place in the order take 18 bytes more
        most = self._per_thread // 2 // (2 * row_bytes + 24)
        return max(1, min(wanted // max(row_bytes, 8), most))
