"""What the caller's model says of its tables' dimensions: to hold sources against it that do not state them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from torch import nn

from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS

_CONFIGS = ("embedding_bag_configs", "embedding_configs")
"""Methods of torchrec's collections, sharded or not, that return one config a table."""


def find_model_dims(model: nn.Module, *, sparse_model_name: str) -> dict[str, frozenset[int]]:
    """Return the dimensions of the tables in the sparse arch (in the whole model where it has none), by the table's name.

    A table goes by its own name, and by that behind the path of its collection as dynamicemb writes it
    (``model.<path>.<table>``). Several tables of one name may have several dimensions. Every rank for itself; of a sharded
    collection each rank knows all tables.
    """
    prefix = sparse_model_name
    try:
        root = model.get_submodule(sparse_model_name)
    except AttributeError:  # what needs the sparse arch says that it is missing
        root, prefix = model, ""
    found: dict[str, set[int]] = {}
    for path, name, dim in _list_tables(root, prefix):
        for known in (name, f"model.{path}.{name}" if path else f"model.{name}"):
            found.setdefault(known, set()).add(dim)
    return {name: frozenset(dims) for name, dims in found.items()}


def _list_tables(root: nn.Module, prefix: str) -> Iterator[tuple[str, str, int]]:
    """Yield path of the collection, name and dimension of each table: of configs, and of modules with an ``embedding_dim``."""
    for inner, module in root.named_modules(remove_duplicate=False):
        elements = [element for element in f"{prefix}.{inner}".split(".") if element not in (*WRAPPER_ELEMENTS, "")]
        path = ".".join(elements)
        for config in _configs_of(module):
            name, dim = getattr(config, "name", None), getattr(config, "embedding_dim", None)
            if isinstance(name, str) and _is_dim(dim):
                yield path, name, dim
        dim = module.__dict__.get("embedding_dim")
        if not _is_dim(dim):
            continue
        own = next((its for its in (getattr(module, n, None) for n in ("name", "_name")) if isinstance(its, str)), None)
        for name in {own, elements[-1] if elements else None} - {None}:
            yield ".".join(elements[:-1]), str(name), dim


def _configs_of(module: nn.Module) -> list[Any]:
    for name in _CONFIGS:
        configs = getattr(module, name, None)
        configs = configs() if callable(configs) else configs
        if isinstance(configs, (list, tuple)):
            return list(configs)
    return []


def _is_dim(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
