"""What the kernels do. Both implementations, compiled and numpy, return the same for the same arrays, bit for bit."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np


class DamagedIndexError(ValueError):
    """The slots cannot be those of this part."""


class Column(Protocol):
    """A column of values, of which single ones are read. A numpy array is one.

    If all values lie in memory, but not aligned, it has ``raw_bytes``: uint8, one after the other.
    """

    def take(self, rows: np.ndarray, /) -> np.ndarray:
        """Return the values at these positions (int64)."""


class IdSweep(NamedTuple):
    """What one sweep over the ids of some blocks finds. Each array has one value for each block."""

    id_sums: np.ndarray
    """uint64: the sum of the mixed ids, modulo 2**64."""
    lowest: np.ndarray
    """int64: the least position, ``uint64(id) mod size``."""
    highest: np.ndarray
    """int64: the greatest one."""
    outside: np.ndarray
    """int64: how many ids are outside the slice of their block."""


class CastOutcome(NamedTuple):
    """The result of casting some rows."""

    nans: int
    out_of_range: int
    """Infinities, and finite values that the dtype cannot hold."""
    first: int
    """The row of the first such value, or NaN; -1 if all values fit."""
    worst: float
    total: float
    """Largest absolute error, and the sum of all errors, over the values that fit."""


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

    # ---- sweeps over ids ----

    def sweep_ids(
        self, ids: np.ndarray, starts: np.ndarray, *, size: int, begins: np.ndarray, ends: np.ndarray
    ) -> IdSweep:
        """Sum and compare the ids of some blocks.

        Args:
            ids: int64, block after block.
            starts: int64, where each block begins in ``ids``. No block is empty.
            size: the number of positions, below 2**62.
            begins: int64, parallel to ``starts``: the first position of the block's slice.
            ends: the position behind its last one.
        """

    def find_owners(
        self,
        ids: np.ndarray,
        *,
        size: int,
        breaks: np.ndarray,
        owners: np.ndarray,
        lookup: np.ndarray | None,
        num_targets: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the owner of each id, in the dtype of ``owners``, and how many ids each target owns (int64).

        Args:
            ids: int64.
            size: the number of positions.
            breaks: int64, sorted: the positions at which the owner changes. The first is 0.
            owners: uint8, uint16 or int32: ``owners[i]`` owns the positions from ``breaks[i]`` on.
            lookup: the owner of each position in the same dtype; None for large sizes.
            num_targets: how many targets there are.
        """

    # ---- row index (formats/row_index.py says what it is) ----

    def encode_keys(self, ids: np.ndarray, first_row: int, seed: int) -> np.ndarray:
        """Return ``hash << 32 | row`` (uint64) of ids in consecutive rows."""

    def fill_slots(self, keys: np.ndarray, *, num_buckets: int, num_slots: int) -> tuple[np.ndarray, int]:
        """Return the next slots (uint32), and the longest probe among them.

        Args:
            keys: uint64, sorted, at least one; they come after all earlier ones.
            num_buckets: how many buckets the part has.
            num_slots: how many slots were returned before.
        """

    def find_rows(
        self,
        slots: Column,
        ids: Column,
        sought: np.ndarray,
        *,
        num_slots: int,
        num_rows: int,
        num_buckets: int,
        seed: int,
        longest_probe: int,
    ) -> np.ndarray:
        """Return the row of each sought id (int64), -1 without one. DamagedIndexError: see ``formats/row_index.find_rows``."""

    def count_rows_at(
        self,
        slots: Column,
        ids: np.ndarray,
        first_row: int,
        *,
        num_slots: int,
        num_buckets: int,
        seed: int,
        longest_probe: int,
    ) -> int:
        """Return how many of these ids, which are in consecutive rows, a search finds at their row."""

    def take_rows(
        self, block: np.ndarray, found: np.ndarray, targets: np.ndarray, *, rows: np.ndarray, has_row: np.ndarray
    ) -> None:
        """Copy rows of a block, and note which rows were copied.

        Args:
            block: uint8 of shape (n, row_bytes), contiguous.
            found: int64: rows of the block; -1 is left out.
            targets: int64, parallel: the row of ``rows`` that it becomes.
            rows: uint8 of shape (m, row_bytes), contiguous.
            has_row: bool of shape (m,).
        """

    # ---- casts ----

    def cast_floats(self, out: np.ndarray, values: np.ndarray, *, source: str, target: str, dim: int) -> CastOutcome:
        """Cast values, and count what they lose. Values that do not fit are clamped, and NaN stays NaN.

        Args:
            out: float32, float16, or uint16 for bfloat16; flat and contiguous. It is filled.
            values: the same, or float64; flat and contiguous.
            source: the safetensors name of the dtype of ``values``.
            target: that of ``out``.
            dim: the values of a row.
        """

    def encode_int8(self, out: np.ndarray, values: np.ndarray, *, source: str, dim: int) -> CastOutcome:
        """Fill rows of ``int8_rowwise`` (uint8, (n, dim + 8), contiguous). NaN becomes 0. Otherwise as ``cast_floats``."""

    def decode_int8(self, rows: np.ndarray) -> np.ndarray:
        """Return the values (float32, (n, dim)) of rows of ``int8_rowwise`` (uint8, (n, dim + 8))."""

    # ---- rows by owner ----

    def order_rows(
        self, owners: np.ndarray, kept: np.ndarray | None, num_targets: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return an order for ``move_rows`` of the same implementation (int64), and how many rows each target gets (int64).

        Args:
            owners: uint8, uint16 or int32: the target of each row, below ``num_targets``.
            kept: int64, ascending: the rows that are moved; None for all.
            num_targets: how many targets there are.
        """

    def move_rows(self, order: np.ndarray, rows: np.ndarray, row_bytes: int, out: np.ndarray) -> None:
        """Copy rows, sorted by target; rows of one target keep their order.

        Args:
            order: from ``order_rows``.
            rows: uint8, flat: all rows.
            row_bytes: the bytes of a row, at least 1.
            out: uint8, flat: room for the rows that are kept. It is filled.
        """

    # ---- fingerprints of rows ----

    def start_fingerprints(self, num_rows: int) -> np.ndarray:
        """Return the state of rows without slots: uint64 of shape (num_rows,).

        Fold all slots of these rows in their order, then finish. The rows of a table may be taken in chunks of any size.
        """

    def fold_slot(self, state: np.ndarray, rows: np.ndarray) -> None:
        """Fold a slot into the state of its rows. Every bit counts, and so does the width.

        Args:
            state: uint64 of shape (n,), contiguous. It is changed.
            rows: uint8 of shape (n, width), contiguous at any address: the bytes of the slot. ``width`` is at least 1.
        """

    def finish_fingerprints(self, state: np.ndarray) -> np.ndarray:
        """Return the fingerprints: uint64 of shape (n,). ``state`` stays as it is, so that more slots can be folded in."""

    # ---- rows of a base ----

    def follow_ids(
        self, ids: Column, sought: np.ndarray, *, num_rows: int, first_row: int, most_missed: int
    ) -> tuple[np.ndarray, int]:
        """Return the rows (int64) of ids that come in the order of a column, and the row after the last one that was found.

        The rows of the others are -1, though the column may have them. Up to 8 rows of the column are passed over for an id.

        Args:
            ids: int64, ``num_rows`` different ids.
            sought: int64.
            first_row: where the first of them is expected.
            most_missed: after one more id than these is not found, the rest is not looked for.
        """

    def mark_rows(self, bits: np.ndarray, rows: np.ndarray) -> None:
        """Set the bits of rows (int64) in ``bits`` (uint8, contiguous): the first row of a byte has its highest bit."""
