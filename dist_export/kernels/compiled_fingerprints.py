"""Fingerprints of rows, compiled: see ``src/fingerprints.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT64, POINTER, CompiledBase, at, checked
from dist_export.kernels.numpy_fingerprints import NumpyFingerprints, check_slot

_NUMPY = NumpyFingerprints()


class CompiledFingerprints(CompiledBase):
    """The twin of ``NumpyFingerprints``."""

    def __init__(self, library: ctypes.CDLL, *, level: int, **settings: Any) -> None:
        """See the base."""
        super().__init__(library, level=level, **settings)
        self._fold_slot = self._declare("fold_slot", [POINTER, POINTER, INT64, INT64])
        self._finish_fingerprints = self._declare("finish_fingerprints", [POINTER, INT64, POINTER])

    def start_fingerprints(self, num_rows: int) -> np.ndarray:
        """See the protocol."""
        return _NUMPY.start_fingerprints(num_rows)

    def fold_slot(self, state: np.ndarray, rows: np.ndarray) -> None:
        """See the protocol."""
        check_slot(state, rows)
        self._fold_slot(at(state), at(rows), len(rows), rows.shape[1])

    def finish_fingerprints(self, state: np.ndarray) -> np.ndarray:
        """See the protocol."""
        state = checked(state, np.uint64)
        fingerprints = np.empty(len(state), np.uint64)
        self._finish_fingerprints(at(state), len(state), at(fingerprints))
        return fingerprints
