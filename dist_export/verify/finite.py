"""Find values that are not finite by their bits, in small buffers. bfloat16 and float16 are not widened."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_export.errors import DistExportError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.row_encodings import F32, TAIL_BYTES
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.package.shard_headers import fact_of
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders
from dist_export.verify.work_split import Work, cut


class _Bits(NamedTuple):
    """The bits of a float dtype. In a value that is not finite, all exponent bits are set; in NaN also some fraction bits."""

    unsigned: str
    exponent: int


BITS = {
    code: _Bits(f"<u{dtype.itemsize}", exponent)
    for code, dtype in enumerate(DTYPES)
    for name, exponent in (
        ("F64", 0x7FF0_0000_0000_0000),
        ("F32", 0x7F80_0000),
        ("F16", 0x7C00),
        ("BF16", 0x7F80),
    )
    if dtype.name == name
}
"""Bits by index into ``DTYPES``. Values of other dtypes are always finite."""


class Odd(NamedTuple):
    """Values of a block that are not finite, or ``error`` if the block could not be read."""

    block: int
    nans: int
    infs: int
    first: int
    """The index within the block of the first such value."""
    error: str = ""


def cut_values(work: Work, piece_bytes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return block, first byte and bytes (int64) of each piece."""
    return cut(work.value_bytes, piece_bytes)


def scan_share(directory: Directory, work: Work, chosen: slice, *, tuning: Tuning = STANDARD) -> list[Odd]:
    """Scan a run of the pieces of :func:`cut_values`. Any rank, any thread."""
    found: list[Odd] = []
    scan_bytes = tuning.scan_bytes
    buffer = np.empty(scan_bytes, np.uint8)
    columns = (column[chosen].tolist() for column in cut_values(work, tuning.value_bytes))
    with OpenReaders(lambda number: directory.open_reader(work.shards[number])) as readers:
        for block, begin, size in zip(*columns, strict=True):
            if work.value_width[block]:
                found += _scan_tails(readers, work, block, begin, size, scan_bytes)
                continue
            unsigned, exponent = BITS[int(work.value_dtype[block])]
            itemsize = np.dtype(unsigned).itemsize
            try:
                for offset in range(begin, begin + size, scan_bytes):
                    piece = buffer[: min(scan_bytes, begin + size - offset)]
                    position = int(work.value_offset[block]) + offset
                    readers[int(work.value_file[block])].read_into(piece.data, position)
                    odd = _look(piece.view(unsigned), exponent, block, offset // itemsize)
                    if odd is not None:
                        found.append(odd)
            except (DistExportError, OSError) as error:
                text = (error.strerror or str(error)) if isinstance(error, OSError) else fact_of(error)
                found.append(Odd(block, 0, 0, 0, text))
    return _add(found)


def _scan_tails(readers: OpenReaders, work: Work, block: int, begin: int, size: int, scan_bytes: int) -> list[Odd]:
    """Scan scale and bias of the rows of ``int8_rowwise`` that begin in these bytes of a block."""
    width = int(work.value_width[block])
    found: list[Odd] = []
    step = max(1, scan_bytes // width)
    last = -(-(begin + size) // width)
    try:
        for first in range(-(-begin // width), last, step):
            rows = np.empty((min(step, last - first), width), np.uint8)
            readers[int(work.value_file[block])].read_into(
                rows.reshape(-1).data, int(work.value_offset[block]) + first * width
            )
            unsigned, exponent = BITS[F32]
            tails = np.ascontiguousarray(rows[:, width - TAIL_BYTES :]).reshape(-1).view(unsigned)
            odd = _look(tails, exponent, block, 0)
            if odd is not None:
                found.append(odd._replace(first=(first + odd.first // 2) * width))
    except (DistExportError, OSError) as error:
        text = (error.strerror or str(error)) if isinstance(error, OSError) else fact_of(error)
        found.append(Odd(block, 0, 0, 0, text))
    return found


def add_odd(shares: list[list[Odd]]) -> list[Odd]:
    """Join the results of each block."""
    return _add([odd for share in shares for odd in share])


def _look(bits: np.ndarray, exponent: int, block: int, first: int) -> Odd | None:
    mask = bits.dtype.type(exponent)
    is_odd = (bits & mask) == mask
    count = int(np.count_nonzero(is_odd))
    if not count:
        return None
    positions = np.flatnonzero(is_odd)
    nans = int(np.count_nonzero(bits[positions] & bits.dtype.type((exponent & -exponent) - 1)))
    return Odd(block, nans, count - nans, first + int(positions[0]))


def _add(found: list[Odd]) -> list[Odd]:
    by_block: dict[int, Odd] = {}
    for odd in found:
        known = by_block.get(odd.block)
        if known is None or known.error:
            by_block[odd.block] = odd if known is None else known
        else:
            by_block[odd.block] = Odd(
                odd.block, known.nans + odd.nans, known.infs + odd.infs, min(known.first, odd.first), odd.error
            )
    return [by_block[block] for block in sorted(by_block)]
