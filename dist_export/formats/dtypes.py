"""The dtypes that a RecIS safetensors file may contain, and their names in other libraries.

Source: RecIS's C++ writer and reader, which know only these. Its writer names torch's bool ``bool`` (lower case), which
neither its own reader nor the safetensors library accepts; ``BOOL`` is correct.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Dtype(NamedTuple):
    """One dtype: safetensors name, torch name, numpy name of equal width, and item size in bytes."""

    name: str
    torch: str
    numpy: str
    itemsize: int


DTYPES: tuple[Dtype, ...] = (
    Dtype("F64", "float64", "<f8", 8),
    Dtype("F32", "float32", "<f4", 4),
    Dtype("F16", "float16", "<f2", 2),
    Dtype("BF16", "bfloat16", "<u2", 2),  # numpy has no bfloat16: its bits are read as unsigned 16-bit integers
    Dtype("I64", "int64", "<i8", 8),
    Dtype("I32", "int32", "<i4", 4),
    Dtype("I16", "int16", "<i2", 2),
    Dtype("I8", "int8", "|i1", 1),
    Dtype("U8", "uint8", "|u1", 1),
    Dtype("BOOL", "bool", "|b1", 1),
)

CODE_BY_NAME: dict[str, int] = {dtype.name: code for code, dtype in enumerate(DTYPES)}
CODE_BY_NAME["bool"] = CODE_BY_NAME["BOOL"]
CODE_BY_TORCH: dict[str, int] = {dtype.torch: code for code, dtype in enumerate(DTYPES)}
I64: int = CODE_BY_NAME["I64"]

OTHER_DTYPES: tuple[Dtype, ...] = (
    *(Dtype(f"U{bits}", f"uint{bits}", f"<u{bits // 8}", bits // 8) for bits in (16, 32, 64)),
    Dtype("F8_E4M3", "float8_e4m3fn", "|u1", 1),
    Dtype("F8_E5M2", "float8_e5m2", "|u1", 1),
    Dtype("F8_E4M3FNUZ", "float8_e4m3fnuz", "|u1", 1),
    Dtype("F8_E5M2FNUZ", "float8_e5m2fnuz", "|u1", 1),
    Dtype("F8_E8M0", "float8_e8m0fnu", "|u1", 1),
    Dtype("", "float4_e2m1fn_x2", "|u1", 1),  # two values in a byte; the safetensors library counts each value, as F4
    Dtype("", "complex32", "<u4", 4),
    Dtype("C64", "complex64", "<c8", 8),
    Dtype("", "complex128", "<c16", 16),
)
"""Further dtypes that a dense parameter of a checkpoint may have, named as in torch. No table of a package has them.

Source: torch 2.13's dtypes of whole bytes, and the names of safetensors 0.8."""

ITEMSIZES: dict[str, int] = {dtype.torch: dtype.itemsize for dtype in (*DTYPES, *OTHER_DTYPES)}
"""Torch name -> bytes of an element, for each dtype that is read."""

PACKED_BITS: dict[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Safetensors name -> bits of an element, for dtypes whose elements share bytes."""


_NAME = re.compile(r"bool|(?:q?u?int|b?float|complex|bits)\d[a-z0-9_]{0,31}")


def is_torch_dtype(name: str) -> bool:
    """Return whether ``torch.<name>`` has the form of a dtype's name, also of a future one."""
    return _NAME.fullmatch(name) is not None


def explain_unread(dtype: str) -> str:
    """Return why a tensor of a dtype (torch's name, or the file's own) is not read; empty if it is read."""
    if dtype in ITEMSIZES:
        return ""
    if dtype.startswith(("qint", "quint")):
        return f"quantized ({dtype}): save its dequantized values"
    return f"of dtype {dtype}, which is not read"
