"""Row fingerprints: 8 bytes over the bytes of all slots of a row, in a file beside its shard. Pure: bytes in, arrays out.

A part has one fingerprint (little-endian uint64) for each row, in the order of the rows. ``id`` is no part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.formats.tuning import STANDARD
from dist_export.kernels.selection import select_kernels

SUFFIX = ".row_fingerprints"
"""Ends the name of the file that holds the row fingerprints of one shard."""
MAGIC = b"rowprint\x01\x00\x00\x00\x00\x00\x00\x00"
"""Begins the file: a name, then the version as little-endian uint64."""
ALIGNMENT = 64
"""The fingerprints of each part begin at a multiple of this many bytes. The first begin at byte 64."""
FINGERPRINT = np.dtype("<u8")


ReadMany = Callable[[int, Sequence[tuple[memoryview, int]]], None]
"""Fills views from a file (by number), each from its own byte on."""


class SlotBlock(NamedTuple):
    """The rows of one slot of a part."""

    file: int
    """The number of the file, as the caller counts files."""
    offset: int
    """The absolute position of the first row, in bytes."""
    row_bytes: int


class PartSlots(NamedTuple):
    """What the fingerprints of a part are of: the slots without ``id``, in the order of ``kept`` in the manifest."""

    num_rows: int
    slots: tuple[SlotBlock, ...]

    @property
    def row_bytes(self) -> int:
        """The bytes of one row in all slots."""
        return sum(slot.row_bytes for slot in self.slots)


class Piece(NamedTuple):
    """Neighbouring rows of one part."""

    part: int
    """The place in the sequence of parts."""
    first_row: int
    num_rows: int


def fingerprints_name(shard: str) -> str:
    """Return the name of the file that holds the row fingerprints of a shard."""
    return shard.removesuffix(".safetensors") + SUFFIX


def lay_out(rows: Sequence[int]) -> tuple[list[int], int]:
    """Return where the fingerprints of each part begin, and the size of the file, both in bytes. No part is empty."""
    offsets, end = [], len(MAGIC)
    for num_rows in rows:
        offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
        end = offsets[-1] + num_rows * FINGERPRINT.itemsize
    return offsets, end


def find_fault(*, offset: int, num_rows: int, file_size: int) -> str | None:
    """Return why fingerprints of a part cannot be there in a file of ``file_size`` bytes; None if they can."""
    if offset % ALIGNMENT or offset < len(MAGIC):
        return f"its fingerprints begin at byte {offset:,}, which is no multiple of {ALIGNMENT}"
    if offset + num_rows * FINGERPRINT.itemsize > file_size:
        return f"its {num_rows:,} fingerprints from byte {offset:,} on do not lie in a file of {file_size:,} bytes"
    return None


def group_pieces(
    pieces: Sequence[Piece], parts: Sequence[PartSlots], most_bytes: int, *, most_rows: int = STANDARD.fingerprint_rows
) -> Iterator[list[Piece]]:
    """Yield these pieces in groups of at most about ``most_bytes`` bytes and ``most_rows`` rows. Larger pieces are cut.

    A piece has one row at least, whatever its size.
    """
    group: list[Piece] = []
    num_bytes, num_rows = 0, 0
    for part, begin, rows in pieces:
        row_bytes, first, last = parts[part].row_bytes, begin, begin + rows
        while first < last:
            fits = most_rows - num_rows
            fits = min(fits, (most_bytes - num_bytes) // row_bytes) if row_bytes else fits
            if fits < 1 and group:
                yield group
                group, num_bytes, num_rows = [], 0, 0
                continue
            taken = min(max(fits, 1), last - first)
            group.append(Piece(part, first, taken))
            num_bytes, num_rows, first = num_bytes + taken * row_bytes, num_rows + taken, first + taken
    if group:
        yield group


class Fingerprinter:
    """Computes the fingerprints of rows that it reads. One thread. It holds the rows of one group."""

    def __init__(self, parts: Sequence[PartSlots], read_many: ReadMany) -> None:
        self._parts = parts
        self._read_many = read_many
        self._buffer = np.zeros(0, np.uint8)

    def compute(self, group: Sequence[Piece]) -> Iterator[np.ndarray]:
        """Yield the fingerprints (uint64) of each piece."""
        total = sum(piece.num_rows * self._parts[piece.part].row_bytes for piece in group)
        if len(self._buffer) < total:
            self._buffer = np.zeros(0, np.uint8)  # freed before the larger one is there
            self._buffer = np.empty(total, np.uint8)
        ranges: dict[int, list[tuple[memoryview, int]]] = {}
        slots_of: list[list[np.ndarray]] = []
        end = 0
        for part, first, num_rows in group:
            slots_of.append([])
            for file, offset, row_bytes in self._parts[part].slots:
                if row_bytes:
                    begin, end = end, end + num_rows * row_bytes
                    rows = self._buffer[begin:end]
                    ranges.setdefault(file, []).append((rows.data, offset + first * row_bytes))
                    slots_of[-1].append(rows.reshape(num_rows, row_bytes))
        for file, its in ranges.items():
            self._read_many(file, its)
        for piece, slots in zip(group, slots_of, strict=True):
            yield fingerprint_rows(piece.num_rows, slots)


def fingerprint_rows(num_rows: int, slots: Sequence[np.ndarray]) -> np.ndarray:
    """Return the fingerprints of rows: uint64, (num_rows,).

    Args:
        num_rows: how many rows there are.
        slots: the bytes of each slot, uint8 of shape (num_rows, row_bytes), in the order of the slots; none of width 0.
    """
    kernels = select_kernels()
    state = kernels.start_fingerprints(num_rows)
    for rows in slots:
        kernels.fold_slot(state, rows)
    return kernels.finish_fingerprints(state)
