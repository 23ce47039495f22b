"""Count the norms of rows, dead rows, and rows that are not finite, block by block. Pure: arrays in, counts out.

A norm is counted in one of 32 bins for each power of two. So a table of any size needs one small array, and quantiles are off by
2 % at most. The chart merges neighbouring bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec
import numpy as np

_BINS_PER_OCTAVE = 32
_LOWEST_EXPONENT = -150
_NUM_BINS = 1 << 14
"""From 2**-150, less than any float32, to 2**362; norms beyond count in the first and the last bin."""
_CHART_BINS = 40
_SAFE_SQUARES = (1e-30, 1e30)
"""Sums of squares between these neither overflow nor lose small values, in float32."""
_PIECES = 16
"""A sample of a table's rows is read in this many pieces at least."""
_QUANTILES = {"p1": 0.01, "median": 0.5, "p99": 0.99}


class RowRun(NamedTuple):
    """Rows ``first`` to ``last`` - 1 of a part."""

    part: int
    first: int
    last: int


class NormEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What was counted in the rows of a table that were read."""

    rows_read: int
    dead: int
    """Rows whose values are all zero."""
    nan: int
    """Rows with a NaN."""
    inf: int
    """Rows with an infinity. A row may count as ``nan`` too."""
    smallest: float | None
    """The smallest norm of a finite row that is not dead; None without one. So are the next ones."""
    largest: float | None
    p1: float | None
    median: float | None
    p99: float | None
    low: float | None
    """Where the first column of the histogram begins."""
    ratio: float | None
    """Column i has the norms from ``low * ratio**i`` up to ``low * ratio**(i + 1)``."""
    counts: tuple[int, ...]
    """Rows by column."""


class NormCounter:
    """Adds blocks of rows up."""

    def __init__(self) -> None:
        self._rows = self._dead = self._nan = self._inf = 0
        self._bins = np.zeros(_NUM_BINS, np.int64)
        self._smallest, self._largest = np.inf, 0.0

    def add(self, values: np.ndarray) -> None:
        """Count rows, (n, ...) of any number dtype."""
        rows = values.reshape(len(values), -1)
        if rows.dtype not in (np.float32, np.float64):
            rows = rows.astype(np.float32)
        norms, is_nan, is_inf = _norms_of(rows)
        is_dead = norms == 0
        counted = np.minimum(norms[~(is_nan | is_inf | is_dead)], np.finfo(norms.dtype).max)
        self._rows += len(rows)
        self._dead += int(np.count_nonzero(is_dead))
        self._nan += int(np.count_nonzero(is_nan))
        self._inf += int(np.count_nonzero(is_inf))
        if len(counted):
            self._smallest = min(self._smallest, float(counted.min()))
            self._largest = max(self._largest, float(counted.max()))
            numbers = np.floor((np.log2(counted.astype(np.float64)) - _LOWEST_EXPONENT) * _BINS_PER_OCTAVE)
            self._bins += np.bincount(np.clip(numbers, 0, _NUM_BINS - 1).astype(np.int64), minlength=_NUM_BINS)

    def close(self) -> NormEntry:
        """Return what was counted."""
        low, ratio, counts = _merge_bins(self._bins)
        has_norm = bool(counts)
        sums = np.cumsum(self._bins)
        return NormEntry(
            rows_read=self._rows,
            dead=self._dead,
            nan=self._nan,
            inf=self._inf,
            smallest=self._smallest if has_norm else None,
            largest=self._largest if has_norm else None,
            **{name: self._quantile(sums, share) if has_norm else None for name, share in _QUANTILES.items()},
            low=low,
            ratio=ratio,
            counts=counts,
        )

    def _quantile(self, sums: np.ndarray, share: float) -> float:
        """Return the norm that this share of the rows does not exceed, from the middle of its bin. ``sums``: of the bins."""
        place = int(np.searchsorted(sums, share * sums[-1]))
        low, high = _edge(place), _edge(place + 1)
        return float(np.clip(np.sqrt(low * high), self._smallest, self._largest))


def _norms_of(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the norm of each row, which rows have a NaN, and which an infinity. Norms of these two are not finite."""
    is_nan, is_inf = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = np.einsum("ij,ij->i", rows, rows)
        low, high = _SAFE_SQUARES
        is_doubtful = ~((squares > low) & (squares < high))
        norms = np.sqrt(squares)
        if is_doubtful.any():
            exact = rows[is_doubtful].astype(np.float64)
            is_nan[is_doubtful], is_inf[is_doubtful] = np.isnan(exact).any(axis=1), np.isinf(exact).any(axis=1)
            most = np.abs(exact).max(axis=1, initial=0.0)
            scaled = exact / np.where(most > 0, most, 1.0)[:, None]
            norms = norms.astype(np.float64)
            norms[is_doubtful] = most * np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
    return norms, is_nan, is_inf


def _merge_bins(bins: np.ndarray) -> tuple[float | None, float | None, tuple[int, ...]]:
    """Return where the columns of a chart begin, their ratio, and their counts. All columns have as many bins, a power of two."""
    filled = np.flatnonzero(bins)
    if not len(filled):
        return None, None, ()
    first, last = int(filled[0]), int(filled[-1])
    shift = 0
    while (last >> shift) - (first >> shift) >= _CHART_BINS:
        shift += 1
    begin, end = first >> shift, (last >> shift) + 1
    counts = bins.reshape(-1, 1 << shift).sum(axis=1)[begin:end]
    ratio = 2.0 ** ((1 << shift) / _BINS_PER_OCTAVE)
    return _edge(begin << shift), ratio, tuple(int(number) for number in counts)


def _edge(number: int) -> float:
    """Return the smallest norm of a bin."""
    return float(2.0 ** (number / _BINS_PER_OCTAVE + _LOWEST_EXPONENT))


def choose_runs(part_rows: Sequence[int], *, sample_rows: int, block_rows: int) -> Iterator[RowRun]:
    """Yield the runs of at most ``block_rows`` rows to read: all rows, or about ``sample_rows`` spread evenly over the parts.

    The choice depends on the arguments alone, so that two reports of a package are equal. ``sample_rows`` 0 reads all.
    """
    total = sum(part_rows)
    if not sample_rows or total <= sample_rows:
        for part, rows in enumerate(part_rows):
            for first in range(0, rows, block_rows):
                yield RowRun(part, first, min(first + block_rows, rows))
        return
    pieces = min(sample_rows, max(_PIECES, -(-sample_rows // block_rows)))
    part, before = 0, 0
    for number in range(pieces):
        first, following = (place * total // pieces for place in (number, number + 1))
        length = (number + 1) * sample_rows // pieces - number * sample_rows // pieces
        end = min(first + length, following)
        while first < end:
            while first >= before + part_rows[part]:
                before, part = before + part_rows[part], part + 1
            last = min(end, before + part_rows[part])
            yield RowRun(part, first - before, last - before)
            first = last
