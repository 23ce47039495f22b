"""The blocks that the dense arch gets: a mapping in the sparse arch's own order and type, filled with other tensors.

A dense arch may depend on the order of the mapping (it concatenates ``blocks.values()``), on its type, and on entries that
are no tensors. So the mapping is copied and filled anew for each run, and only the program's keyword arguments, one for
each tensor, are sorted by name.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.errors import ModelError

NUMBERS_AND_TEXTS = (bool, int, float, complex, str, bytes, np.generic)
WITHOUT_VALUES = (type(None), enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
_CONSTANTS = (*NUMBERS_AND_TEXTS, *WITHOUT_VALUES)


@dataclass(frozen=True, slots=True)
class Outline:
    """What must be the same for every batch and rank: a few strings, which travel between ranks."""

    num_rows: int | None
    """Size of the batch; None where no tensor has a dimension."""
    order: tuple[str, ...]
    """The tensors' names in the order in which the dense arch gets them."""
    constants: dict[str, str]
    """Place of each entry that is no tensor -> how Python writes it."""


@dataclass(frozen=True, slots=True)
class _Leaf:
    name: str


@dataclass(frozen=True, slots=True)
class _Constant:
    value: Any


@dataclass(frozen=True, slots=True)
class _Sequence:
    kind: Callable[[list[Any]], Any]
    items: tuple[_Entry, ...]


@dataclass(frozen=True, slots=True)
class _Mapping:
    template: Mapping[Any, Any]
    items: tuple[tuple[Any, _Entry], ...]
    refill: Callable[[Any, list[tuple[Any, Any]]], Any]


_Entry = _Leaf | _Constant | _Sequence | _Mapping


@dataclass(frozen=True, slots=True)
class Blocks:
    """One mapping of blocks. :func:`read_blocks` makes it."""

    tensors: dict[str, torch.Tensor]
    """By the name of the program's argument, in the order in which the dense arch gets them."""
    constants: dict[str, str]
    """As :class:`Outline` has them."""
    notes: tuple[str, ...]
    """Of mappings whose type the dense arch does not get."""
    _form: _Mapping

    def fill(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return a new mapping of the same order, type and constants with these tensors in it."""
        return _build(self._form, tensors)

    def with_tensors(self, tensors: Mapping[str, torch.Tensor]) -> Blocks:
        """Return the same blocks with other tensors; their order stays."""
        return dataclasses.replace(self, tensors={name: tensors[name] for name in self.tensors})

    def in_order(self, order: Sequence[str]) -> Blocks:
        """Return the same blocks with their entries in the order of these names, which are those of all tensors."""
        form = _reorder(self._form, {name: place for place, name in enumerate(order)})
        return dataclasses.replace(self, tensors={name: self.tensors[name] for name in order}, _form=form)

    def outline(self) -> Outline:
        """Return what must be the same for every batch."""
        sizes = [tensor.shape[0] for tensor in self.tensors.values() if tensor.dim()]
        return Outline(sizes[0] if sizes else None, tuple(self.tensors), self.constants)


def read_blocks(mapping: Mapping[Any, Any]) -> Blocks:
    """Look at what the sparse arch gave. Entries are tensors, constants, or tuples, lists and mappings of those.

    A tensor within an entry is named by the path to it (``seq`` -> ``seq_0``, ``seq_1``).

    Raises:
        ModelError: no entry holds a tensor; an entry is of another kind; the mapping has a tensor of its own beside its
            entries, which would become a constant of the program.
    """
    reader = _Reader(mapping)
    form = reader.read_mapping(mapping, ())
    if not reader.tensors:
        given = ", ".join(f"{name!r} as {type(value).__name__}" for name, value in list(mapping.items())[:5])
        raise ModelError(f"the sparse arch gives no tensor: {given}; a dense input is a tensor")
    own: dict[str, str] = {}
    filled = _build(form, reader.tensors)
    _look_beside(filled, reader.tensors, own)
    return Blocks(reader.tensors, reader.constants | own, tuple(reader.notes), form)


class _Reader:
    """Goes through the entries, and names the tensors in them."""

    def __init__(self, root: Mapping[Any, Any]) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.constants: dict[str, str] = {}
        self.notes: list[str] = []
        self._taken = {name for name, value in root.items() if isinstance(value, torch.Tensor)}
        """Names of the root's own tensors, which those within entries must not take."""
        self._open: set[int] = set()

    def read_mapping(self, mapping: Mapping[Any, Any], path: tuple[Any, ...]) -> _Mapping:
        entries = [(key, self._read(value, (*path, key))) for key, value in mapping.items()]
        refill = _find_refill(mapping)
        if refill is None:
            refill = _as_dict
            what = f"its entry {_place(path)!r}" if path else "its blocks"
            self.notes.append(
                f"the sparse arch gives {what} as {_article(type(mapping).__name__)}, which cannot be copied and filled: the "
                "dense arch gets a dict in the same order"
            )
        own = refill(mapping, list(mapping.items()))  # the sparse arch may use its mapping again
        return _Mapping(own, tuple(entries), refill)

    def _read(self, value: Any, path: tuple[Any, ...]) -> _Entry:
        place = _place(path)
        if isinstance(value, torch.Tensor):
            if value.layout != torch.strided or value.is_nested:
                raise ModelError(f"the sparse arch gives {place!r} as a sparse or nested tensor; give a dense one")
            name = self._name(path)
            self.tensors[name] = value
            return _Leaf(name)
        if isinstance(value, _CONSTANTS):
            self.constants[place] = repr(value)
            return _Constant(value)
        is_sequence = type(value) in (list, tuple, torch.Size) or (
            isinstance(value, tuple) and hasattr(value, "_fields")
        )
        if not is_sequence and not isinstance(value, Mapping):
            raise ModelError(
                f"the sparse arch gives {place!r} as {type(value).__name__}; a dense input is a tensor. Numbers, strings, None "
                "and tuples, lists and dicts of these are taken as constants of the program"
            )
        if id(value) in self._open:
            raise ModelError(f"the sparse arch gives {place!r}, which holds itself; a dense input is a tensor")
        self._open.add(id(value))
        try:
            if isinstance(value, Mapping):
                return self.read_mapping(value, path)
            kind = type(value)._make if hasattr(value, "_fields") else type(value)
            return _Sequence(kind, tuple(self._read(item, (*path, number)) for number, item in enumerate(value)))
        finally:
            self._open.discard(id(value))

    def _name(self, path: tuple[Any, ...]) -> Any:
        if len(path) == 1:
            return path[0]  # as it is: whether it can be an argument is another question
        name = "_".join(map(str, path))
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _place(path: tuple[Any, ...]) -> str:
    """Return how the place of an entry is written: the block's name, and what leads to it from there."""
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def _article(name: str) -> str:
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def _build(entry: _Entry, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(entry, _Leaf):
        return tensors[entry.name]
    if isinstance(entry, _Constant):
        return entry.value
    if isinstance(entry, _Sequence):
        return entry.kind([_build(item, tensors) for item in entry.items])
    return entry.refill(entry.template, [(key, _build(item, tensors)) for key, item in entry.items])


# ---- copies of mappings -------------------------------------------------------------------------------------------


def _as_dict(_: Mapping[Any, Any], items: list[tuple[Any, Any]]) -> Any:
    return dict(items)


def _as_proxy(template: Any, items: list[tuple[Any, Any]]) -> Any:
    """Fill a copy of what lies under a read-only view, which has no copy itself."""
    return types.MappingProxyType(_as_copy(template.copy(), items))


def _as_copy(template: Any, items: list[tuple[Any, Any]]) -> Any:
    copied = copy.copy(template)
    for key, value in items:
        copied[key] = value
    return copied


def _as_deep_copy(template: Any, items: list[tuple[Any, Any]]) -> Any:
    """For a mapping that shares its inside with its copies, or that has no way to set an entry."""
    return copy.deepcopy(template, {id(template[key]): value for key, value in items})


def _find_refill(template: Mapping[Any, Any]) -> Callable[[Any, list[tuple[Any, Any]]], Any] | None:
    """Return how a mapping is copied and filled so that its type and order stay; None where there is no way."""
    if type(template) is dict:
        return _as_dict
    for refill in (_as_proxy,) if isinstance(template, types.MappingProxyType) else (_as_copy, _as_deep_copy):
        before = list(template.items())
        # other objects than the template's, so that an entry that was not replaced shows
        items = [(key, value.detach() if isinstance(value, torch.Tensor) else value) for key, value in before]
        try:
            filled = refill(template, items)
            is_same = type(filled) is type(template) and _is_as_filled(filled, items)
        except Exception:  # noqa: BLE001 -- a foreign class may raise anything; then it is tried in another way
            is_same = False
        if list(map(_identity, template.items())) != list(map(_identity, before)):
            is_same = False
            if refill is _as_copy and hasattr(
                template, "__setitem__"
            ):  # its copies write into it: put back what was there
                for key, value in before:
                    template[key] = value
        if is_same:
            return refill
    return None


def _is_as_filled(filled: Any, items: list[tuple[Any, Any]]) -> bool:
    wanted = list(map(_identity, items))
    by_key = [(key, id(filled[key])) for key, _ in items]
    return (
        list(map(_identity, filled.items())) == wanted == by_key
        and list(filled) == [key for key, _ in items]
        and [id(value) for value in filled.values()] == [number for _, number in wanted]
    )


def _identity(item: tuple[Any, Any]) -> tuple[Any, int]:
    return item[0], id(item[1])


def _look_beside(filled: Any, tensors: Mapping[str, torch.Tensor], constants: dict[str, str]) -> None:
    """Look at the attributes of a mapping: tensors there are refused, and constants noted in ``constants``."""
    known = {id(tensor) for tensor in tensors.values()}
    seen: set[int] = set()
    keys: set[Any] = set()

    def look(value: Any, path: str) -> None:
        if id(value) in known or id(value) in seen:
            return
        if isinstance(value, torch.Tensor):
            raise ModelError(
                f"the sparse arch gives its blocks as {_article(type(filled).__name__)} with a tensor in {path}, beside its "
                "entries; it would become a constant of the program. Give it as a block"
            )
        if isinstance(value, _CONSTANTS):
            if not (isinstance(value, str) and value in keys):  # some keep a list of their keys
                constants[path] = repr(value)
            return
        seen.add(id(value))
        for name, inner in _inside(value):
            look(inner, f"{path}{name}")

    for mapping in _mappings_in(filled):
        entries, keys = {id(value) for value in mapping.values()}, set(mapping)
        for name, value in getattr(mapping, "__dict__", {}).items():
            # a wrapper such as UserDict keeps its entries in an attribute
            if not (isinstance(value, Mapping) and entries and {id(item) for item in value.values()} == entries):
                look(value, f"its attribute {name}")


def _inside(value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, frozenset)):
        return [(f"[{place}]", item) for place, item in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, nn.Module)):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return []


def _mappings_in(value: Any) -> Iterator[Mapping[Any, Any]]:
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from _mappings_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _mappings_in(item)


# ---- another order ------------------------------------------------------------------------------------------------


def _reorder(form: _Mapping, positions: Mapping[str, int]) -> _Mapping:
    """Return the form with the entries of every mapping by the place of their first tensor; others stay behind theirs."""
    ranked: list[tuple[int, tuple[Any, _Entry]]] = []
    last = -1
    for key, item in form.items:
        names = list(_leaves(item))
        last = min(positions[name] for name in names) if names else last
        ranked.append((last, (key, _reorder(item, positions) if isinstance(item, _Mapping) else item)))
    items = tuple(item for _, item in sorted(ranked, key=lambda pair: pair[0]))
    return _Mapping(form.template, items, _reordered(form.refill))


def _reordered(refill: Callable[[Any, list[tuple[Any, Any]]], Any]) -> Callable[[Any, list[tuple[Any, Any]]], Any]:
    if refill not in (_as_copy, _as_proxy):  # a copy that shares its inside must not be emptied
        return _as_dict

    def fill(template: Any, items: list[tuple[Any, Any]]) -> Any:
        empty_tables = template.copy() if refill is _as_proxy else copy.copy(template)
        try:
            empty_tables.clear()
            filled = _as_copy(empty_tables, items)
        except Exception:  # noqa: BLE001 -- a class that cannot be emptied: the order is what matters here
            return dict(items)
        if not _is_as_filled(filled, items):
            return dict(items)
        return types.MappingProxyType(filled) if refill is _as_proxy else filled

    return fill


def _leaves(entry: _Entry) -> Iterator[str]:
    if isinstance(entry, _Leaf):
        yield entry.name
    elif isinstance(entry, _Sequence):
        for item in entry.items:
            yield from _leaves(item)
    elif isinstance(entry, _Mapping):
        for _, item in entry.items:
            yield from _leaves(item)
