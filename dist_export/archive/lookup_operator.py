"""The operator ``dist_export::lookup(Tensor ids, str table) -> Tensor``, by which an exported program reads rows of a table.

A program in a file has the table's name in the package. Loading binds each call to the package that was opened: the name then
begins with a token of that package, so that two packages with the same table names can be used in one process.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from dist_export.errors import PackageError

if TYPE_CHECKING:
    from torch import fx

LOOKUP_TARGET = "dist_export.lookup.default"


class RowSource(Protocol):
    """What the operator asks for rows. Any thread may ask."""

    def describe_rows(self, table: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Return the shape and the dtype of one row. PackageError if there is no such table."""

    def find_rows(self, table: str, ids: np.ndarray) -> torch.Tensor:
        """Return the rows (n, ...) of ids (int64, (n,)) on the CPU, with the default row for out-of-vocabulary ids."""


_SOURCES: weakref.WeakValueDictionary[str, RowSource] = weakref.WeakValueDictionary()
_NUMBERS = itertools.count(1)
_MARK = "\x1f"
"""Ends a token. No table has it in its name, because names are printable."""


def register_source(source: RowSource) -> str:
    """Return a token for ``source``. It is valid as long as the object lives; the registry does not keep it alive."""
    token = f"{next(_NUMBERS)}{_MARK}"
    _SOURCES[token] = source
    return token


def bind(graph_module: fx.GraphModule, token: str) -> None:
    """Let all lookups of a graph read from the source of ``token``, whatever they read from before."""
    _rename(graph_module, lambda table: token + table)


def unbind(graph_module: fx.GraphModule) -> None:
    """Give all lookups of a graph the plain names of tables, as they stand in a file."""
    _rename(graph_module, lambda table: table)


def rename_lookups(graph_module: fx.GraphModule, names: Mapping[str, str]) -> None:
    """Give the lookups of a graph other plain names of tables: old -> new. It is bound to no package afterwards."""
    _rename(graph_module, lambda table: names[table])


def list_lookups(graph_module: fx.GraphModule) -> list[tuple[fx.Node, str]]:
    """Return the lookups of a graph, each with the plain name of its table."""
    return [(node, _table_of(str(node.args[1]))) for node in _nodes(graph_module)]


def _rename(graph_module: fx.GraphModule, name: Callable[[str], str]) -> None:
    for node, table in list_lookups(graph_module):
        node.update_arg(1, name(table))
    for module in _graph_modules(graph_module):
        module.recompile()


def _nodes(graph_module: fx.GraphModule) -> Iterator[fx.Node]:
    for module in _graph_modules(graph_module):
        for node in module.graph.nodes:
            if node.op == "call_function" and str(node.target) == LOOKUP_TARGET:
                yield node


def _graph_modules(graph_module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """Yield a graph and the graphs within it, such as those of ``torch.enable_grad`` blocks."""
    for module in graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield module


def _table_of(argument: str) -> str:
    return argument.rpartition(_MARK)[2]


def _find_source(argument: str) -> tuple[RowSource, str]:
    token, mark, table = argument.rpartition(_MARK)
    source = _SOURCES.get(token + mark)
    if source is None:
        raise PackageError(
            f"a lookup in table {table!r} belongs to no open package; load the program with Package.load_score_program(), and "
            "keep the package or the program"
        )
    return source, table


def _look_up(ids: torch.Tensor, table: str) -> torch.Tensor:
    source, name = _find_source(table)
    numbers = ids.detach().reshape(-1).to("cpu", torch.int64).numpy()
    rows = source.find_rows(name, numbers)
    return rows.reshape(*ids.shape, *rows.shape[1:]).to(ids.device)


def _fake(ids: torch.Tensor, table: str) -> torch.Tensor:
    source, name = _find_source(table)
    shape, dtype = source.describe_rows(name)
    return ids.new_empty((*ids.shape, *shape), dtype=dtype)


def _define() -> Any:
    library = torch.library.Library("dist_export", "DEF")
    library.define("lookup(Tensor ids, str table) -> Tensor")
    library.impl("lookup", _look_up, "CompositeExplicitAutograd")
    torch.library.register_fake("dist_export::lookup", _fake, lib=library)
    return library


_LIBRARY = _define()
"""Kept, because the operator goes with it."""


def look_up(ids: torch.Tensor, argument: str) -> torch.Tensor:
    """Call the operator. ``argument`` is a token and a table's name."""
    return torch.ops.dist_export.lookup(ids, argument)  # type: ignore[no-any-return]
