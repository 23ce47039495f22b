"""Read the pickles of sample tensors in a dense folder without running code that a pickle may contain.

``pickle`` writes tensors as ``torch._utils._rebuild_tensor_v2`` over ``torch.storage._load_from_bytes``. For dtypes without
a storage class (float8, uint16, complex32 and others) it writes ``_rebuild_tensor_v3``, which names the dtype. Only these
names are accepted here, and neither is called. Tensors are made at the end, after their sizes were compared with the
content of their storages.
"""

from __future__ import annotations

import io
import math
import re
import struct
import sys
from typing import Any, NamedTuple

import torch

from dist_export.errors import CheckpointError, PackageError
from dist_export.formats.legacy_pickle import find_legacy
from dist_export.formats.pickle_machine import Machine
from dist_export.formats.pickle_values import Global, PickleError
from dist_export.formats.pickled_tensor import Storage, itemsize_of
from dist_export.formats.torch_pickle import load_archive
from dist_export.formats.torch_zip import check_state_archive

Tensors = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]

_MAX_TENSORS = 10_000

_DTYPE = re.compile(r"bool|u?int(8|16|32|64)|b?float16|float(32|64|8_\w+)|complex(32|64|128)")


class _Saved(NamedTuple):
    """A storage, as the bytes of a file of ``torch.save``."""

    raw: bytes


class _Tensor(NamedTuple):
    saved: _Saved
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype | None = None
    """None takes the dtype of the storage."""


def read_sample_pickle(raw: bytes, *, where: str) -> Tensors:
    """Return the pickled object: a tensor, a tuple of tensors, or a dict of tensors by name.

    Raises:
        PackageError: it is cut short, or names or contains anything else.
    """
    try:
        found = Machine(raw, _find).load()
        values = list(found.values() if type(found) is dict else found if type(found) is tuple else [found])
        is_named = type(found) is not dict or all(type(name) is str for name in found)
        if not is_named or not all(type(value) is _Tensor for value in values):
            raise PackageError(f"{where} holds a {_describe(found)} that is not of tensors alone")
        made = _make_all(values)
    except (PickleError, CheckpointError) as error:
        raise PackageError(f"{where} is no pickle of sample tensors: {str(error)[:200]}") from None
    if type(found) is dict:
        return dict(zip(found, made, strict=True))
    return tuple(made) if type(found) is tuple else made[0]


def _describe(found: Any) -> str:
    return "value" if type(found) in (_Saved, _Tensor, Global) else type(found).__name__


def _find(module: str, name: str) -> Global:
    known = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
        ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
        ("torch.storage", "_load_from_bytes"): _saved,
        ("collections", "OrderedDict"): _empty_dict,
    }
    if module == "torch" and _DTYPE.fullmatch(name) and isinstance(vars(torch).get(name), torch.dtype):
        return Global(name)
    if (module, name) not in known:
        raise PickleError(f"it names {module[:100]!r}, {name[:100]!r}, which no sample needs; it was not run")
    return Global(name, known[module, name])


def _empty_dict(*arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise PickleError("an OrderedDict in it is made of something")
    return {}


def _saved(*arguments: Any) -> _Saved:
    if len(arguments) != 1 or type(arguments[0]) is not bytes:
        raise PickleError("a storage is made of something else than bytes")
    return _Saved(arguments[0])


def _rebuild(*arguments: Any) -> _Tensor:
    match arguments:
        case (_Saved() as saved, int(offset), tuple(sizes), tuple(strides), *_) if len(sizes) == len(strides) <= 64:
            numbers = (offset, *sizes, *strides)
            if all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
                return _Tensor(saved, offset, sizes, strides)
    raise PickleError("a tensor has impossible sizes")


def _rebuild_v3(*arguments: Any) -> _Tensor:
    match arguments:
        case (*_, Global() as dtype) if len(arguments) == 7 and dtype.make is None:
            return _rebuild(*arguments[:4])._replace(dtype=vars(torch)[dtype.name])
    raise PickleError("a tensor has no dtype")


def _make_all(tensors: list[_Tensor]) -> list[torch.Tensor]:
    if len(tensors) > _MAX_TENSORS:
        raise PickleError(f"it holds {len(tensors):,} tensors")
    storages: dict[int, Any] = {}
    return [_make(tensor, storages) for tensor in tensors]


def _make(tensor: _Tensor, storages: dict[int, Any]) -> torch.Tensor:
    if id(tensor.saved.raw) not in storages:
        storages[id(tensor.saved.raw)] = _load_storage(tensor.saved.raw)
    flat = storages[id(tensor.saved.raw)]
    if tensor.dtype is not None:
        if flat.dtype != torch.uint8:
            raise PickleError(f"a tensor of {tensor.dtype} lies over a storage of {flat.dtype}")
        flat = flat[: len(flat) // tensor.dtype.itemsize * tensor.dtype.itemsize].view(tensor.dtype)
    if math.prod(tensor.sizes) > len(flat):  # also refuses an expanded view, because a sample is written in full
        raise PickleError(f"a tensor of {math.prod(tensor.sizes):,} values over a storage of {len(flat):,}")
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.sizes, tensor.strides, strict=True))
    if math.prod(tensor.sizes) and last >= len(flat):
        raise PickleError(f"a tensor reaches beyond the {len(flat):,} values of its storage")
    return torch.as_strided(flat, tensor.sizes, tensor.strides, tensor.offset if math.prod(tensor.sizes) else 0)


def _load_storage(raw: bytes) -> torch.Tensor:
    """Return the values of a storage (shape [n]), after the size in its pickle was compared with its content."""
    if raw.startswith(b"PK"):
        archive = check_state_archive(io.BytesIO(raw), where="a storage")
        held = _expect_storage(load_archive(archive))
        if archive.is_big_endian != (sys.byteorder == "big"):
            raise PickleError(
                f"a storage has its bytes in another order than this machine, which is {sys.byteorder} endian"
            )
        first = archive.storages[held.key][0]
    else:
        described, end = find_legacy(raw)
        held, first = _expect_storage(described), end + 8  # the number of values comes first
        is_whole = len(raw) >= first + held.num_bytes
        if not is_whole or raw[end:first] != struct.pack("<q", held.num_bytes // itemsize_of(held.dtype)):
            raise PickleError("a storage has another number of values than it says")
    dtype = getattr(torch, held.dtype)
    if not held.num_bytes:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer(bytearray(raw[first : first + held.num_bytes]), dtype=dtype)


def _expect_storage(held: Any) -> Storage:
    if type(held) is not Storage:
        raise PickleError(f"a storage is a {type(held).__name__}")
    if held.dtype.startswith("q"):
        raise PickleError(f"a storage is of {held.dtype}, which no sample is")
    return held
