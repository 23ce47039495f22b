"""What all compiled kernels share: the library, the level of the processor, and how arrays are passed."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_export.kernels.protocol import Column

POINTER, INT64, UINT64, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64, ctypes.c_int


_MOST_KEPT_BYTES = 4 << 20


class Scratch(threading.local):
    """Memory for intermediate results. Each thread keeps a few arrays, because the pages of new memory are slow at first."""

    def __init__(self) -> None:
        self._kept: dict[str, np.ndarray] = {}

    def get(self, name: str, count: int) -> np.ndarray:
        """Return at least ``count`` values (uint64), whose content is anything. The next call of this name returns them again."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < count:
            kept = np.empty(count, np.uint64)
            if kept.nbytes <= _MOST_KEPT_BYTES:
                self._kept[name] = kept
        return kept


class CompiledBase:
    """Holds the library. A call through ctypes lets other threads run."""

    def __init__(self, library: ctypes.CDLL, *, level: int, seed: int | None = None) -> None:
        """Prepare to call.

        Args:
            library: the loaded library.
            level: 0 for plain C, 1 for AVX2, BMI2 and F16C, which the processor must have.
            seed: for tests; by default it is random, so that no ids can be crafted for it.
        """
        self._seed = int.from_bytes(os.urandom(8), "little") if seed is None else seed
        self._library = library
        self._level = level
        self._scratch = Scratch()

    def _declare(self, name: str, arguments: Sequence[Any], result: Any = None) -> Any:
        """Return a function of the library."""
        function = getattr(self._library, f"kernels_{name}")
        function.argtypes, function.restype = list(arguments), result
        return function


def checked(values: np.ndarray, dtype: Any, *, count: int | None = None) -> np.ndarray:
    """Return an array that C can read: contiguous and of this dtype. The number of values must be ``count``."""
    if values.dtype != dtype:
        raise TypeError(f"a kernel got {values.dtype} instead of {np.dtype(dtype)}")
    if count is not None and values.size != count:
        raise ValueError(f"a kernel got {values.size:,} values instead of {count:,}")
    return np.ascontiguousarray(values)


def at(values: np.ndarray) -> int:
    """Return the address of an array. The caller keeps the array until the call has ended."""
    address: int = values.ctypes.data
    return address


def bytes_of(column: Column, size: int, count: int) -> np.ndarray | None:
    """Return the bytes of a column of ``count`` values that is in memory; None for another one, or one that is too short."""
    flat: np.ndarray | None = getattr(column, "raw_bytes", None)
    if isinstance(column, np.ndarray) and column.itemsize == size:
        flat = np.ascontiguousarray(column).view(np.uint8)
    return flat if flat is not None and len(flat) >= size * count else None
