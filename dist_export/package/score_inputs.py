"""The caller's inputs of a score program as tensors of its dtypes. No value changes without an error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dist_export.errors import UserError
from dist_export.manifest import TensorEntry

_NUMBERS = "biufc"
"""Kinds of numpy's dtypes that tensors can have."""


def read_inputs(entries: Sequence[TensorEntry], inputs: Mapping[str, Any], *, where: str) -> dict[str, torch.Tensor]:
    """Return the inputs of a program on the CPU, in its order and of its dtypes. Others are passed over.

    As in a lookup, uint64 ids for an int64 input are the int64 ids with the same bits. Rounding to a narrower float is no error.

    Raises:
        UserError: an input is missing, is no numbers, has another dtype or shape, or holds a value that its dtype cannot hold.
    """
    missing = [entry.name for entry in entries if entry.name not in inputs]
    if missing:
        raise UserError(
            f"{where}: input {missing[0]!r} is missing; the score program takes {', '.join(one.name for one in entries)}"
        )
    return {entry.name: _read(entry, inputs[entry.name], f"{where}: input {entry.name!r}") for entry in entries}


def _read(entry: TensorEntry, value: Any, what: str) -> torch.Tensor:
    tensor = _to_tensor(value, f"expected numbers of {entry.dtype}", what)
    if tensor.dim() != len(entry.shape) or any(
        isinstance(stated, int) and size != stated for size, stated in zip(tensor.shape, entry.shape, strict=True)
    ):
        raise UserError(f"{what} has the shape {list(tensor.shape)}, expected [{', '.join(map(str, entry.shape))}]")
    dtype: torch.dtype = getattr(torch, entry.dtype)
    if tensor.dtype == dtype or not tensor.numel():
        return _copy(tensor, dtype)
    if _kind(tensor.dtype) > _kind(dtype) or (tensor.dtype == torch.bool and not _is_float(dtype)):
        raise UserError(f"{what} is {tensor.dtype}, expected {dtype}")
    if not _is_float(dtype):
        _refuse_integer_overflow(tensor, dtype, what)
        return _copy(tensor, dtype)
    cast = _copy(tensor, dtype)
    if not bool((_is_finite(cast) | ~_is_finite(tensor)).all()):
        raise UserError(f"{what} is {tensor.dtype} and holds values that {dtype} cannot hold")
    return cast


def _copy(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a copy in any case: a program may write into its inputs, as the model's own forward does."""
    return tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _to_tensor(value: Any, expected: str, what: str) -> torch.Tensor:
    """Return ``value`` as a dense tensor of numbers on the CPU. UserError if it is not that."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.is_meta:
            raise UserError(f"{what} is a sparse, nested, quantized or meta tensor; {expected} in a dense tensor")
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{what} is no array; {expected} ({text})") from error
    if array.dtype.kind not in _NUMBERS:
        raise UserError(f"{what} is an array of {array.dtype} ({type(value).__name__}); {expected}")
    if not array.dtype.isnative:
        raise UserError(f"{what} is an array of {array.dtype}, in the byte order of another machine; {expected}")
    try:
        return torch.from_numpy(np.array(array))
    except TypeError as error:
        raise UserError(f"{what} is an array of {array.dtype}, which torch does not have; {expected}") from error


def _refuse_integer_overflow(tensor: torch.Tensor, dtype: torch.dtype, what: str) -> None:
    if tensor.dtype == torch.uint64 and dtype == torch.int64:
        return
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    values = tensor.numpy()
    for found in (int(values.min()), int(values.max())):
        if not low <= found <= high:
            raise UserError(f"{what} holds {found}, which {dtype} cannot hold: the program takes {low} to {high}")


def _kind(dtype: torch.dtype) -> int:
    """Return 0 for integers and bools, 1 for floats, 2 for complex numbers: a higher one does not fit into a lower one."""
    return 2 if dtype.is_complex else int(dtype.is_floating_point)


def _is_float(dtype: torch.dtype) -> bool:
    return _kind(dtype) > 0


def _is_finite(tensor: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(tensor.to(torch.complex128 if tensor.is_complex() else torch.float64))
