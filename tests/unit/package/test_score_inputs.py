"""Inputs of a score program: what its dtypes hold is taken, anything else is refused in one line."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dist_export.errors import UserError
from dist_export.manifest import TensorEntry
from dist_export.package.score_inputs import read_inputs


def read(value: Any, dtype: str, shape: tuple[int | str, ...] = ("batch",)) -> torch.Tensor:
    return read_inputs([TensorEntry(name="x", dtype=dtype, shape=shape)], {"x": value, "y": None}, where="package")["x"]


@pytest.mark.parametrize(
    ("value", "dtype", "expected"),
    [
        (np.array([1, 2**31 - 1, -(2**31)]), "int32", [1, 2**31 - 1, -(2**31)]),
        (torch.tensor([0, 255]), "uint8", [0, 255]),
        (np.array([2**64 - 1, 3], np.uint64), "int64", [-1, 3]),
        ([0, 1], "bool", [False, True]),
        ([True, False], "float32", [1.0, 0.0]),
        ([1, 2], "float16", [1.0, 2.0]),
        (np.array([0.5, np.inf]), "bfloat16", [0.5, float("inf")]),
        ([1.5], "complex64", [1.5 + 0j]),
        ([], "int64", []),
        (torch.zeros(0), "int32", []),
    ],
)
def test_values_that_the_dtype_holds_are_taken(value, dtype: str, expected) -> None:
    found = read(value, dtype)
    assert found.dtype == getattr(torch, dtype)
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (np.array([1, 2**32 + 1]), "int32", "holds 4294967297, which torch.int32 cannot hold"),
        (torch.tensor([-(2**32), 1]), "int32", "holds -4294967296, which torch.int32 cannot hold"),
        (np.array([-1]), "uint64", "holds -1, which torch.uint64 cannot hold"),
        (np.array([2**63], np.uint64), "int32", "holds 9223372036854775808"),
        ([0, 2], "bool", "holds 2, which torch.bool cannot hold"),
        ([True], "int64", "is torch.bool, expected torch.int64"),
        ([1.0], "int64", "is torch.float64, expected torch.int64"),
        ([0.5], "bool", "is torch.float64, expected torch.bool"),
        ([1j], "float32", "is torch.complex128, expected torch.float32"),
        ([1e300], "float32", "is torch.float64 and holds values that torch.float32 cannot hold"),
        ([70_000], "float16", "is torch.int64 and holds values that torch.float16 cannot hold"),
        (["a"], "int64", "is an array of <U1"),
        (None, "int64", "is an array of object"),
        ([None], "int64", "is an array of object"),
        ([2**70], "int64", "is an array of object"),
        ([[1], [2, 3]], "int64", "is no array; expected numbers of int64"),
        (np.arange(3).astype(">i8"), "int64", "is an array of >i8, in the byte order of another machine"),
        (np.array([1.0], np.longdouble), "float32", "which torch does not have"),
        (torch.ones(2).to_sparse(), "float32", "is a sparse, nested, quantized or meta tensor"),
        ([[1]], "int64", r"has the shape \[1, 1\], expected \[batch\]"),
    ],
)
def test_anything_else_is_a_users_mistake_in_one_line(value, dtype: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^package: input 'x' .*{message}") as caught:
        read(value, dtype)
    assert "\n" not in str(caught.value)


def test_a_fixed_size_and_a_missing_input_are_refused() -> None:
    with pytest.raises(UserError, match=r"has the shape \[1, 2\], expected \[batch, 3\]"):
        read([[1, 2]], "int64", ("batch", 3))
    with pytest.raises(UserError, match="input 'x' is missing; the score program takes x"):
        read_inputs([TensorEntry(name="x", dtype="int64", shape=("batch",))], {}, where="package")
