"""One sweep over a run of ids, compiled: see ``src/id_sweep.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT, INT64, POINTER, UINT64, CompiledBase, at, checked
from dist_export.kernels.protocol import IdSweep

_OWNERS = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int32))


class CompiledIdSweep(CompiledBase):
    """The twin of ``NumpyIdSweep``."""

    def __init__(self, library: ctypes.CDLL, *, level: int, **settings: Any) -> None:
        """See the base."""
        super().__init__(library, level=level, **settings)
        self._sweep = self._declare("sweep_ids", [POINTER, POINTER, INT64, INT64, UINT64, *[POINTER] * 6, INT])
        self._look_up = self._declare(
            "look_owners_up", [POINTER, INT64, UINT64, POINTER, INT, POINTER, INT64, POINTER, INT]
        )
        self._search = self._declare(
            "search_owners", [POINTER, INT64, UINT64, POINTER, INT64, POINTER, POINTER, POINTER]
        )

    def sweep_ids(
        self, ids: np.ndarray, starts: np.ndarray, *, size: int, begins: np.ndarray, ends: np.ndarray
    ) -> IdSweep:
        """See the protocol."""
        count = len(starts)
        ids, starts = checked(ids, np.int64), checked(starts, np.int64)
        begins, ends = checked(begins, np.int64, count=count), checked(ends, np.int64, count=count)
        if count and (starts[0] < 0 or starts[-1] >= len(ids) or (starts[1:] <= starts[:-1]).any()):
            raise ValueError("the blocks of the ids are empty or not in order")
        _check_size(size)
        sweep = IdSweep(np.empty(count, np.uint64), *(np.empty(count, np.int64) for _ in range(3)))
        filled = [at(column) for column in sweep]
        self._sweep(at(ids), at(starts), count, len(ids), size, at(begins), at(ends), *filled, self._level)
        return sweep

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
        """See the protocol."""
        ids, counts = checked(ids, np.int64), np.zeros(num_targets, np.int64)
        _check_size(size)
        if owners.dtype not in _OWNERS or not len(owners) or int(owners.max()) >= num_targets or int(owners.min()) < 0:
            raise ValueError(f"the owners are {owners.dtype}, and not all are below {num_targets:,}")
        if lookup is not None:
            lookup = checked(lookup, owners.dtype, count=size)
            found = np.empty(len(ids), owners.dtype)
            self._look_up(
                at(ids), len(ids), size, at(lookup), owners.itemsize, at(found), num_targets, at(counts), self._level
            )
            return found, counts
        breaks = checked(breaks, np.int64, count=len(owners))
        numbers, wide = owners.astype(np.int32), np.empty(len(ids), np.int32)
        self._search(at(ids), len(ids), size, at(breaks), len(breaks), at(numbers), at(wide), at(counts))
        return wide.astype(owners.dtype, copy=False), counts


def _check_size(size: int) -> None:
    if not 0 < size < 1 << 62:
        raise ValueError(f"the slices have {size:,} positions")
