"""Read the id columns of many blocks in cache-sized runs: neighbours in a file together, large blocks in pieces."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np

from dist_export.formats.tuning import STANDARD
from dist_export.storage.range_reader import RangeReader

ID_BYTES = 8


class Readers(Protocol):
    """Open files by number, such as :class:`~dist_export.storage.range_reader.OpenReaders`."""

    def __getitem__(self, number: int, /) -> RangeReader:
        """Return the reader of a file."""


class IdRun(NamedTuple):
    """Ids of several whole blocks, or a piece of one.

    ``ids`` (int64) is in a buffer that the next run overwrites. ``blocks`` are the indices of these blocks; ``starts``
    (int64, parallel) is where the rows of each begin in ``ids``. ``first_row`` is 0, except in a later piece of a large block.
    """

    ids: np.ndarray
    blocks: np.ndarray
    starts: np.ndarray
    first_row: int


def read_runs(
    readers: Readers,
    file: np.ndarray,
    offset: np.ndarray,
    rows: np.ndarray,
    *,
    run_rows: int = STANDARD.run_rows,
) -> Iterator[IdRun]:
    """Yield the ids of blocks, ordered by file and position. Blocks without rows are left out.

    Args:
        readers: the files by number.
        file: int64 (n,), the file of each block.
        offset: int64 (n,), its absolute position in bytes.
        rows: int64 (n,), its number of ids.
        run_rows: a run has less than twice as many ids.
    """
    order = np.lexsort((offset, file))
    order = order[rows[order] > 0]
    buffer = np.empty(min(2 * run_rows, int(rows[order].sum())), np.int64)
    for blocks in _group(order, rows, run_rows):
        starts = np.cumsum(rows[blocks]) - rows[blocks]
        number, begin, total = file[blocks], offset[blocks], int(rows[blocks].sum())
        if len(blocks) == 1:
            with readers[int(number[0])].ahead(int(begin[0]), total * ID_BYTES) as stream:
                for first in range(0, total, run_rows):
                    ids = buffer[: min(run_rows, total - first)]
                    stream.read_into(ids.data.cast("B"))
                    yield IdRun(ids, blocks, starts, first)
            continue
        ids = buffer[:total]
        is_first = np.ones(len(blocks), bool)
        is_first[1:] = (number[1:] != number[:-1]) | (begin[1:] != begin[:-1] + rows[blocks[:-1]] * ID_BYTES)
        heads = np.flatnonzero(is_first)
        stops = np.append(starts[heads[1:]], total)
        extents = zip(
            number[heads].tolist(), begin[heads].tolist(), starts[heads].tolist(), stops.tolist(), strict=True
        )
        view = ids.data.cast("B")
        for its_file, of_file in itertools.groupby(extents, key=operator.itemgetter(0)):
            ranges = [(view[start * ID_BYTES : stop * ID_BYTES], position) for _, position, start, stop in of_file]
            readers[its_file].read_many(ranges)
        yield IdRun(ids, blocks, starts, 0)


def _group(order: np.ndarray, rows: np.ndarray, run_rows: int) -> list[np.ndarray]:
    """Divide the blocks into groups of less than 2 * run_rows rows. A block with more than run_rows is a separate group."""
    if not len(order):
        return []
    is_large = rows[order] > run_rows
    small_rows = np.where(is_large, 0, rows[order])
    turn = 2 * np.cumsum(is_large) - is_large  # odd for a large block, even for the small ones that follow it
    place = (np.cumsum(small_rows) - small_rows) // run_rows
    edges = np.flatnonzero((np.diff(turn) != 0) | (np.diff(place) != 0)) + 1
    return np.split(order, edges)
