"""The format of ``torch.save`` before torch 1.6, which it still writes on request: several pickles, then storages.

Source: torch 2.13's ``serialization.py``, ``_legacy_save`` and ``_legacy_load``. Torch allocates the sizes that the pickle
claims before it reads any storage. Therefore their sum is compared with the length of the file first.
"""

from __future__ import annotations

import mmap
from typing import Any

from dist_export.formats.pickle_values import PickleError
from dist_export.formats.pickled_tensor import Storage
from dist_export.formats.torch_pickle import load_pickled

_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001


def load_legacy(raw: bytes | mmap.mmap) -> Any:
    """Return the object that a file of the older format describes, as :func:`find_legacy` does."""
    return find_legacy(raw)[0]


def find_legacy(raw: bytes | mmap.mmap) -> tuple[Any, int]:
    """Return the object that a file of the older format describes, and where its payload begins.

    The payload is eight bytes for each storage, then its values. It is not read. As in
    :func:`~dist_export.formats.torch_pickle.load_pickled`; objects of any class become records.

    Raises:
        PickleError: it is no such file, is damaged, or is shorter than its storages claim.
    """
    storages: dict[str, Storage] = {}

    def note(storage: Storage) -> None:
        if storages.setdefault(storage.key, storage) != storage:
            raise PickleError(f"has two storages called {storage.key[:100]!r}")

    values = []
    end = 0
    for _ in range(5):
        value, end = load_pickled(raw, note, start=end, is_any_known=True)
        values.append(value)
        if values[0] != _MAGIC or (len(values) > 1 and values[1] != _VERSION):
            raise PickleError("is no file of torch.save")
    *_, content, keys = values
    if type(keys) is not list or not all(type(key) is str and key in storages for key in keys):
        raise PickleError("has storages that no tensor asks for")
    claimed = sum(storage.num_bytes for storage in storages.values())
    if min((storage.num_bytes for storage in storages.values()), default=0) < 0 or claimed > len(raw) - end:
        raise PickleError(f"has storages of {claimed:,} bytes, and {len(raw) - end:,} bytes for them")
    return content, end
