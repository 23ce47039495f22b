"""Which parameters and buffers of a hash table module are its rows and ids, and no values beside them."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.row_lookup import RowFinder
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import CHILD_BITS

_VALUE = 0.4375
"""Of each new row. No table has it from its constructor."""


def written_by_insert(
    module: nn.Module, tables: Collection[str], finder: RowFinder, names: Collection[str]
) -> frozenset[str]:
    """Return those of ``names``, within a hash table module, that ``insert`` changes. Any rank, for itself.

    A copy of the module takes one row. Of a module that is larger than the memory budget, cannot be copied or takes no row,
    nothing is known, and all of ``names`` count as values.

    Args:
        module: the hash table.
        tables: the names of its tables; the first one takes the row.
        finder: of the checkpoint.
        names: of parameters and buffers.
    """
    saved = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in saved.values())
    table = next(iter(tables), None)
    if table is None or num_bytes > finder.max_memory_bytes or table not in finder.exported_names():
        return frozenset()
    slot = finder.embedding_of(table)
    try:
        twin: Any = copy.deepcopy(module)
        before = _values_of(twin)
        ids = twin.ids().reshape(-1)
        free = np.setdiff1d(np.arange(len(ids) + 1), ids.cpu().numpy() & ((1 << CHILD_BITS) - 1))
        rows = torch.full((1, *slot.inner_shape), _VALUE, dtype=getattr(torch, DTYPES[slot.dtype].torch))
        twin.insert(torch.from_numpy(free[:1]).to(ids.device), rows.to(ids.device))
        after = _values_of(twin)
    except Exception:  # noqa: BLE001 -- whatever it is, nothing is known then, and no value is missed
        return frozenset()
    return frozenset(name for name in names if not _is_same(before.get(name), after.get(name)))


def _values_of(module: nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in (*module.named_parameters(), *module.named_buffers())}


def _is_same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(((one == other) | ((one != one) & (other != other))).all())  # noqa: PLR0124
