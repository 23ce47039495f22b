"""Put lookups in the place of the tables of a sparse arch, for the time of a trace. The arch is the caller's own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dist_export.archive.lookup_operator import look_up
from dist_export.checkpoint.model_weights import plain_name
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.table_names import TableNames
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import CHILD_BITS
from dist_export.humanize import few
from dist_export.model.sparse_tables import is_hash_table
from dist_export.model.unwrap import is_lazy, list_modules
from dist_export.score.table_weight import NotExportableError, TableWeight

SPARSE = "sparse_arch"
"""The sparse arch within the module that is traced."""
_ID_MASK = (1 << CHILD_BITS) - 1


class ModelTables:
    """Which modules and weights of a sparse arch are tables, and what the lookup operator takes for each."""

    def __init__(self, sparse_arch: nn.Module, finder: RowFinder, *, sparse_model_name: str, token: str) -> None:
        self._sparse_arch = sparse_arch
        self._finder = finder
        self._names = TableNames(finder, sparse_model_name)
        self._token = token
        self.modules = list_modules(sparse_arch)

    def tables_of(self, module: nn.Module, paths: list[str]) -> list[str]:
        """Return the tables that a module has by itself, by the model's names: a hash table, or weights."""
        if is_hash_table(module):
            return hash_tables_of(module, self._names.join(paths[0]))
        return [table for _, _, table in self._weights_of(module, paths)]

    def dtype_of(self, table: str) -> torch.dtype:
        """Return the dtype of a table's rows in the model, as far as the checkpoint tells."""
        return getattr(torch, DTYPES[self._finder.embedding_of(table).dtype].torch)  # type: ignore[no-any-return]

    def argument(self, table: str) -> str:
        """Return what the lookup operator takes for a table. NotExportableError if the package has no rows by its ids."""
        if not self._finder.has_table(table):
            raise NotExportableError(f"table {table!r} is not in the package")
        if self._finder.table_of(table).raw_ids is not None:
            raise NotExportableError(
                f"table {table!r} is behind a managed-collision module, which is not expressed yet"
            )
        return self._token + self._finder.written_name(table)

    def describe_computing(self) -> str:
        """Return which hash tables gave other values in the sample than the rows that they have; empty for none."""
        found = [
            f"{self._names.join(plain_name(paths[0]))} ({type(module).__name__})"
            for module, paths in self.modules
            if (learned := self._finder.learned.get(id(module))) is not None and learned.computes
        ]
        if not found:
            return ""
        return (
            f"; {few(found)}: its forward does more than look rows up, and a program has the rows alone in its place. Do that "
            "in a module of the sparse arch around the table"
        )

    @contextlib.contextmanager
    def replaced(self, row_modules: Mapping[int, list[str]]) -> Iterator[None]:
        """Within this block, tables are lookups.

        Args:
            row_modules: ``id()`` of a module that is a lookup as a whole -> its table, or its tables where it is coalesced.
        """
        scripted = [path or "itself" for path, module in self._sparse_arch.named_modules() if is_scripted(module)]
        if scripted:
            raise NotExportableError(
                f"the sparse arch is scripted by torch.jit ({scripted[0]}), which cannot be traced"
            )
        undo: list[Callable[[], None]] = []
        below: set[int] = set()
        try:
            for module, paths in self.modules:
                if id(module) in below:
                    continue
                tables = row_modules.get(id(module))
                if tables is None and is_hash_table(module):
                    tables = self.tables_of(module, paths)
                if tables is not None:
                    below.update(id(child) for child in module.modules())
                    self._replace_module(module, tables, undo)
                    continue
                self._replace_weights(module, paths, undo)
            yield
        finally:
            for step in reversed(undo):
                step()

    def _replace_module(self, module: nn.Module, tables: list[str], undo: list[Callable[[], None]]) -> None:
        arguments = [self.argument(table) for table in tables]
        dtype = self.dtype_of(tables[0])

        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            ids = ids_in(args, kwargs)
            rows = look_up(ids, arguments[0]) if len(arguments) == 1 else look_up_coalesced(ids, arguments, look_up)
            return rows if rows.dtype == dtype else rows.to(dtype)

        _put(vars(module), "forward", forward, undo)
        inside = {id(child) for child in module.modules()}
        for child, paths in self.modules:
            if id(child) not in inside:
                continue
            if not is_hash_table(child):
                self._replace_weights(child, paths, undo)
                continue
            inside.difference_update(id(one) for one in child.modules())
            for held in ("_parameters", "_buffers", "_modules"):  # so that the program holds nothing of the table
                _put(vars(child), held, {}, undo)

    def _replace_weights(self, module: nn.Module, paths: list[str], undo: list[Callable[[], None]]) -> None:
        for owner, name, table in self._weights_of(module, paths):
            weight = owner[name]
            stand_in = TableWeight(self.argument(table), table, weight, weight.dtype)
            _take(owner, name, undo)
            _put(vars(module), name, stand_in, undo)
        is_embedding = isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        if is_embedding and module._parameters.get("weight") is not None:  # noqa: SLF001 -- its own
            its = plain_name(paths[0])
            raise NotExportableError(
                f"{self._names.join(its)} is no table of the package", module=f"{SPARSE}.{paths[0]}"
            )

    def _weights_of(self, module: nn.Module, paths: list[str]) -> list[tuple[dict[str, Any], str, str]]:
        """Return the weights of a module that are tables by their names: where they are, name, table."""
        found = []
        for owner in (module._parameters, module._buffers):  # noqa: SLF001 -- its own alone
            for name, tensor in owner.items():
                if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or tensor.dim() != 2:
                    continue
                its = [f"{path}.{name}".removeprefix(".") for path in paths] + (paths if name == "weight" else [])
                table = next((known for known in (self._names.find(path) for path in its if path) if known), None)
                if table is not None:
                    found.append((owner, name, table))
        return found


def is_scripted(module: nn.Module) -> bool:
    """Whether a module is code of TorchScript."""
    return isinstance(module, torch.jit.ScriptModule)


def hash_tables_of(module: Any, path: str) -> list[str]:
    """Return the table of a hash table module; of a coalesced one all its children, in order."""
    children = list(getattr(module, "children_hashtable", None) or [])
    if getattr(module, "coalesce", len(children) > 1) and children:
        return children
    name = getattr(module, "name", None)
    name = name if isinstance(name, str) else getattr(module, "_name", None)
    if not isinstance(name, str):
        raise NotExportableError(f"the hash table at {path} has no name")
    return [name]


def ids_in(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the ids that a table is called with."""
    ids = args[0] if args else kwargs.get("ids", kwargs.get("input"))
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point():
        raise NotExportableError(f"a table was called with {type(ids).__name__} in the place of its ids")
    return ids


def look_up_coalesced(
    ids: torch.Tensor, tables: list[str], look: Callable[[torch.Tensor, str], torch.Tensor]
) -> torch.Tensor:
    """Look ids of a coalesced table up, by ``look(ids, table)``: the bits from 52 on are the number of the child."""
    child = (ids >> CHILD_BITS) & ((1 << (64 - CHILD_BITS)) - 1)
    own = ids & _ID_MASK
    rows = look(torch.where(child == 0, own, 0), tables[0])
    for number, table in enumerate(tables[1:], start=1):
        is_its = child == number
        its = look(torch.where(is_its, own, 0), table)
        rows = torch.where(is_its.reshape(*is_its.shape, *[1] * (rows.dim() - ids.dim())), its, rows)
    return rows


def _put(place: dict[str, Any], name: str, value: Any, undo: list[Callable[[], None]]) -> None:
    missing = object()
    before = place.get(name, missing)
    place[name] = value
    undo.append(lambda: place.pop(name) if before is missing else place.__setitem__(name, before))


def _take(place: dict[str, Any], name: str, undo: list[Callable[[], None]]) -> None:
    """Take an entry out. It comes back to its place among the others, for their order is that of ``parameters()``."""
    before = dict(place)
    del place[name]

    def put_back() -> None:
        place.clear()
        place.update(before)

    undo.append(put_back)
