"""Casts of floats, compiled: see ``src/casts.c`` and ``src/int8.c``."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from dist_export.kernels.compiled_base import INT, INT64, POINTER, CompiledBase, at, checked
from dist_export.kernels.numpy_casts import NumpyCasts, as_float32
from dist_export.kernels.protocol import CastOutcome

_NUMPY = NumpyCasts()
_TAIL_BYTES = 8


class _Losses(ctypes.Structure):
    _fields_ = (
        ("nans", ctypes.c_int64),
        ("beyond", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("worst", ctypes.c_double),
        ("total", ctypes.c_double),
    )

    def outcome(self, values_in_row: int) -> CastOutcome:
        """Return the losses; ``first`` counts values, of which a row has so many."""
        first = self.first // values_in_row if self.first >= 0 else -1
        return CastOutcome(self.nans, self.beyond, first, self.worst, self.total)


class CompiledCasts(CompiledBase):
    """The twin of ``NumpyCasts``. Casts from float64 and to float32 are left to that one."""

    def __init__(self, library: ctypes.CDLL, *, level: int, **settings: Any) -> None:
        """See the base."""
        super().__init__(library, level=level, **settings)
        self._cast_floats = self._declare("cast_floats", [POINTER, INT64, POINTER, INT, INT, POINTER])
        self._encode_int8 = self._declare("encode_int8", [POINTER, INT64, INT64, POINTER, POINTER, INT, POINTER])
        self._decode_int8 = self._declare("decode_int8", [POINTER, INT64, INT64, POINTER, INT])

    def cast_floats(self, out: np.ndarray, values: np.ndarray, *, source: str, target: str, dim: int) -> CastOutcome:
        """See the protocol."""
        if source == "F64" or target == "F32":
            return _NUMPY.cast_floats(out, values, source=source, target=target, dim=dim)
        singles = checked(as_float32(values, source), np.float32)
        _check_out(out, len(singles), 2)
        losses = _Losses()
        self._cast_floats(
            at(singles), len(singles), at(out), int(target == "F16"), self._level, ctypes.addressof(losses)
        )
        return losses.outcome(dim)

    def encode_int8(self, out: np.ndarray, values: np.ndarray, *, source: str, dim: int) -> CastOutcome:
        """See the protocol."""
        if source == "F64":
            return _NUMPY.encode_int8(out, values, source=source, dim=dim)
        num_rows = len(out)
        singles = checked(as_float32(values, source), np.float32, count=num_rows * dim)
        _check_out(out, num_rows * (dim + _TAIL_BYTES), 1)
        if dim < 1:
            raise ValueError("rows of int8 have at least one value")
        losses = _Losses()
        row_sums = self._scratch.get("row sums", num_rows)
        self._encode_int8(at(singles), num_rows, dim, at(out), at(row_sums), self._level, ctypes.addressof(losses))
        return losses.outcome(1)

    def decode_int8(self, rows: np.ndarray) -> np.ndarray:
        """See the protocol."""
        rows = checked(rows, np.uint8)
        num_rows, dim = len(rows), rows.shape[1] - _TAIL_BYTES
        if dim < 0:
            raise ValueError(f"rows of int8 have {rows.shape[1]} bytes")
        values = np.empty((num_rows, dim), np.float32)
        self._decode_int8(at(rows), num_rows, dim, at(values), self._level)
        return values


def _check_out(out: np.ndarray, count: int, itemsize: int) -> None:
    if not out.flags.c_contiguous or out.itemsize != itemsize or out.size != count:
        raise ValueError(f"{count:,} values of {itemsize} bytes do not fit into {out.shape} of {out.dtype}")
