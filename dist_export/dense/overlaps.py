"""Tensors of a model whose memory overlaps in part, such as a slice or a transposed view: which elements are the same bytes.

Pure: layouts in, positions out. What the checkpoint has for them is compared in ``tied_weights.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import torch


class Layout(NamedTuple):
    """Where the elements of a tensor are, in bytes from a point that it has in common with another one."""

    begin: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    """In elements; never negative."""
    itemsize: int
    dtype: str

    @property
    def as_bytes(self) -> Layout:
        """The layout of the bytes of the elements."""
        stride = (*(its * self.itemsize for its in self.stride), 1)
        return Layout(self.begin, (*self.shape, self.itemsize), stride, 1, "torch.uint8")

    @property
    def num_rows(self) -> int:
        """The size of the first dimension."""
        return self.shape[0]

    @property
    def row_elements(self) -> int:
        """The number of elements of a row."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def row_extent(self) -> int:
        """The bytes from the first to the end of the last element of a row."""
        inner = zip(self.shape[1:], self.stride[1:], strict=True)
        return (1 + sum((size - 1) * stride for size, stride in inner)) * self.itemsize

    @property
    def end(self) -> int:
        """The end of the last element."""
        return self.begin + (self.num_rows - 1) * self.stride[0] * self.itemsize + self.row_extent

    def rows_within(self, low: int, high: int) -> range:
        """Return the rows that may have bytes from ``low`` to ``high``."""
        step = self.stride[0] * self.itemsize
        if high <= self.begin or low >= self.end:
            return range(0)
        if not step:
            return range(self.num_rows)
        first = -(-(low - self.begin - self.row_extent + 1) // step)
        last = -(-(high - self.begin) // step)
        return range(max(0, first), min(self.num_rows, last))

    def positions(self, rows: range) -> np.ndarray:
        """Return where each element of these rows begins (int64), flat, in the order of the elements."""
        found = self.begin + np.arange(rows.start, rows.stop, dtype=np.int64) * (self.stride[0] * self.itemsize)
        for size, stride in zip(self.shape[1:], self.stride[1:], strict=True):
            found = (found[:, None] + np.arange(size, dtype=np.int64) * (stride * self.itemsize)).reshape(-1)
        return found


def find_overlaps(tensors: Mapping[int, torch.Tensor]) -> Iterator[tuple[int, int, Layout, Layout]]:
    """Yield the pairs of tensors, by their keys, whose bytes reach into each other, with their layouts.

    ``tensors``: with memory of their own and at least one element, no two of which are the same.
    """
    by_place = sorted((str(its.device), its.data_ptr(), key) for key, its in tensors.items())
    open_ones: list[int] = []
    for device, begin, key in by_place:
        open_ones = [
            other
            for other in open_ones
            if str(tensors[other].device) == device and _layout_of(tensors[other], 0).end > begin
        ]
        for other in open_ones:
            first = tensors[other].data_ptr()
            yield other, key, _layout_of(tensors[other], first), _layout_of(tensors[key], first)
        open_ones.append(key)


def _layout_of(tensor: torch.Tensor, origin: int) -> Layout:
    whole = tensor if tensor.dim() else tensor.reshape(1)
    begin = tensor.data_ptr() - origin
    return Layout(begin, tuple(whole.shape), tuple(whole.stride()), whole.element_size(), str(whole.dtype))


def find_common(one: Layout, rows: range, other: Layout) -> tuple[np.ndarray, range, np.ndarray]:
    """Return which elements of some rows of a tensor are the same bytes as elements of another one of this dtype.

    Returns:
        Positions among the elements of ``rows`` (int64), rows of the other, and positions among the elements of these.
    """
    mine = one.positions(rows)
    theirs = other.rows_within(int(mine.min()), int(mine.max()) + one.itemsize)
    _, at_one, at_other = np.intersect1d(mine, other.positions(theirs), return_indices=True)
    return at_one, theirs, at_other
