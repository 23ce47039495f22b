"""Compute digests of Python values: two values with the same digest have the same content, also in different processes.

Numbers and texts count by value, arrays by their bytes, containers by their members, objects by their pickled state or
their attributes, functions by their closed-over values. Classes, modules and functions that can be imported count by name,
because code is not compared. An object that hides its content, such as a lock or an open file, has no digest.
"""

from __future__ import annotations

import copyreg
import logging
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import xxhash

_ATOMS = (type(None), bool, int, float, complex, str, bytes, bytearray)
_MOST_VALUES = 100_000
_UNCOUNTED = frozenset({"training"})
"""Attributes of torch's modules that do not count. The attributes that every module has, such as hooks, do not either."""


def digest_value(value: Any, *, skip: Collection[int] = ()) -> Digester:
    """Return the digester of a value, with its digest or the type that has none. ``skip`` as in :class:`Digester`."""
    digester = Digester(skip)
    digester.add(value)
    return digester


class Digester:
    """Computes one digest of several values, which are added one after the other."""

    def __init__(self, skip: Collection[int] = ()) -> None:
        """Start without values. ``skip``: ids of objects that do not count, whatever they contain."""
        self.unknown = ""
        """The type of the first value that has no digest; empty while all values have one."""
        self.has_arrays = False
        """Whether one of the values is a tensor or an array, or may hide one."""
        self._skip = frozenset(skip)
        self._hasher = xxhash.xxh3_128()
        self._seen: dict[int, int] = {}
        self._alive: list[Any] = []

    @property
    def digest(self) -> str | None:
        """The digest of all values so far; None if one of them has no digest."""
        return None if self.unknown else f"xxh3:{self._hasher.hexdigest()}"

    def add(self, value: Any) -> None:
        """Add a value, even if it is in ``skip``, with everything in it."""
        try:
            if id(value) in self._skip:
                self._add_new(value)
            else:
                self._add(value)
        except RecursionError:
            self._refuse("value that is nested too deeply")

    def add_values_of(self, function: Any, *, with_globals: bool = True) -> None:
        """Add the values of a function besides its code: closed-over values, defaults, and arrays that it reads as globals."""
        for value in (function.__defaults__, function.__kwdefaults__):
            self._add(value)
        for cell in function.__closure__ or ():
            try:
                self._add(cell.cell_contents)
            except ValueError:  # the cell is empty
                self._say("cell")
        of_torch = str(function.__globals__.get("__name__")).startswith("torch.")  # usually a decorator of torch
        for name in function.__code__.co_names if with_globals and not of_torch else ():
            value = function.__globals__.get(name)
            if _is_tensor(value) or _is_array(value) or type(value) in (list, tuple, dict):
                self._say(name)
                self._add(value)

    def _say(self, text: str) -> None:
        data = text.encode("utf-8", "surrogatepass")
        self._hasher.update(b"%d:" % len(data) + data)

    def _refuse(self, what: str) -> None:
        self.unknown = self.unknown or what

    def _add(self, value: Any) -> None:
        if id(value) in self._skip:
            self._say("skipped")
        elif type(value) in _ATOMS:
            self._say(f"{type(value).__name__} {bytes(value) if isinstance(value, bytearray) else value!r}")
        elif id(value) in self._seen:
            self._say(f"seen {self._seen[id(value)]}")
        elif len(self._alive) >= _MOST_VALUES:
            self.has_arrays = True
            self._refuse(f"value of more than {_MOST_VALUES:,} parts")
        else:
            self._seen[id(value)] = len(self._alive)
            self._alive.append(value)  # otherwise another object may get the same id
            self._add_new(value)

    def _add_new(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, (type, types.ModuleType, types.BuiltinFunctionType, types.MethodType, types.FunctionType)):
            self._add_code(value)
            return
        self._say(name_of(kind))
        if _is_tensor(value):
            self._add_tensor(value)
        elif _is_array(value):
            self._add_array(value)
        elif kind in (list, tuple):
            self._add_each(value)
        elif kind is dict:
            self._add_each([part for item in value.items() for part in item])
        elif kind in (set, frozenset):
            self._add_set(value)
        elif isinstance(value, logging.Logger):
            self._say(value.name)
        elif isinstance(value, (staticmethod, classmethod)):
            self._add(value.__func__)
        elif isinstance(value, property):
            self._add_each([value.fget, value.fset, value.fdel])
        elif _is_module(value):
            self._add_items(_values_of_module(value))
        else:
            self._add_object(value)

    def _add_each(self, values: Iterable[Any]) -> None:
        members = list(values)
        self._say(str(len(members)))
        for member in members:
            self._add(member)

    def _add_items(self, items: Mapping[str, Any]) -> None:
        self._add_each([part for item in sorted(items.items()) for part in item])

    def _add_set(self, values: Collection[Any]) -> None:
        inner = [digest_value(member, skip=self._skip) for member in values]
        for its in inner:
            self.has_arrays = self.has_arrays or its.has_arrays
            if its.unknown:
                self._refuse(its.unknown)
        self._add_each(sorted(its.digest or "" for its in inner))

    def _add_code(self, value: Any) -> None:
        self._say(name_of(value) if not isinstance(value, types.ModuleType) else value.__name__)
        if isinstance(value, (types.MethodType, types.BuiltinFunctionType)):
            owner = value.__self__
            self._add(None if isinstance(owner, types.ModuleType) else owner)
        if isinstance(value, types.MethodType):
            self._add(value.__func__)
        elif isinstance(value, types.FunctionType):
            is_local = "<" in value.__qualname__  # a lambda or an inner function, whose name does not identify it
            if is_local:
                self.add_bytecode(value.__code__)
            self.add_values_of(value, with_globals=is_local)
            self._add_items(vars(value))

    def add_bytecode(self, code: types.CodeType) -> None:
        """Add what a function does, whatever it is named and wherever it is written. It differs among versions of Python."""
        self._say(f"{code.co_code.hex()} {code.co_names}")
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self.add_bytecode(constant)
            else:
                self._add(constant)

    def _add_tensor(self, value: Any) -> None:
        import torch

        self.has_arrays = True
        plain = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
        if type(value) not in plain or value.layout != torch.strided or value.is_meta or value.is_quantized:
            self._refuse(f"{name_of(type(value))} that this process does not hold as plain numbers")
            return
        self._say(f"{value.dtype} {list(value.shape)}")
        whole = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        self._hasher.update(whole.view(torch.uint8).numpy().data if whole.numel() else b"")

    def _add_array(self, value: Any) -> None:
        self.has_arrays = True
        self._say(f"{value.dtype.descr if value.dtype.names else value.dtype.str} {value.shape}")
        if value.dtype.hasobject:
            self._add_each(value.ravel().tolist())
        else:
            self._hasher.update(value.tobytes())

    def _add_object(self, value: Any) -> None:
        kind = type(value)
        self.has_arrays = self.has_arrays or (kind.__name__ == "ScriptObject" and kind.__module__.startswith("torch"))
        has_own = any(getattr(kind, way) is not getattr(object, way) for way in ("__reduce__", "__reduce_ex__"))
        attributes = dict(_attributes_of(value))
        try:
            reduce = copyreg.dispatch_table.get(kind)
            reduced = value.__reduce_ex__(2) if reduce is None else reduce(value)
        except Exception:  # noqa: BLE001 -- each class reports in its own way that it cannot be pickled
            self._refuse(name_of(kind))
            self._add_items(attributes)  # to find arrays
            return
        if isinstance(reduced, str):
            self._say(reduced)
            self._add_items(attributes)
            return
        function, arguments, state, members, items = (*reduced, None, None, None)[:5]
        # an object without its own pickling is its attributes, because __getstate__ may leave some out
        self._add_each([function, arguments, state if has_own or reduce is not None else attributes])
        self._add_each(members or ())
        self._add_each(part for item in items or () for part in item)


def name_of(kind: Any) -> str:
    """Return the full name of a class or function."""
    return f"{getattr(kind, '__module__', None)}.{getattr(kind, '__qualname__', type(kind).__qualname__)}"


def _attributes_of(value: Any) -> Iterator[tuple[str, Any]]:
    yield from getattr(value, "__dict__", {}).items()
    for kind in type(value).__mro__:
        for name, slot in vars(kind).items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield name, slot.__get__(value)
                except AttributeError:
                    continue  # the slot is empty


def _values_of_module(module: Any) -> dict[str, Any]:
    import torch

    held = {"_parameters", "_buffers", "_modules"}
    own = set(vars(torch.nn.Module())) - held
    return {str(name): its for name, its in vars(module).items() if name not in own and name not in _UNCOUNTED}


def _is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_module(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _is_array(value: Any) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)
