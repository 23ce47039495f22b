"""Functions of a copied module: what their closures hold of the original becomes what the copy has in its place.

``copy.deepcopy`` takes a function as it is. A copy whose ``forward`` closes over ``self`` would compute with the original's
parameters, whatever is loaded into the copy.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable
from typing import Any


class Closures:
    """Copies functions as far as they hold something that has a counterpart. What has none is shared."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        """``find`` returns the counterpart of an object, or the object itself if it has none."""
        self._find = find
        self._made: dict[int, tuple[Any, Any]] = {}
        """id() of an object -> the object, whose id must not be used again, and what it becomes."""

    def follow(self, value: Any) -> Any:
        """Return a function, a method, a partial or a container with counterparts in it; the same object if it holds none."""
        if id(value) in self._made:
            return self._made[id(value)][1]
        found = self._find(value)
        if found is not value:
            return found
        kind = type(value)
        if kind is types.FunctionType:
            return self._follow_function(value)
        if kind not in _PARTS:
            return value
        self._made[id(value)] = (value, value)  # it may hold itself
        parts = _PARTS[kind](value)
        new = [self.follow(part) for part in parts]
        if any(one is not other for one, other in zip(parts, new, strict=True)):
            self._made[id(value)] = (value, _BUILD[kind](value, new))
        return self._made[id(value)][1]

    def _follow_function(self, value: types.FunctionType) -> Any:
        if not (value.__closure__ or value.__defaults__ or value.__kwdefaults__):
            return value
        cells = tuple(self._cell_for(cell) for cell in value.__closure__ or ())
        new = types.FunctionType(value.__code__, value.__globals__, value.__name__, None, cells or None)
        self._made[id(value)] = (value, new)  # it may close over itself
        changed = [self._fill(old, cell, value, new) for old, cell in zip(value.__closure__ or (), cells, strict=True)]
        defaults, keywords = self.follow(value.__defaults__), self.follow(value.__kwdefaults__)
        if not any(changed) and defaults is value.__defaults__ and keywords is value.__kwdefaults__:
            self._made[id(value)] = (value, value)
            return value
        new.__defaults__, new.__kwdefaults__ = defaults, keywords
        new.__dict__.update(value.__dict__)
        new.__qualname__, new.__module__, new.__doc__ = value.__qualname__, value.__module__, value.__doc__
        new.__annotations__ = value.__annotations__
        return new

    def _cell_for(self, cell: types.CellType) -> types.CellType:
        """Return the copy's cell, one for all functions that share the original's."""
        if id(cell) not in self._made:
            self._made[id(cell)] = (cell, types.CellType())
        made: types.CellType = self._made[id(cell)][1]
        return made

    def _fill(self, old: types.CellType, cell: types.CellType, function: Any, new: Any) -> bool:
        """Fill a cell of the copy, and return whether it holds something else than the original's."""
        try:
            content = old.cell_contents
        except ValueError:  # a variable that is not set yet
            return False
        cell.cell_contents = self.follow(content)
        return cell.cell_contents is not content and not (content is function and cell.cell_contents is new)


_PARTS: dict[type, Callable[[Any], list[Any]]] = {
    list: list,
    tuple: list,
    set: list,
    dict: lambda value: list(value.values()),
    OrderedDict: lambda value: list(value.values()),
    types.MethodType: lambda value: [value.__self__],
    functools.partial: lambda value: [value.func, *value.args, *value.keywords.values()],
}
_BUILD: dict[type, Callable[[Any, list[Any]], Any]] = {
    list: lambda _, parts: parts,
    tuple: lambda _, parts: tuple(parts),
    set: lambda _, parts: set(parts),
    dict: lambda value, parts: dict(zip(value, parts, strict=True)),
    OrderedDict: lambda value, parts: OrderedDict(zip(value, parts, strict=True)),
    types.MethodType: lambda value, parts: types.MethodType(value.__func__, parts[0]),
    functools.partial: lambda value, parts: functools.partial(
        parts[0],
        *parts[1 : 1 + len(value.args)],
        **dict(zip(value.keywords, parts[1 + len(value.args) :], strict=True)),
    ),
}
