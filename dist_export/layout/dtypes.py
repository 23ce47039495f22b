"""The dtypes that a RecIS safetensors file may hold, and their names in the other worlds.

Source: RecIS's C++ writer and reader, which know these and nothing else. ``bool`` (lower case) is what its writer
puts down for torch's bool and what neither its own reader nor the safetensors library accepts; ``BOOL`` is right.
"""

from __future__ import annotations

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
    Dtype("BF16", "bfloat16", "<u2", 2),  # numpy has no bfloat16: the bits, as unsigned 16-bit integers
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
