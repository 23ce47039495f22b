"""A tensor as a pickle of ``torch.save`` describes it, made from the arguments of the calls that torch would make.

Source: the functions of torch 2.13's ``torch/_utils.py`` that a pickled tensor names. None of them is called.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

from dist_export.formats.pickle_values import Global, PickleError

MAX_DIMS = 64
_MAX_SIZE = 1 << 62
_BITS = re.compile(r"[a-z]+?(\d+)(x\d+)?(_\w+)?")


class Storage(NamedTuple):
    """Bytes that contain the values of tensors."""

    key: str
    """Its name in the file."""
    dtype: str
    """Torch's name."""
    num_bytes: int
    """The size that the pickle claims."""


class PickledTensor(NamedTuple):
    """A tensor as a pickle describes it. Only a tensor without elements may lie outside its storage."""

    dtype: str
    """Torch's name; empty if it is not known."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements."""
    first: int
    """The offset in its storage, in elements."""
    storage: Storage | None
    """None if ``reason`` is not empty."""
    reason: str = ""
    """Why its values cannot be read from the bytes of a storage; empty if they can."""


def itemsize_of(dtype: str) -> int:
    """Return the bytes of an element of the torch dtype with this name."""
    found = _BITS.fullmatch(dtype)
    return 1 if found is None else max(1, int(found[1]) // 8)


def refuse_expanded(tensor: Any) -> None:
    """Refuse a tensor that is larger than its storage, because torch would write it out in full."""
    if not isinstance(tensor, PickledTensor):
        raise PickleError("makes a tensor in a way that torch does not")
    if tensor.storage is not None:
        num_bytes = math.prod(tensor.shape) * itemsize_of(tensor.dtype)
        if num_bytes > tensor.storage.num_bytes:
            raise PickleError(f"makes a tensor of {num_bytes:,} bytes of {tensor.storage.num_bytes:,} that are stored")


def describe_class(name: str) -> str:
    """Return why the values of a tensor of this class cannot be read."""
    kind = name.rpartition(".")[2]
    if name.startswith("torch.distributed."):
        return f"a {kind}, of which the file holds one rank's shards; save with torch.distributed.checkpoint"
    return "nested" if kind == "_rebuild_njt" else f"a {kind}"


def pad_arguments(arguments: tuple[Any, ...], length: int) -> list[Any]:
    """Return a call's arguments, filled up with None. PickleError for more than any call of torch has."""
    if len(arguments) > 16:
        raise PickleError("makes a tensor in a way that torch does not")
    return [*arguments, *[None] * (length - len(arguments))]


def read_sizes(values: Any) -> tuple[int, ...]:
    """Return sizes, strides or an offset as numbers. PickleError for what no tensor can have."""
    if isinstance(values, (tuple, list)) and len(values) <= MAX_DIMS:
        found = tuple(values)
        if all(type(value) is int and 0 <= value < _MAX_SIZE for value in found):
            return found
    raise PickleError("has a tensor of impossible sizes")


def make_plain(storage: Any, first: Any, shape: Any, strides: Any, dtype: str) -> PickledTensor:
    """Return the tensor of a storage. PickleError if it reaches beyond the storage."""
    if not isinstance(storage, Storage) or not dtype:
        raise PickleError("has a tensor without a storage")
    (first,), shape, strides = read_sizes((first,)), read_sizes(shape), read_sizes(strides)
    if len(shape) != len(strides):
        raise PickleError("has a tensor of impossible sizes")
    made = PickledTensor(dtype, shape, strides, first, storage)
    if math.prod(shape):
        last = first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (last + 1) * itemsize_of(dtype) > storage.num_bytes:
            raise PickleError(f"has a tensor that reaches beyond the {storage.num_bytes:,} bytes that are stored of it")
    return made


def make_view(tensor: PickledTensor, metadata: Any) -> PickledTensor:
    """Return the tensor; if ``metadata`` says that values are stored negated or conjugated, without its storage."""
    if metadata is None:
        return tensor
    if not isinstance(metadata, dict) or len(metadata) > 8:
        raise PickleError("has a tensor in an unknown way")
    marks = [word for key, word in (("conj", "conjugated"), ("neg", "negated")) if metadata.get(key)]
    return without_storage(tensor, " and ".join(marks)) if marks else tensor


def without_storage(tensor: PickledTensor, reason: str) -> PickledTensor:
    """Return the tensor with the reason why its values cannot be read."""
    return tensor._replace(storage=None, reason=reason)


def read_dtype(value: Any) -> str:
    """Return the name of the dtype that a pickle names. PickleError if it names none."""
    if not isinstance(value, Global) or not value.name.startswith("torch."):
        raise PickleError("has a tensor without a dtype")
    return value.name.removeprefix("torch.")


def make_parameter(*arguments: Any) -> Any:
    """Return the tensor of a parameter."""
    if not arguments or not isinstance(arguments[0], PickledTensor):
        raise PickleError("has a parameter that is no tensor")
    return arguments[0]


def make_meta(*arguments: Any) -> PickledTensor:
    """Return a tensor on the meta device."""
    dtype, shape, *_ = pad_arguments(arguments, 4)
    return PickledTensor(read_dtype(dtype), read_sizes(shape), (), 0, None, "on the meta device, without values")


def make_wrapper(*arguments: Any) -> PickledTensor:
    """Return a tensor of a class that wraps others."""
    kind, dtype, shape, *_ = pad_arguments(arguments, 8)
    reason = describe_class(kind.name if isinstance(kind, Global) else "tensor of another class")
    return PickledTensor(read_dtype(dtype), read_sizes(shape), (), 0, None, reason)


def make_from_numpy(*arguments: Any) -> PickledTensor:
    """Return a tensor that is stored as an array of numpy."""
    _, dtype, *_ = pad_arguments(arguments, 4)
    return PickledTensor(read_dtype(dtype), (), (), 0, None, "stored as an array of numpy")
