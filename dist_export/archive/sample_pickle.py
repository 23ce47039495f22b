"""Read the pickles of sample tensors in a dense folder without running what a pickle may say.

They are what ``pickle`` makes of tensors: ``torch._utils._rebuild_tensor_v2`` over ``torch.storage._load_from_bytes``.
Only these names are known here, and both are replaced: storages are loaded as weights only, and sizes are compared with
what the storage holds before a tensor is made of it.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from typing import Any

import torch

from dist_export.errors import PackageError

Tensors = torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]


def read_sample_pickle(raw: bytes, *, where: str) -> Tensors:
    """Return what was pickled: a tensor, a tuple of tensors, or a dict of them by name.

    Raises:
        PackageError: it is cut short, names anything else, or holds anything else.
    """
    try:
        found = _Unpickler(io.BytesIO(raw)).load()
    except PackageError:
        raise
    except Exception as error:  # noqa: BLE001 -- a broken pickle raises whatever its opcodes come to
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise PackageError(f"{where} is no pickle of sample tensors: {first[:200]}") from None
    values = found.values() if isinstance(found, dict) else found if isinstance(found, tuple) else (found,)
    if not all(isinstance(value, torch.Tensor) for value in values):
        raise PackageError(f"{where} holds a {type(found).__name__} that is not of tensors alone")
    return found  # type: ignore[no-any-return]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
            ("torch.storage", "_load_from_bytes"): _load_storage,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(
                f"it names {module[:100]!r}, {name[:100]!r}, which no sample needs; it was not run"
            )
        return known[module, name]

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def _load_storage(raw: bytes) -> Any:
    storage = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError(f"a storage is a {type(storage).__name__}")
    return storage


def _rebuild(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    numbers = (offset, *size, *stride)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers) or len(size) != len(stride):
        raise pickle.UnpicklingError("a tensor has impossible sizes")
    empty = torch.empty(0, dtype=storage.dtype)
    bare = storage._untyped_storage  # noqa: SLF001 -- torch has deprecated all that is public of a typed one
    held = bare.nbytes() // empty.element_size()
    if math.prod(size) > held:  # also one that is spread over few values: a sample is written in full
        raise pickle.UnpicklingError(f"a tensor of {math.prod(size):,} values over a storage of {held:,}")
    return empty.set_(bare, offset, size, stride)  # torch compares this with the storage
