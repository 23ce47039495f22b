"""Run torchrec's managed-collision modules in the sample with the checkpoint's raw ids.

A module maps raw ids to rows of an embedding, but the package stores rows by raw id. Therefore the modules get the state of
the checkpoint for one run, and an embedding that looks up a row gets the row of the raw id that the state maps to it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from dist_export.checkpoint.managed_collisions import IDENTITIES, MAPPING, SORTED_IDS, find_table
from dist_export.checkpoint.metadata import TableMeta
from dist_export.errors import ModelError

SETTING = "allow_hashed_ids"


class RawIdState(NamedTuple):
    """The row of each raw id, in the state of one managed-collision module of the checkpoint."""

    ids: np.ndarray
    """int64, (rows,)."""
    rows: np.ndarray | None
    """int64, (rows,): the row of each of ``ids``; None if entry i belongs to row i."""
    empty: int

    def ids_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the raw id of each row (int64, (n,)); ``empty`` for a row without one."""
        if self.rows is None:
            its: np.ndarray = self.ids[rows]
            return its
        entries = np.flatnonzero(np.isin(self.rows, rows))
        found = np.full(len(rows), self.empty, np.int64)
        order = np.argsort(rows)
        found[order[np.searchsorted(rows, self.rows[entries], sorter=order)]] = self.ids[entries]
        return found


class IdLookups:
    """Corrects the lookups of a HashZCH module. Serving looks up ids only, and never gives an id the row of another one.

    The module's answers become those of serving: the slot that an id owns. An id that owns none gets a slot without an id,
    or, if every slot has an id, the number after the last slot.
    """

    def __init__(self, state: RawIdState, *, is_kept: bool, count: Callable[[int, bool], None]) -> None:
        """Take a state of HashZCH.

        Args:
            state: the slot of each id.
            is_kept: whether the module's answers are kept, and unknown ids are only counted.
            count: called with the number of new unknown ids, and with whether any id got the row of another one.
        """
        self._ids, self._empty = state.ids, state.empty
        self._order = np.argsort(state.ids, kind="stable")
        free = np.flatnonzero(state.ids == state.empty)
        self._free = int(free[-1]) if len(free) else len(state.ids)
        self._is_kept = is_kept
        self._count = count
        self._unknown = np.zeros(0, np.int64)
        self.is_counted = False
        """Whether unknown ids of a lookup were counted here, so that no other code needs to."""

    def after_lookup(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Change the module's answer in place: a tensor of slots, or a mapping to objects with ``values()``."""
        asked = args[0] if args else kwargs.get("features")
        pairs = [(asked, output)]
        if isinstance(asked, Mapping) and isinstance(output, Mapping):
            pairs = [(asked[name].values(), output[name].values()) for name in asked if name in output]
        for ids, slots in pairs:
            # with disable_fallback an unknown id gets no slot, so no id gets a row of another one
            if isinstance(ids, torch.Tensor) and isinstance(slots, torch.Tensor) and ids.shape == slots.shape:
                self._take(ids, slots)

    def _take(self, ids: torch.Tensor, slots: torch.Tensor) -> None:
        wanted, given = (its.detach().reshape(-1).to("cpu", torch.int64).numpy() for its in (ids, slots))
        if not len(wanted) or not len(self._ids):
            return
        positions = np.minimum(np.searchsorted(self._ids, wanted, sorter=self._order), len(self._ids) - 1)
        own = self._order[positions]
        is_known = (self._ids[own] == wanted) & (wanted != self._empty)
        own = np.where(is_known, own, self._free)
        owner = self._ids[np.clip(given, 0, len(self._ids) - 1)]
        gets_other = (own != given) & (is_known | (owner != self._empty))
        new = np.setdiff1d(wanted[~is_known], self._unknown)
        self._unknown = np.union1d(self._unknown, new)
        self.is_counted = True
        self._count(len(new), bool(gets_other.any()))
        if not self._is_kept:
            slots.detach().copy_(torch.from_numpy(own).reshape(slots.shape))


class FurtherRow:
    """Adds one row to an embedding for one lookup: its weight becomes the rows that are looked up, and that row."""

    def __init__(self, module: nn.Embedding | nn.EmbeddingBag) -> None:
        self._module = module
        self._before: tuple[nn.Parameter, int | None] | None = None

    def put(self, ids: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
        """Make ``row`` ((dim,)) the row after the last one in the next lookup; return the ids to use instead of ``ids``."""
        module = self._module
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        positions: torch.Tensor
        asked, positions = torch.unique(ids, return_inverse=True)
        rows = [weight.detach()[asked[:-1]], row.to(weight)[None]]  # ids are sorted, so the further row is the last
        self._before = weight, module.padding_idx
        module.weight = nn.Parameter(torch.cat(rows), requires_grad=False)
        padding = [] if module.padding_idx is None else torch.nonzero(asked == module.padding_idx).flatten().tolist()
        module.padding_idx = padding[0] if padding else None
        return positions.to(ids.dtype)

    def take_back(self, *_: Any) -> None:
        """Restore the embedding after the lookup, also after a failed one."""
        if self._before is not None:
            self._module.weight, self._module.padding_idx = self._before
            self._before = None


def read_raw_ids(table: TableMeta) -> RawIdState | None:
    """Return the raw ids that the checkpoint has for a table; None if its rows are not found by raw id."""
    if table.raw_ids is None:
        return None
    ids, rows = table.raw_ids.load()
    return RawIdState(ids, rows, table.raw_ids.empty)


def is_collision_module(module: nn.Module) -> bool:
    """Return whether a module maps raw ids to rows of a table."""
    return any(isinstance(getattr(module, name, None), torch.Tensor) for name in (SORTED_IDS, IDENTITIES))


def names_of_map(module: nn.Module) -> list[str]:
    """Return the names, within a managed-collision module, of what maps raw ids to rows and is in its state_dict."""
    hidden = module._non_persistent_buffers_set  # noqa: SLF001 -- torch has no public way to ask
    names = (name for name in (SORTED_IDS, MAPPING, IDENTITIES) if name not in hidden)
    return [name for name in names if isinstance(getattr(module, name, None), torch.Tensor)]


def find_mapped(path: str, tables: Collection[str], mapped: Collection[str]) -> str | None:
    """Return the table of a module at ``path`` if it is one of ``mapped``, those of which the checkpoint knows raw ids."""
    table = find_table(path, tables) or find_table(path, mapped)
    return table if table in mapped else None


def put_state(module: nn.Module, path: str, state: RawIdState, undo: list[Callable[[], None]]) -> None:
    """Give a module the checkpoint's state; append to ``undo`` a function that restores its own.

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
    if state.rows is not None:  # a checkpoint has one shard after the other, but a whole module searches sorted ids
        order = np.argsort(state.ids, kind="stable")
        values = [state.ids[order], state.rows[order]]
    for tensor, value in zip(tensors, values, strict=True):
        undo.append(_put(tensor.detach(), torch.from_numpy(value)))


def _put(held: torch.Tensor, value: torch.Tensor) -> Callable[[], None]:
    """Write a value into a tensor; return a function that restores the tensor."""
    before = held.clone()
    held.copy_(value.reshape(held.shape))

    def put_back() -> None:
        held.copy_(before)

    return put_back


def say_changed_ids(module: nn.Module) -> str:
    """Return how a managed-collision module changes ids before the lookup; empty if it does not."""
    own: Any = module
    if getattr(own, "_input_hash_func", None) is not None:
        return "hashes ids with its input_hash_func"
    if getattr(getattr(own, "input_mapper", None), "_inference_dispatch_div_train_world_size", False):
        return "divides ids (inference_dispatch_div_train_world_size)"
    return ""


def refuse_hashed_ids(model: nn.Module, tables: Sequence[TableMeta], allowed: Sequence[str]) -> None:
    """Refuse tables whose module changes ids before the lookup, because then the package's ids are no raw ids.

    Raises:
        ModelError: there is such a table, and no pattern of ``allowed`` matches it.
    """
    by_name: Mapping[str, TableMeta] = {t.name_in_source: t for t in tables if t.raw_ids is not None}
    for path, module in model.named_modules():
        name = find_table(path, by_name) if is_collision_module(module) else None
        if name is None or any(fnmatchcase(name, pattern) for pattern in allowed):
            continue
        what = say_changed_ids(module)
        if not what:
            continue
        raise ModelError(
            f"table {name!r}: {path} {what} before it looks for them, so the ids in the package would be no raw ids, and serving "
            f"must change ids in the same way. If it does, set {SETTING}: [{name!r}]"
        )
