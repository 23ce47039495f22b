"""Order the slices of a table's parts, so that the part of an id is found by a search."""

from __future__ import annotations

import numpy as np

from dist_export.formats.recis import Slice


def find_edges(slices: list[Slice]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return begin, end and number of the slices in ascending order; None unless they are disjoint and have one size."""
    if len({part.size for part in slices}) != 1:
        return None
    begins = np.array([part.begin for part in slices], np.int64)
    ends = np.array([part.end for part in slices], np.int64)
    numbers = np.flatnonzero(begins < ends)
    numbers = numbers[np.argsort(begins[numbers], kind="stable")]
    begins, ends = begins[numbers], ends[numbers]
    if not len(numbers) or (ends[:-1] > begins[1:]).any():
        return None
    return begins, ends, numbers
