"""Casts of rows of floats in numpy: bits, arithmetic, and the errors of what is written. ``formats/row_encodings.py`` uses them.

Dtypes have their safetensors names: F64, F32, F16, BF16 (as uint16, because numpy has no bfloat16).
"""

from __future__ import annotations

import numpy as np

from dist_export.kernels.protocol import CastOutcome

_TAIL_BYTES = 8
_EPSILON = np.float32(1e-8)
_LEVELS = np.float32(255)
HALF_RANGE = np.float32(1.7e38)
"""Rows of int8 are clamped to this range, so that max - min is a finite float32."""

LARGEST = {
    "F16": 65504.0,
    "BF16": float(np.array([0x7F7F << 16], np.uint32).view(np.float32)[0]),
    "F32": float(np.finfo(np.float32).max),
}
"""The largest value of each dtype."""

_FIRST_BEYOND = {"F16": 0x477F_F000, "BF16": 0x7F7F_8000, "F32": 0x7F80_0000}
"""The bits of the smallest positive float32 that rounds to infinity."""


class NumpyCasts:
    """The twin of ``CompiledCasts``."""

    def cast_floats(self, out: np.ndarray, values: np.ndarray, *, source: str, target: str, dim: int) -> CastOutcome:
        """See the protocol."""
        if not len(values):
            return CastOutcome(0, 0, -1, 0.0, 0.0)
        return _encode_floats(out, values, source, target, dim)

    def encode_int8(self, out: np.ndarray, values: np.ndarray, *, source: str, dim: int) -> CastOutcome:
        """See the protocol."""
        if not len(out):
            return CastOutcome(0, 0, -1, 0.0, 0.0)
        return _encode_int8(out, as_float32(values, source), values, source, dim)

    def decode_int8(self, rows: np.ndarray) -> np.ndarray:
        """See the protocol."""
        dim = rows.shape[1] - _TAIL_BYTES
        tail = np.ascontiguousarray(rows[:, dim:]).view("<f4")
        with np.errstate(over="ignore", invalid="ignore"):
            values: np.ndarray = rows[:, :dim] * tail[:, :1] + tail[:, 1:]
        return values


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def as_float32(values: np.ndarray, source: str) -> np.ndarray:
    """Return values of a dtype as float32; from float64 they are rounded."""
    if source == "F32":
        return values
    if source == "BF16":
        return widen_bfloat16(values)
    with np.errstate(over="ignore"):
        return values.astype(np.float32, copy=False)


def _encode_floats(out: np.ndarray, values: np.ndarray, source: str, target: str, dim: int) -> CastOutcome:
    """Cast flat values; ``out`` has bfloat16 as its bits."""
    singles = to_odd(values) if source == "F64" and target != "F32" else as_float32(values, source)
    magnitude = singles.view("<u4") & np.uint32(0x7FFF_FFFF)
    highest = int(magnitude.max())
    limit = _FIRST_BEYOND[target]
    nans = beyond = np.zeros(0, np.int64)
    if highest >= limit:
        nans = np.flatnonzero(magnitude > 0x7F80_0000)
        beyond = np.flatnonzero((magnitude >= limit) & (magnitude <= 0x7F80_0000))
        singles = singles.copy()
        singles[beyond] = np.copysign(np.float32(LARGEST[target]), singles[beyond])
        kept = singles[nans]
        singles[nans] = 0
        magnitude = singles.view("<u4") & np.uint32(0x7FFF_FFFF)
    if target == "F16":
        written = _write_float16(out.view("<u2"), singles.view("<u4"), magnitude)
    elif target == "BF16":
        out[:] = round_bfloat16(singles.view("<u4"))
        written = widen_bfloat16(out & np.uint16(0x7FFF))
    else:
        out[:] = singles
        written = magnitude.view("<f4")
    if source == "F64":
        errors = np.abs(np.abs(values) - written)
    else:  # two floats as close as these have a difference that is exactly a float
        errors = np.subtract(magnitude.view("<f4"), written, out=written if target != "F32" else None)
        np.abs(errors, out=errors)
    first = -1
    if len(nans) or len(beyond):
        errors[nans] = errors[beyond] = 0
        # a NaN keeps as many of its bits as the dtype has room for
        out[nans] = _quiet(kept.view("<u4"), target).view(out.dtype)
        first = int(min(nans[:1].tolist() + beyond[:1].tolist())) // dim
    worst = float(errors.max())
    total = float(errors.astype(np.float64, copy=False).sum()) if worst else 0.0
    return CastOutcome(len(nans), len(beyond), first, worst, total)


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


def round_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) of float32 bits, which may include NaN."""
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    is_nan = (bits & np.uint32(0x7FFF_FFFF)) > 0x7F80_0000
    odd += bits
    odd >>= np.uint32(16)
    rounded: np.ndarray = odd.astype(np.uint16)
    if is_nan.any():
        rounded[is_nan] = _quiet(bits[is_nan], "BF16")
    return rounded


def _quiet(bits: np.ndarray, target: str) -> np.ndarray:
    """Return the NaNs of these float32 bits in another dtype, as quiet NaNs with the same sign and upper bits."""
    quiet: np.ndarray
    if target == "F32":
        quiet = (bits | np.uint32(0x0040_0000)).astype("<u4")
    elif target == "BF16":
        quiet = ((bits >> np.uint32(16)) | np.uint32(0x0040)).astype("<u2")
    else:
        fraction = (bits >> np.uint32(13)) & np.uint32(0x03FF)
        quiet = (((bits >> np.uint32(16)) & np.uint32(0x8000)) | fraction | np.uint32(0x7E00)).astype("<u2")
    return quiet


def to_odd(values: np.ndarray) -> np.ndarray:
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


def _encode_int8(out: np.ndarray, singles: np.ndarray, values: np.ndarray, source: str, dim: int) -> CastOutcome:
    """Fill rows of ``int8_rowwise`` from float32; ``values`` are the same in the source's dtype."""
    num_rows = len(out)
    if not num_rows:
        return CastOutcome(0, 0, -1, 0.0, 0.0)
    # a column of this matrix is a row, so that numpy handles many rows in one operation
    columns = singles.reshape(num_rows, dim).T.copy()
    low, high = columns.min(axis=0), columns.max(axis=0)
    is_nan = is_beyond = None
    if not (np.abs(low).max() <= HALF_RANGE and np.abs(high).max() <= HALF_RANGE):  # NaN compares as false
        is_nan = np.isnan(columns)
        is_beyond = np.abs(columns) > HALF_RANGE
        columns[is_nan] = 0
        np.clip(columns, -HALF_RANGE, HALF_RANGE, out=columns)
        low, high = columns.min(axis=0), columns.max(axis=0)
    _sign_zeros(low, columns)
    spread = high - low
    spread += 0  # never -0
    scale = spread / _LEVELS
    levels = np.rint((columns - low) * (_LEVELS / (spread + _EPSILON)))
    out[:, :dim] = levels.astype(np.uint8).T
    out[:, dim:] = np.ascontiguousarray(np.stack([scale, low], axis=1), "<f4").view(np.uint8)
    levels *= scale
    levels += low
    exact = values.reshape(num_rows, dim).T if source == "F64" else columns
    with np.errstate(invalid="ignore"):
        errors = np.abs(np.subtract(exact, levels, dtype=np.float64))
    nans = beyond = 0
    first = -1
    if is_nan is not None and is_beyond is not None:
        overflows = is_nan | is_beyond
        errors[overflows] = 0
        nans, beyond = int(np.count_nonzero(is_nan)), int(np.count_nonzero(is_beyond))
        first = int(np.flatnonzero(overflows.any(axis=0))[0])
    return CastOutcome(nans, beyond, first, float(errors.max()), float(_sum_rows(errors).sum()))


def _sign_zeros(low: np.ndarray, columns: np.ndarray) -> None:
    """Give each minimum that is zero the sign of the first zero of its row. That of ``min`` depends on the processor."""
    zeros = np.flatnonzero(low == 0)
    if len(zeros):
        chosen = columns[:, zeros]
        low[zeros] = chosen[(chosen == 0).argmax(axis=0), np.arange(len(zeros))]


def _sum_rows(errors: np.ndarray) -> np.ndarray:
    """Return the sum of each row (a column of ``errors``), in eight lanes as numpy sums an array of 128 values."""
    whole = len(errors) - len(errors) % 8
    sums = np.zeros(errors.shape[1])
    if whole:
        lanes = errors[:whole].reshape(whole // 8, 8, -1)
        total = lanes[0].copy()
        for eight in lanes[1:]:
            total += eight
        sums = ((total[0] + total[1]) + (total[2] + total[3])) + ((total[4] + total[5]) + (total[6] + total[7]))
    for column in errors[whole:]:
        sums = sums + column
    return sums
