"""torchrec's managed-collision modules in the sample: they get what the checkpoint knows of raw ids, and tell rows by raw id.

A module maps raw ids to rows of an embedding, and what the package has is raw ids. So the modules are given the state of the
checkpoint for one run, and an embedding that is asked for a row gets the row of the raw id that the state has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dist_export.checkpoint.collisions import IDENTITIES, MAPPING, SORTED_IDS, find_table
from dist_export.checkpoint.reader import TableMeta
from dist_export.errors import ModelError

SETTING = "allow_hashed_ids"


class RawIdState(NamedTuple):
    """Which raw id has which row, by one managed-collision module of the checkpoint."""

    ids: np.ndarray
    """int64, (rows,)."""
    rows: np.ndarray | None
    """int64, (rows,): the row of each of ``ids``; None where entry i is of row i."""
    empty: int

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the raw id of each row (int64, (n,)), ``empty`` for one that has none."""
        if self.rows is None:
            its: np.ndarray = self.ids[rows]
            return its
        entries = np.flatnonzero(np.isin(self.rows, rows))
        found = np.full(len(rows), self.empty, np.int64)
        order = np.argsort(rows)
        found[order[np.searchsorted(rows, self.rows[entries], sorter=order)]] = self.ids[entries]
        return found


def read_raw_ids(table: TableMeta) -> RawIdState | None:
    """Return what the checkpoint knows of a table's raw ids; None where its rows do not go by raw id."""
    if table.raw_ids is None:
        return None
    ids, rows = table.raw_ids.load()
    return RawIdState(ids, rows, table.raw_ids.empty)


def is_collision_module(module: nn.Module) -> bool:
    """Whether a module maps raw ids to rows of a table."""
    return any(isinstance(getattr(module, name, None), torch.Tensor) for name in (SORTED_IDS, IDENTITIES))


def put_state(module: nn.Module, path: str, state: RawIdState, undo: list[Callable[[], None]]) -> None:
    """Give a module the checkpoint's state; ``undo`` gets what puts its own back.

    Raises:
        ModelError: the module has another number of rows, or is of another kind.
    """
    own: Any = module
    names = (IDENTITIES,) if state.rows is None else (SORTED_IDS, MAPPING)
    tensors: list[torch.Tensor] = [
        tensor for tensor in (getattr(own, name, None) for name in names) if isinstance(tensor, torch.Tensor)
    ]
    if len(tensors) < len(names):
        kind = "HashZCH" if state.rows is None else "MCH"
        raise ModelError(f"the model's {path} is no module of {kind}, which the checkpoint has for its table")
    if tensors[0].numel() != len(state.ids):
        raise ModelError(
            f"the model's {path} has {tensors[0].numel():,} rows, the checkpoint {len(state.ids):,}; the sample needs the "
            "whole table, so give a model that is not sharded, with as many rows"
        )
    values = [state.ids]
    if state.rows is not None:  # shards lie behind each other in a checkpoint, and a whole module searches sorted ids
        order = np.argsort(state.ids, kind="stable")
        values = [state.ids[order], state.rows[order]]
    for tensor, value in zip(tensors, values, strict=True):
        undo.append(_put(tensor.detach(), torch.from_numpy(value)))


def _put(held: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
    """Write a value into a tensor, and return what puts its own back."""
    before = held.clone()
    held.copy_(value.reshape(held.shape))

    def put_back() -> None:
        held.copy_(before)

    return put_back


def refuse_hashed_ids(model: nn.Module, tables: Sequence[TableMeta], allowed: Sequence[str]) -> None:
    """Refuse tables whose module changes ids before it looks for them, for then the package's ids are no raw ids.

    Raises:
        ModelError: there is one that no pattern of ``allowed`` matches.
    """
    by_name: Mapping[str, TableMeta] = {t.name_in_source: t for t in tables if t.raw_ids is not None}
    for path, module in model.named_modules():
        name = find_table(path, by_name) if is_collision_module(module) else None
        if name is None or any(fnmatchcase(name, pattern) for pattern in allowed):
            continue
        own: Any = module
        mapper = getattr(own, "input_mapper", None)
        if getattr(own, "_input_hash_func", None) is not None:
            what = "hashes ids with its input_hash_func"
        elif getattr(mapper, "_inference_dispatch_div_train_world_size", False):
            what = "divides ids (inference_dispatch_div_train_world_size)"
        else:
            continue
        raise ModelError(
            f"table {name!r}: {path} {what} before it looks for them, so the ids in the package would be no raw ids, and serving "
            f"must change ids in the same way. If it does, set {SETTING}: [{name!r}]"
        )
