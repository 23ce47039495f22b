"""Find the hash tables that a module's code can reach, registered or not: in containers, objects, closures, classes, globals."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterator
from typing import Any

from torch import nn

from dist_export.dense.origins import MODULE_DICTS, held_by
from dist_export.model.sparse_tables import keeps_tables

_AS_PARAMETERS = ("torchrec.", "fbgemm_gpu.")
"""Modules of these have the rows of their tables in parameters."""
_OF_LIBRARIES = ("torch.", "builtins", *_AS_PARAMETERS)
_DEPTH = 6
"""How many containers, objects and functions within each other are looked into."""
_PLAIN = (str, bytes, int, float, type, types.ModuleType)


def keeps_rows_apart(module: Any) -> bool:
    """Whether a module is a table whose rows no state_dict has to have."""
    return (
        isinstance(module, nn.Module)
        and keeps_tables(module)
        and not type(module).__module__.startswith(_AS_PARAMETERS)
    )


def find_tables(root: nn.Module, path: str, *, skip: Collection[int] = ()) -> dict[str, nn.Module]:
    """Return such tables by their places, as ``sparse_arch.held[0]``; ``path`` is that of ``root``. A table hides what is in it.

    ``skip``: ``id()`` of modules that are not looked into, and are no result.
    """
    search = _Search(skip)
    return {place: table for place, table in search.below(root, path) if id(table) not in skip}


def name_of_table(module: Any) -> str | None:
    """Return the name that a table has, None where it tells none."""
    found = (getattr(module, attribute, None) for attribute in ("name", "_name"))
    return next((name for name in found if isinstance(name, str)), None)


def say_table(place: str, module: Any) -> str:
    """Return what a message calls a table."""
    name = name_of_table(module)
    return place if name is None else f"{place} (table {name!r})"


class _Search:
    """Looks at each object once."""

    def __init__(self, skip: Collection[int]) -> None:
        self._seen: set[int] = set(skip)
        self._kept: list[Any] = []
        """What was seen and may be made for the asking: its id must not be used again."""

    def below(self, root: nn.Module, path: str, depth: int = 0) -> Iterator[tuple[str, nn.Module]]:
        """Yield the tables of a module: registered ones first, for these have the better names."""
        inner: list[tuple[str, nn.Module]] = []
        stack = [(path, root)]
        while stack:
            place, module = stack.pop()
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            if keeps_rows_apart(module):
                yield place, module
                continue
            inner.append((place, module))
            children = [(name, child) for name, child in module._modules.items() if child is not None]  # noqa: SLF001
            stack += [(_join(place, name), child) for name, child in reversed(children)]
        for place, module in inner:
            for name, value in _attributes_of(module):
                yield from self._within(value, _join(place, name), depth)

    def _within(self, value: Any, place: str, depth: int) -> Iterator[tuple[str, nn.Module]]:
        if depth > _DEPTH or value is None or isinstance(value, _PLAIN) or id(value) in self._seen:
            return
        if isinstance(value, nn.Module):
            yield from self.below(value, place, depth + 1)
            return
        self._seen.add(id(value))
        self._kept.append(value)
        if isinstance(value, (staticmethod, classmethod)):
            yield from self._within(value.__func__, place, depth)
        elif isinstance(value, property):
            for function in (value.fget, value.fset):
                yield from self._within(function, place, depth)
        for step, item in (*held_by(value), *_globals_of(value)):
            yield from self._within(item, place + step, depth + 1)


def _attributes_of(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module of the caller's own holds besides what torch registers, and what its classes hold."""
    yield from ((name, value) for name, value in list(vars(module).items()) if name not in MODULE_DICTS)
    for kind in type(module).__mro__:
        if not kind.__module__.startswith(_OF_LIBRARIES):
            yield from ((name, value) for name, value in list(vars(kind).items()) if name != "__dict__")


def _globals_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the globals that a function of the caller's own may read."""
    if isinstance(value, types.FunctionType) and not str(value.__module__).startswith(_OF_LIBRARIES):
        names = [name for name in value.__code__.co_names if name in value.__globals__]
        yield from ((f" -> {name}", value.__globals__[name]) for name in names)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
