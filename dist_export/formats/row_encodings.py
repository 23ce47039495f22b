"""Cast rows of floats to another dtype, and define their bytes on disk. Pure numpy, bits and arithmetic.

float16 and bfloat16 are rounded once, to nearest, ties to even, from any source dtype. ``int8_rowwise`` is FBGEMM's fused
8-bit row-wise layout, which torchrec's quantized tables have (``FloatOrHalfToFused8BitRowwiseQuantizedSBFloat`` in FBGEMM's
``QuantUtils.cc``; plain torch has it as ``torch.ops.quantized.embedding_bag_byte_prepack``). A row of ``dim`` values is
``dim`` bytes ``q`` (uint8), then ``scale`` and ``bias``, each a little-endian float32: ``dim + 8`` bytes, without alignment.
With ``range = max - min`` of the row, in float32 throughout: ``scale = range / 255``, ``bias = min``,
``q = round((value - min) * (255 / (range + 1e-8)))``. A reader computes ``q * scale + bias``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES

INT8_ROWWISE = "int8_rowwise"
"""The encoding's name in ``manifest.json``; the block's dtype is U8."""
TAIL_BYTES = 8
"""Bytes of scale and bias, after the values of a row."""

F64, F32, F16, BF16, U8 = (CODE_BY_NAME[name] for name in ("F64", "F32", "F16", "BF16", "U8"))
FLOATS = (F64, F32, F16, BF16)
"""The dtypes that can be cast."""

_EPSILON = np.float32(1e-8)
_LEVELS = np.float32(255)
_MAX_F32 = float(np.finfo(np.float32).max)
_HALF_RANGE = np.float32(1.7e38)
"""Rows of int8 are clamped to this range, so that max - min is a finite float32."""

LARGEST = {F16: 65504.0, BF16: float(np.array([0x7F7F << 16], np.uint32).view(np.float32)[0]), F32: _MAX_F32}
"""The largest value of each dtype that rows can be cast to. For int8 the limit is ``_HALF_RANGE`` on either side."""


class Outcome(NamedTuple):
    """The result of casting some rows."""

    nans: int
    out_of_range: int
    """Infinities, and finite values that the dtype cannot hold."""
    first: int
    """The row of the first such value, or NaN; -1 if all values fit."""
    worst: float
    total: float
    """Largest absolute error, and the sum of all errors, over the values that fit."""


@dataclass(frozen=True, slots=True)
class RowCast:
    """A cast of rows of ``dim`` values from one dtype to another; ``encoding`` is empty or ``int8_rowwise``."""

    source: int
    target: int
    """Both are indexes into ``formats.dtypes.DTYPES``."""
    encoding: str
    dim: int
    source_encoding: str = ""
    """The encoding of the rows that are read, as ``encoding``. ``int8_rowwise`` is cast to plain floats."""

    @property
    def source_bytes(self) -> int:
        """Bytes of a row as it is read."""
        return _row_bytes(self.source, self.source_encoding, self.dim)

    @property
    def source_name(self) -> str:
        """The type of the rows that are read: torch's name of the dtype, or the encoding."""
        return self.source_encoding or DTYPES[self.source].torch

    @property
    def target_bytes(self) -> int:
        """Bytes of a row as it is written."""
        return _row_bytes(self.target, self.encoding, self.dim)

    @property
    def name(self) -> str:
        """The type of the rows that are written, for people."""
        return "int8" if self.encoding else DTYPES[self.target].torch

    @property
    def range_text(self) -> str:
        """The values that fit, for people."""
        return f"+-{float(_HALF_RANGE):.3g}" if self.encoding else f"+-{LARGEST[self.target]:.6g}"

    def encode_into(self, out: np.ndarray, rows: np.ndarray) -> Outcome:
        """Cast rows. Values that do not fit are clamped. NaN stays NaN, and becomes 0 in int8.

        Args:
            out: uint8, (n, target_bytes), contiguous; filled.
            rows: uint8, (n, source_bytes), contiguous.
        """
        if self.source_encoding:
            plain = replace(self, source=F32, source_encoding="")
            return plain.encode_into(out, np.ascontiguousarray(decode_int8(rows), "<f4").view(np.uint8))
        values = rows.reshape(-1).view(DTYPES[self.source].numpy)
        if self.encoding:
            return _encode_int8(out, _as_float32(values, self.source), values, self)
        if not len(values):
            return Outcome(0, 0, -1, 0.0, 0.0)
        return _encode_floats(out.reshape(-1).view(DTYPES[self.target].numpy), values, self)

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows as they are written: uint8, (n, target_bytes)."""
        out = np.empty((len(rows), self.target_bytes), np.uint8)
        self.encode_into(out, np.ascontiguousarray(rows))
        return out

    def decode(self, rows: np.ndarray) -> np.ndarray:
        """Return written rows in the source's dtype: uint8, (n, source_bytes). The source must be plain values."""
        bits = np.ascontiguousarray(rows).reshape(-1)
        if self.encoding:
            values = decode_int8(bits.reshape(len(rows), self.target_bytes))
        else:
            values = _as_float32(bits.view(DTYPES[self.target].numpy), self.target)
        back: np.ndarray
        if self.source == BF16:
            back = _round_bfloat16(np.ascontiguousarray(values).reshape(-1).view("<u4"))
        else:
            with np.errstate(over="ignore"):
                back = values.astype(DTYPES[self.source].numpy)
        return np.ascontiguousarray(back).view(np.uint8).reshape(len(rows), self.source_bytes)


def _row_bytes(dtype: int, encoding: str, dim: int) -> int:
    return dim + TAIL_BYTES if encoding else dim * DTYPES[dtype].itemsize


def encode_values(values: Sequence[float], dtype: int, encoding: str = "") -> np.ndarray:
    """Return one row of numbers as it is stored (uint8, (row_bytes,)); ``dtype`` is an index into DTYPES."""
    numbers = np.array(values, np.float64)
    if encoding:
        return RowCast(F64, U8, encoding, len(numbers)).encode(numbers.view(np.uint8).reshape(1, -1)).reshape(-1)
    stored = _round_bfloat16(_to_odd(numbers).view("<u4")) if dtype == BF16 else numbers.astype(DTYPES[dtype].numpy)
    row: np.ndarray = stored.view(np.uint8)
    return row


def decode_values(row: np.ndarray, dtype: int, encoding: str = "") -> tuple[float, ...]:
    """Return the numbers of one stored row (uint8, (row_bytes,)), the inverse of :func:`encode_values` but for its rounding."""
    if encoding:
        return tuple(decode_int8(row[None])[0].tolist())
    values = np.ascontiguousarray(row).view(DTYPES[dtype].numpy)
    return tuple((widen_bfloat16(values) if dtype == BF16 else values).tolist())


def decode_int8(rows: np.ndarray) -> np.ndarray:
    """Return the values (float32, (n, dim)) of rows of ``int8_rowwise`` (uint8, (n, dim + 8))."""
    dim = rows.shape[1] - TAIL_BYTES
    tail = np.ascontiguousarray(rows[:, dim:]).view("<f4")
    with np.errstate(over="ignore", invalid="ignore"):
        values: np.ndarray = rows[:, :dim] * tail[:, :1] + tail[:, 1:]
    return values


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _as_float32(values: np.ndarray, code: int) -> np.ndarray:
    if code == F32:
        return values
    if code == BF16:
        return widen_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _encode_floats(out: np.ndarray, values: np.ndarray, cast: RowCast) -> Outcome:
    """Cast flat values; ``out`` has bfloat16 as its bits."""
    singles = _to_odd(values) if cast.source == F64 and cast.target != F32 else _as_float32(values, cast.source)
    magnitude = singles.view("<u4") & np.uint32(0x7FFF_FFFF)
    highest = int(magnitude.max())
    limit = _FIRST_BEYOND[cast.target]
    nans = beyond = np.zeros(0, np.int64)
    if highest >= limit:
        nans = np.flatnonzero(magnitude > 0x7F80_0000)
        beyond = np.flatnonzero((magnitude >= limit) & (magnitude <= 0x7F80_0000))
        singles = singles.copy()
        singles[beyond] = np.copysign(np.float32(LARGEST[cast.target]), singles[beyond])
        kept = singles[nans]
        singles[nans] = 0
        magnitude = singles.view("<u4") & np.uint32(0x7FFF_FFFF)
    if cast.target == F16:
        written = _write_float16(out.view("<u2"), singles.view("<u4"), magnitude)
    elif cast.target == BF16:
        out[:] = _round_bfloat16(singles.view("<u4"))
        written = widen_bfloat16(out & np.uint16(0x7FFF))
    else:
        out[:] = singles
        written = magnitude.view("<f4")
    if cast.source == F64:
        errors = np.abs(np.abs(values) - written)
    else:  # two floats as close as these have a difference that is exactly a float
        errors = np.subtract(magnitude.view("<f4"), written, out=written if cast.target != F32 else None)
        np.abs(errors, out=errors)
    first = -1
    if len(nans) or len(beyond):
        errors[nans] = errors[beyond] = 0
        # a NaN keeps as many of its bits as the dtype has room for
        out[nans] = _quiet(kept.view("<u4"), cast.target).view(out.dtype)
        first = int(min(nans[:1].tolist() + beyond[:1].tolist())) // cast.dim
    worst = float(errors.max())
    total = float(errors.astype(np.float64, copy=False).sum()) if worst else 0.0
    return Outcome(len(nans), len(beyond), first, worst, total)


_FIRST_BEYOND = {F16: 0x477F_F000, BF16: 0x7F7F_8000, F32: 0x7F80_0000}
"""The bits of the smallest positive float32 that rounds to infinity."""


def _write_float16(out: np.ndarray, bits: np.ndarray, magnitude: np.ndarray) -> np.ndarray:
    """Fill ``out`` (uint16) from float32 bits without NaN that are in range; return the magnitudes that it holds (float32).

    For a value of exponent e, 2**(e + 13) is added. The last bit of that sum has the weight of the last bit of a float16
    there, so the sum is rounded as the float16 must be. Below the smallest normal float16 the last bit keeps the weight that
    it has there.
    """
    shift = magnitude & np.uint32(0x7F80_0000)
    np.maximum(shift, _LEAST[: len(shift)] if len(shift) <= len(_LEAST) else _LEAST[0], out=shift)
    shift += np.uint32(0x0680_0000)
    total: np.ndarray = magnitude.view("<f4") + shift.view("<f4")
    sign = bits >> np.uint32(16)
    sign &= np.uint32(0x8000)
    # the lower half of the sum has the fraction and its leading bit, so the exponent is added 1 lower
    sign += total.view("<u4")
    sign += shift >> np.uint32(13)
    sign += np.uint32(0x0800)
    out[:] = sign
    total -= shift.view("<f4")
    return total


_LEAST = np.full(1 << 15, 0x3880_0000, np.uint32)
"""The exponent of the smallest normal float16, as float32 bits. numpy compares two arrays faster than an array and a number."""


def _round_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) of float32 bits, which may include NaN."""
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    is_nan = (bits & np.uint32(0x7FFF_FFFF)) > 0x7F80_0000
    odd += bits
    odd >>= np.uint32(16)
    rounded: np.ndarray = odd.astype(np.uint16)
    if is_nan.any():
        rounded[is_nan] = _quiet(bits[is_nan], BF16)
    return rounded


def _quiet(bits: np.ndarray, code: int) -> np.ndarray:
    """Return the NaNs of these float32 bits in another dtype, as quiet NaNs with the same sign and upper bits."""
    quiet: np.ndarray
    if code == F32:
        quiet = (bits | np.uint32(0x0040_0000)).astype("<u4")
    elif code == BF16:
        quiet = ((bits >> np.uint32(16)) | np.uint32(0x0040)).astype("<u2")
    else:
        fraction = (bits >> np.uint32(13)) & np.uint32(0x03FF)
        quiet = (((bits >> np.uint32(16)) & np.uint32(0x8000)) | fraction | np.uint32(0x7E00)).astype("<u2")
    return quiet


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Return float64 values as float32; a value between two float32 becomes the one whose last bit is odd.

    A second rounding, to half as many bits, then gives the same result as one rounding, because an odd last bit is no tie.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        singles: np.ndarray = values.astype(np.float32)
    bits = singles.view("<u4")
    is_less = np.abs(values) < np.abs(singles)
    bits -= is_less  # toward zero
    bits |= singles != values
    nans = np.isnan(values)
    if nans.any():
        with np.errstate(invalid="ignore"):
            singles[nans] = values[nans].astype(np.float32)
    return singles


def _encode_int8(out: np.ndarray, singles: np.ndarray, values: np.ndarray, cast: RowCast) -> Outcome:
    """Fill rows of ``int8_rowwise`` from float32; ``values`` are the same in the source's dtype."""
    num_rows = len(out)
    if not num_rows:
        return Outcome(0, 0, -1, 0.0, 0.0)
    # a column of this matrix is a row, so that numpy handles many rows in one operation
    columns = np.ascontiguousarray(singles.reshape(num_rows, cast.dim).T)
    low, high = columns.min(axis=0), columns.max(axis=0)
    is_nan = is_beyond = None
    if not (np.abs(low).max() <= _HALF_RANGE and np.abs(high).max() <= _HALF_RANGE):  # NaN compares as false
        is_nan = np.isnan(columns)
        is_beyond = np.abs(columns) > _HALF_RANGE
        columns[is_nan] = 0
        np.clip(columns, -_HALF_RANGE, _HALF_RANGE, out=columns)
        low, high = columns.min(axis=0), columns.max(axis=0)
    spread = high - low
    scale = spread / _LEVELS
    levels = np.rint((columns - low) * (_LEVELS / (spread + _EPSILON)))
    out[:, : cast.dim] = levels.astype(np.uint8).T
    out[:, cast.dim :] = np.ascontiguousarray(np.stack([scale, low], axis=1), "<f4").view(np.uint8)
    levels *= scale
    levels += low
    exact = values.reshape(num_rows, cast.dim).T if cast.source == F64 else columns
    with np.errstate(invalid="ignore"):
        errors = np.abs(np.subtract(exact, levels, dtype=np.float64))
    nans = beyond = 0
    first = -1
    if is_nan is not None and is_beyond is not None:
        overflows = is_nan | is_beyond
        errors[overflows] = 0
        nans, beyond = int(np.count_nonzero(is_nan)), int(np.count_nonzero(is_beyond))
        first = int(np.flatnonzero(overflows.any(axis=0))[0])
    return Outcome(nans, beyond, first, float(errors.max()), float(errors.sum()))
