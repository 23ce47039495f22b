"""Fingerprints of rows, in numpy: 64 bits over the bytes of all slots of a row.

The state of a row is a number. A slot is folded in as words: first its width, then its bytes, 8 at a time. A word is xored into
the state, and two multiplications with an xor-shift between them mix the result. One multiplication would not do: changes of
highest bits stay highest bits, so the changed signs of several values would cancel each other.

Nothing is secret here. Who wants two rows with one fingerprint can make them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

_START = np.uint64(0x9E3779B97F4A7C15)
"""The state of a row without slots. It is not 0, which a word of zeros would leave as it is."""
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
"""Odd multipliers with well-mixed bits, from the finalizer of splitmix64."""
_HALF = np.uint64(32)

_BLOCK_BYTES = 1 << 20
_FEWEST_ROWS, _MOST_ROWS = 1 << 11, 1 << 14
"""Rows that are folded at once. They and their states stay in a core's cache while the words are read column by column."""


class NumpyFingerprints:
    """The twin of ``CompiledFingerprints``."""

    def start_fingerprints(self, num_rows: int) -> np.ndarray:
        """See the protocol."""
        return np.full(num_rows, _START)

    def fold_slot(self, state: np.ndarray, rows: np.ndarray) -> None:
        """See the protocol."""
        check_slot(state, rows)
        width = rows.shape[1]
        fold_blocks(state, rows, step=min(_MOST_ROWS, max(_FEWEST_ROWS, _BLOCK_BYTES // width)))

    def finish_fingerprints(self, state: np.ndarray) -> np.ndarray:
        """See the protocol."""
        scratch = np.empty_like(state)
        mixed: np.ndarray = state ^ (state >> _HALF)
        _mix(mixed, scratch)
        mixed ^= np.right_shift(mixed, _HALF, out=scratch)
        return mixed


def fold_blocks(state: np.ndarray, rows: np.ndarray, *, step: int) -> None:
    """Fold a slot into the state of each row, ``step`` rows at once."""
    width = np.uint64(rows.shape[1])
    scratch = np.empty(min(step, len(rows)), np.uint64)
    for first in range(0, len(rows), step):
        mixed = state[first : first + step]
        mixed ^= width
        _mix(mixed, scratch)
        for words in _read_words(rows[first : first + step]):
            mixed ^= words
            _mix(mixed, scratch)


def check_slot(state: np.ndarray, rows: np.ndarray) -> None:
    """Refuse arrays that no implementation could fold."""
    if state.dtype != np.uint64 or rows.dtype != np.uint8:
        raise TypeError(f"a slot of {rows.dtype} cannot be folded into a state of {state.dtype}")
    if not state.flags.c_contiguous or not rows.flags.c_contiguous:
        raise TypeError("a slot is folded from one contiguous array of bytes into a contiguous state")
    if rows.ndim != 2 or state.shape != rows.shape[:1] or not rows.shape[1]:
        raise ValueError(f"a slot of {rows.shape} cannot be folded into a state of {state.shape}")


def _mix(mixed: np.ndarray, scratch: np.ndarray) -> None:
    mixed *= _FIRST
    mixed ^= np.right_shift(mixed, _HALF, out=scratch[: len(mixed)])
    mixed *= _SECOND


def _read_words(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the words of each row (uint64, little-endian), column by column. The last one is padded with zeros."""
    width = rows.shape[1]
    whole = width - width % 8
    for byte in range(0, whole, 8):
        yield rows[:, byte : byte + 8].view("<u8")[:, 0]
    if whole == width:
        return
    last, byte = np.zeros(len(rows), np.uint64), whole
    for size in (4, 2, 1):
        if (width - whole) & size:
            piece = rows[:, byte : byte + size].view(f"<u{size}")[:, 0].astype(np.uint64)
            piece <<= np.uint64(8 * (byte - whole))
            last |= piece
            byte += size
    yield last
