"""Order the slices of a table's parts, and deal ids to the parts that own them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dist_export.formats.recis import Slice
from dist_export.kernels.selection import select_kernels

_NO_SIZE = 1 << 62
_MOST_LOOKED_UP = 1 << 16
"""Up to this size (RecIS's own), the owner of each position is kept. Larger ones would take long to make for a few ids."""


@dataclass(frozen=True, slots=True, eq=False)
class SliceEdges:
    """Disjoint slices of one size, in ascending order, and what lies between them."""

    size: int
    numbers: np.ndarray
    """int64: the number of the part of each slice."""
    breaks: np.ndarray
    """int64, ascending, from 0 on: where the owner of positions changes."""
    owners: np.ndarray
    """The place in ``numbers`` of the slice from each break on; ``len(numbers)`` where no slice is."""
    lookup: np.ndarray | None
    """The same for each position; None for large sizes."""

    def deal(self, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the number of each part that owns some ids (int64, not empty), with the positions of these ids, ascending."""
        if len(self.owners) == 1:
            yield int(self.numbers[0]), np.arange(len(ids))
            return
        owners, counts = select_kernels().find_owners(
            ids,
            size=self.size,
            breaks=self.breaks,
            owners=self.owners,
            lookup=self.lookup,
            num_targets=len(self.numbers) + 1,
        )
        present = np.flatnonzero(counts[:-1])
        if len(present) == 1 and counts[present[0]] == len(ids):
            yield int(self.numbers[present[0]]), np.arange(len(ids))
            return
        order = np.argsort(owners, kind="stable")  # 8 and 16 bits are sorted much faster than more
        bounds = [0, *np.cumsum(counts).tolist()]
        for place, (first, last) in enumerate(itertools.pairwise(bounds[:-1])):
            if first < last:
                yield int(self.numbers[place]), order[first:last]


def find_edges(slices: list[Slice]) -> SliceEdges | None:
    """Return the edges of slices; None unless they are disjoint, within one size, and that is one that kernels know."""
    if len({part.size for part in slices}) != 1 or not 0 < (size := slices[0].size) < _NO_SIZE:
        return None
    if any(not 0 <= part.begin <= part.end <= size for part in slices):
        return None
    begins = np.array([part.begin for part in slices], np.int64)
    ends = np.array([part.end for part in slices], np.int64)
    numbers = np.flatnonzero(begins < ends)
    numbers = numbers[np.argsort(begins[numbers], kind="stable")]
    begins, ends = begins[numbers], ends[numbers]
    if not len(numbers) or (ends[:-1] > begins[1:]).any():
        return None
    breaks, owners = [0], [len(numbers)]
    for place, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist(), strict=True)):
        if breaks[-1] == begin:
            owners[-1] = place
        else:
            breaks.append(begin)
            owners.append(place)
        if end < size:
            breaks.append(end)
            owners.append(len(numbers))
    kind = np.uint8 if len(numbers) < 256 else np.uint16 if len(numbers) < 1 << 16 else np.int32
    positions, owner_of_break = np.array(breaks, np.int64), np.array(owners, kind)
    lookup = np.repeat(owner_of_break, np.diff(positions, append=size)) if size <= _MOST_LOOKED_UP else None
    return SliceEdges(size, numbers, positions, owner_of_break, lookup)
