"""The row index: finds the row of an id without reading the id column. Pure: arrays in, arrays out.

A row index is an array of slots (little-endian uint32). A slot holds the number of a row, or ``EMPTY``. The hash of an id
gives its bucket, the slot where a search begins. The row is in the first free slot from there on, so a search ends at an empty
slot. The ids themselves are not in the index. The id column confirms that a row is the right one.

Slots are filled in the order of (hash, row), so the index depends only on the ids and their rows, and not on the order in
which they were read. There is no wrap at the end: the slots go on behind the last bucket, and the last one is empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_export.kernels.protocol import Column
from dist_export.kernels.selection import select_kernels

SUFFIX = ".row_index"
"""Ends the name of the file that holds the row indexes of one shard."""
MAGIC = b"rowindex\x01\x00\x00\x00\x00\x00\x00\x00"
"""Begins the file: a name, then the version as little-endian uint64."""
ALIGNMENT = 64
"""The slots of each part begin at a multiple of this many bytes. The first begin at byte 64."""

SLOT = np.dtype("<u4")
EMPTY = np.uint32(0xFFFFFFFF)
MOST_ROWS = (1 << 32) - 1
"""A part with more rows has no index, because their numbers do not fit in a slot."""

_LOAD = (7, 10)
"""Rows for each bucket, as a fraction."""
MOST_PROBES = 1024
"""The most slots behind its bucket in which a row may be. The longest run of full slots at this load is about
``ln(rows) / 0.057`` (Knuth, The Art of Computer Programming 3, section 6.4): 390 for the largest part."""
SEEDS = 8
"""If ids were chosen to collide, the longest probe is above ``MOST_PROBES``, and the next seed is tried. No set of ids collides
for all seeds: the buckets of all of them together have more bits than an id."""
_CHUNK_ROWS = 1 << 16
"""Rows that are placed at once. Their arrays stay in a core's cache."""


def find_fault(
    *, offset: int, num_slots: int, seed: int, longest_probe: int, num_rows: int, file_size: int
) -> str | None:
    """Return why these numbers cannot describe a row index in a file of ``file_size`` bytes; None if they can."""
    if offset % ALIGNMENT or offset < len(MAGIC):
        return f"its slots begin at byte {offset:,}, which is no multiple of {ALIGNMENT}"
    if offset + num_slots * SLOT.itemsize > file_size:
        return f"its {num_slots:,} slots from byte {offset:,} on do not lie in a file of {file_size:,} bytes"
    if num_slots <= num_rows:
        return f"it has {num_slots:,} slots for {num_rows:,} rows"
    if seed >= SEEDS:
        return f"its seed is {seed}, and seeds are below {SEEDS}"
    if longest_probe > MOST_PROBES:
        return f"its longest probe is {longest_probe:,}, and no more than {MOST_PROBES:,} is possible"
    return None


def count_buckets(num_rows: int) -> int:
    """Return the number of buckets of a part."""
    rows, slots = _LOAD
    return max(1, -(-num_rows * slots // rows))


def estimate_bytes(num_rows: int) -> int:
    """Return about how many bytes the slots of a part take: those behind the buckets are not counted."""
    return (count_buckets(num_rows) + 1) * SLOT.itemsize if num_rows else 0


def encode_keys(ids: np.ndarray, first_row: int, seed: int) -> np.ndarray:
    """Return ``hash << 32 | row`` (uint64) of ids in consecutive rows. Sorted, they are in the order of the slots."""
    return select_kernels().encode_keys(ids, first_row, seed)


class SlotFiller:
    """Fills the slots of one part, from sorted keys that arrive in ascending runs."""

    def __init__(self, num_rows: int) -> None:
        """Begin a part with ``num_rows`` rows."""
        self._num_buckets = count_buckets(num_rows)
        self.num_slots = 0
        """The slots that were returned so far."""
        self.longest_probe = 0
        """The largest distance of a row from its bucket so far."""

    def add(self, keys: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the next slots (uint32), for sorted keys that come after all earlier ones."""
        for first in range(0, len(keys), _CHUNK_ROWS):
            chunk = keys[first : first + _CHUNK_ROWS]
            slots, longest = select_kernels().fill_slots(chunk, num_buckets=self._num_buckets, num_slots=self.num_slots)
            self.longest_probe = max(self.longest_probe, longest)
            self.num_slots += len(slots)
            yield slots

    def finish(self) -> np.ndarray:
        """Return the empty slots at the end: the buckets that are left, and one more, where every search ends."""
        slots = np.full(max(self._num_buckets - self.num_slots, 0) + 1, EMPTY, SLOT)
        self.num_slots += len(slots)
        return slots


def find_rows(
    slots: Column,
    ids: Column,
    sought: np.ndarray,
    *,
    num_slots: int,
    num_rows: int,
    seed: int,
    longest_probe: int,
) -> np.ndarray:
    """Return the row of each sought id.

    Args:
        slots: the slots of the part (uint32).
        ids: the ids of the part (int64).
        sought: int64 of shape (n,).
        num_slots: how many slots there are.
        num_rows: the rows of the part, at least 1.
        seed: the seed of its hash.
        longest_probe: the largest distance of a row from its bucket.

    Returns:
        int64 of shape (n,); -1 for an id without a row.

    Raises:
        DamagedIndexError: a slot holds a number that is no row, or a probe leaves the slots.
    """
    return select_kernels().find_rows(
        slots,
        ids,
        sought,
        num_slots=num_slots,
        num_rows=num_rows,
        num_buckets=count_buckets(num_rows),
        seed=seed,
        longest_probe=longest_probe,
    )


def count_rows_at(
    slots: Column,
    ids: np.ndarray,
    first_row: int,
    *,
    num_slots: int,
    num_rows: int,
    seed: int,
    longest_probe: int,
) -> int:
    """Return how many of these ids, which are in consecutive rows, a search finds at their row.

    A search for an id passes full slots only, so this needs no other id.
    """
    return select_kernels().count_rows_at(
        slots,
        ids,
        first_row,
        num_slots=num_slots,
        num_buckets=count_buckets(num_rows),
        seed=seed,
        longest_probe=longest_probe,
    )
