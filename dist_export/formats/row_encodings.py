"""Cast rows of floats to another dtype, and define their bytes on disk. The kernels do the arithmetic.

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

import numpy as np

from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES
from dist_export.kernels.numpy_casts import HALF_RANGE, as_float32, round_bfloat16, to_odd
from dist_export.kernels.numpy_casts import LARGEST as LARGEST_BY_NAME
from dist_export.kernels.numpy_casts import widen_bfloat16 as widen_bits
from dist_export.kernels.protocol import CastOutcome
from dist_export.kernels.selection import select_kernels

INT8_ROWWISE = "int8_rowwise"
"""The encoding's name in ``manifest.json``; the block's dtype is U8."""
TAIL_BYTES = 8
"""Bytes of scale and bias, after the values of a row."""

F64, F32, F16, BF16, U8 = (CODE_BY_NAME[name] for name in ("F64", "F32", "F16", "BF16", "U8"))
FLOATS = (F64, F32, F16, BF16)
"""The dtypes that can be cast."""

LARGEST = {CODE_BY_NAME[name]: value for name, value in LARGEST_BY_NAME.items()}
"""The largest value of each dtype that rows can be cast to. For int8 the limit is ``HALF_RANGE`` on either side."""


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
        return f"+-{float(HALF_RANGE):.3g}" if self.encoding else f"+-{LARGEST[self.target]:.6g}"

    def encode_into(self, out: np.ndarray, rows: np.ndarray) -> CastOutcome:
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
            return select_kernels().encode_int8(out, values, source=DTYPES[self.source].name, dim=self.dim)
        return select_kernels().cast_floats(
            out.reshape(-1).view(DTYPES[self.target].numpy),
            values,
            source=DTYPES[self.source].name,
            target=DTYPES[self.target].name,
            dim=self.dim,
        )

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
            values = as_float32(bits.view(DTYPES[self.target].numpy), DTYPES[self.target].name)
        back: np.ndarray
        if self.source == BF16:
            back = round_bfloat16(np.ascontiguousarray(values).reshape(-1).view("<u4"))
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
    stored = round_bfloat16(to_odd(numbers).view("<u4")) if dtype == BF16 else numbers.astype(DTYPES[dtype].numpy)
    row: np.ndarray = stored.view(np.uint8)
    return row


def decode_values(row: np.ndarray, dtype: int, encoding: str = "") -> tuple[float, ...]:
    """Return the numbers of one stored row (uint8, (row_bytes,)), the inverse of :func:`encode_values` but for its rounding."""
    if encoding:
        return tuple(decode_int8(row[None])[0].tolist())
    values = np.ascontiguousarray(row).view(DTYPES[dtype].numpy)
    return tuple((widen_bits(values) if dtype == BF16 else values).tolist())


def decode_int8(rows: np.ndarray) -> np.ndarray:
    """Return the values (float32, (n, dim)) of rows of ``int8_rowwise`` (uint8, (n, dim + 8))."""
    return select_kernels().decode_int8(rows)


def widen_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits (uint16) as float32."""
    return widen_bits(bits)
