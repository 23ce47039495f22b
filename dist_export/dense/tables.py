"""Give the model's embedding tables the checkpoint's rows for one forward, and put back what was there before.

A pre-hook on each table inserts, just before a lookup, the rows of the ids that it is about to look up. A table is a
module with the surface of RecIS's HashTable (``ids()``, ``insert(ids, embeddings)``, ``forward(ids)``), or an
``nn.Embedding`` or ``nn.EmbeddingBag``, which the checkpoint knows by its path within the model.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.plain_copy import WRAPPER_ELEMENTS, unwrap
from dist_export.dense.rows import RowFinder
from dist_export.errors import ModelError
from dist_export.layout.dtypes import DTYPES
from dist_export.layout.recis import CHILD_BITS

_ID_MASK = (1 << CHILD_BITS) - 1


class SampleRows:
    """Counts the ids that a sample looked up, by table."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        self.unknown_tables: list[str] = []


@contextlib.contextmanager
def checkpoint_rows(
    sparse_arch: nn.Module, *, sparse_model_name: str, finder: RowFinder, counts: SampleRows
) -> Iterator[None]:
    """Within this block, lookups in the sparse arch give the checkpoint's rows. Every rank for its own tables.

    Rows that the checkpoint overwrote are put back afterwards; rows that were not in a hash table before stay, for its
    surface has no way to take them out.

    Raises:
        ModelError: a hash table that the checkpoint does not have, or with rows of another width.
    """
    feeds: list[_Feed] = []
    handles = []
    try:
        for path, wrapped in sparse_arch.named_modules():
            module = unwrap(wrapped)
            if callable(getattr(module, "ids", None)) and callable(getattr(module, "insert", None)):
                feed: _Feed = _HashFeed(module, path, finder, counts)
            elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
                elements = [
                    e for e in (*sparse_model_name.split("."), *path.split(".")) if e not in ("", *WRAPPER_ELEMENTS)
                ]
                name = ".".join(elements)
                if not finder.has_table(name):
                    counts.unknown_tables.append(name)
                    continue
                feed = _WeightFeed(module, name, finder, counts)
            else:
                continue
            feeds.append(feed)
            handles.append(module.register_forward_pre_hook(feed.before_lookup, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for feed in feeds:
                feed.restore()


class _Feed:
    """What both kinds of table share: which ids were fed already, and the rows to put back."""

    def __init__(self, module: nn.Module, finder: RowFinder, counts: SampleRows) -> None:
        self._module = module
        self._finder = finder
        self._counts = counts
        self._fed = np.zeros(0, np.int64)
        self._overwritten: list[tuple[torch.Tensor, torch.Tensor]] = []

    def before_lookup(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("ids", kwargs.get("input"))
        if not isinstance(ids, torch.Tensor):
            raise ModelError(
                f"{type(self._module).__name__} was called with {type(ids).__name__} in the place of its ids; the export "
                "feeds tables that look up a tensor of ids"
            )
        asked = np.unique(ids.detach().reshape(-1).to("cpu", torch.int64).numpy())
        new = np.setdiff1d(asked, self._fed, assume_unique=True)
        self._fed = np.union1d(self._fed, new)
        if len(new):
            with torch.no_grad():
                self.feed(new)

    def feed(self, ids: np.ndarray) -> None:
        raise NotImplementedError

    def restore(self) -> None:
        raise NotImplementedError

    def rows_of(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """Return the ids of the table that the checkpoint holds, and their rows in the checkpoint's dtype."""
        has_row, rows = self._finder.find(table, ids)
        self._counts.asked[table] += len(ids)
        self._counts.missing[table] += int(np.count_nonzero(~has_row))
        slot = self._finder.embedding_of(table)
        dtype = getattr(torch, DTYPES[slot.dtype].torch)
        found = torch.from_numpy(rows[has_row].reshape(-1)).view(dtype)
        return ids[has_row], found.reshape(-1, *slot.inner_shape)


class _HashFeed(_Feed):
    """Feeds a hash table through ``insert``."""

    def __init__(self, module: nn.Module, path: str, finder: RowFinder, counts: SampleRows) -> None:
        super().__init__(module, finder, counts)
        children = list(getattr(module, "children_hashtable", None) or [])
        is_coalesced = getattr(module, "coalesce", getattr(module, "coalesced", len(children) > 1))
        self._children = children if is_coalesced and children else None
        names = self._children or [_name_of(module, path)]
        for name in names:
            if not finder.has_table(name):
                raise ModelError(
                    f"the model's table {name!r} ({path}) is not in the checkpoint, which has "
                    f"{', '.join(finder.table_names()) or 'none'}"
                )
        self._names = names

    def feed(self, ids: np.ndarray) -> None:
        if self._children is None:
            self._insert(*self.rows_of(self._names[0], ids))
            return
        child_of_id = (ids.view(np.uint64) >> np.uint64(CHILD_BITS)).astype(np.int64)
        for child in np.unique(child_of_id).tolist():
            if child >= len(self._children):
                raise ModelError(
                    f"a coalesced table was asked for child {child}, but has {len(self._children)}: {self._children}"
                )
            bare = np.sort(ids[child_of_id == child] & _ID_MASK)
            held, rows = self.rows_of(self._children[child], bare)
            self._insert(held | np.uint64(child << CHILD_BITS).astype(np.int64), rows)

    def _insert(self, held: np.ndarray, rows: torch.Tensor) -> None:
        if not len(held):
            return
        module: Any = self._module
        live = module.ids()
        device = live.device
        ids = torch.from_numpy(np.ascontiguousarray(held)).to(device)
        is_live = torch.isin(ids, live.reshape(-1))
        if bool(is_live.any()):
            known = ids[is_live]
            # forward, not __call__: our own hook must not run again
            self._overwritten.append((known, module.forward(known).detach().clone()))
        module.insert(ids, rows.to(device))

    def restore(self) -> None:
        module: Any = self._module
        for ids, rows in reversed(self._overwritten):
            module.insert(ids, rows.to(ids.device))
        self._overwritten.clear()


class _WeightFeed(_Feed):
    """Feeds an ``nn.Embedding`` or ``nn.EmbeddingBag``: an id is a row of its weight."""

    def __init__(
        self, module: nn.Embedding | nn.EmbeddingBag, table: str, finder: RowFinder, counts: SampleRows
    ) -> None:
        super().__init__(module, finder, counts)
        self._table = table
        slot = finder.embedding_of(table)
        if slot.inner_shape != (module.embedding_dim,):
            raise ModelError(
                f"table {table!r} has rows of {list(slot.inner_shape)} in the checkpoint, the model has {module.embedding_dim}"
            )
        self._weight = module.weight

    def feed(self, ids: np.ndarray) -> None:
        ids = ids[(ids >= 0) & (ids < len(self._weight))]  # the module itself complains about the others
        held, rows = self.rows_of(self._table, ids)
        index = torch.from_numpy(held).to(self._weight.device)
        self._overwritten.append((index, self._weight.detach()[index].clone()))
        self._weight.detach()[index] = rows.to(self._weight)

    def restore(self) -> None:
        for index, rows in reversed(self._overwritten):
            self._weight.detach()[index] = rows
        self._overwritten.clear()


def _name_of(module: Any, path: str) -> str:
    name = getattr(module, "name", None)
    if not isinstance(name, str):
        name = getattr(module, "_name", None)
    if not isinstance(name, str):
        raise ModelError(f"the table at {path} has neither a name nor a _name, so its rows cannot be found")
    return name
