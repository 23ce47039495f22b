"""Where the tensors come from that a sparse arch computes with: the batch, its registered state, the call itself, or elsewhere.

What comes from elsewhere is in no checkpoint and in no table of the package: a parameter that the arch keeps in a list or a
closure, or rows that it has kept from an earlier call. The former is refused; the latter makes other checks look more closely.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.sample_rows import SampleRows
from dist_export.model.unwrap import is_lazy

_DEPTH = 6
_MOST_ITEMS = 10_000
"""How deep, and how far along a container, tensors are looked for that nobody registers."""


def address_of(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage, 0 for one that has no memory of its own."""
    if is_lazy(tensor) or tensor.layout != torch.strided or hasattr(tensor, "device_mesh"):
        return 0
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass without a storage
        return 0


class Origins:
    """Tells the tensors of one call of a sparse arch apart. Any rank, for itself."""

    def __init__(self, sparse_arch: nn.Module, path: str, counts: SampleRows) -> None:
        """``path`` is that of the arch within the model; ``counts`` gets what comes from elsewhere."""
        self._arch = sparse_arch
        self._path = path
        self._counts = counts
        self._known: set[int] = set()
        """Addresses of registered state, of the batch, and of what the call has made."""
        self._elsewhere: set[int] = set()
        self._parameters: dict[int, tuple[str, str]] = {}
        self._outside: dict[int, dict[tuple[int, ...], str]] = {}
        """Address -> path and description of a parameter that is not registered, or shapes of other tensors and how they came.
        They count when the call ends, for FSDP gathers values into a parameter before it registers it."""

    def begin(self, given: Any) -> None:
        """Take in what the arch is called with."""
        self._known |= self._registered() | {address for address in _addresses_in(given, 0) if address}

    def made(self, outputs: Any, inputs: Any) -> None:
        """Take in what an operator returned; a view of its ``inputs`` is nothing new."""
        old = {address_of(tensor) for tensor in tensors_in(inputs)}
        new = {address_of(tensor) for tensor in tensors_in(outputs)}
        self._known |= new - old - self._elsewhere

    def look(self, tensor: torch.Tensor, how: str) -> None:
        """Look at a tensor that an operator gets, or that the arch returns."""
        if not tensor.is_floating_point():
            return
        address = address_of(tensor)
        if not address or address in self._known:
            return
        is_parameter = isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf)
        if (is_parameter or address not in self._elsewhere) and address in self._registered():
            self._known.add(address)
            self._parameters.pop(address, None)
            self._outside.pop(address, None)
            return
        self._elsewhere.add(address)
        if is_parameter and address not in self._parameters:
            self._parameters[address] = self._name(tensor, address), _describe(tensor)
        elif not is_parameter and tensor.dim() and tensor.numel():
            self._outside.setdefault(address, {}).setdefault(tuple(tensor.shape), how)

    def end(self, output: Any) -> None:
        """Take in what the arch returns. A parameter that a thread may have read counts as read."""
        for tensor in tensors_in(output):
            self.look(tensor, "it is returned")
        for path, described in self._parameters.values():
            self._counts.unregistered.setdefault(path, described)
        for shapes in self._outside.values():
            self._counts.outside = {**shapes, **self._counts.outside}
        widths = {shape[-1] for shape in self._counts.outside}
        registered = self._registered() if widths else set()  # torchrec's lookups have views of what is registered
        for path, parameter in self._hidden() if widths else ():
            if parameter.dim() == 2 and parameter.shape[-1] in widths and address_of(parameter) not in registered:
                self._counts.unregistered.setdefault(path, _describe(parameter))

    def _name(self, parameter: torch.Tensor, address: int) -> str:
        path = next((path for path, held in self._hidden() if address_of(held) == address), None)
        return path or f"a parameter of {list(parameter.shape)} elsewhere"

    def _hidden(self) -> list[tuple[str, torch.Tensor]]:
        return list(hidden_parameters(self._arch, self._path))

    def _registered(self) -> set[int]:
        state = (*self._arch.parameters(), *self._arch.buffers())
        return {address_of(tensor) for tensor in state} - {0}


def hidden_parameters(root: nn.Module, path: str, *, with_classes: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, parameter) of what modules keep in lists, dicts, objects and closures, and do not register.

    ``with_classes``: also of what the functions of their classes close over.
    """
    registered = {id(parameter) for parameter in root.parameters()}

    def is_hidden(tensor: torch.Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) and id(tensor) not in registered

    modules = {id(module) for module in root.modules()}
    seen: set[int] = set()
    for name, module in root.named_modules():
        place = ".".join(part for part in (path, name) if part)
        yield from _search_attributes(module, place, modules, is_hidden, seen)
        kinds = [kind for kind in type(module).__mro__ if not kind.__module__.startswith(("torch.", "builtins"))]
        for kind in kinds if with_classes else ():
            for attribute, value in vars(kind).items():
                if isinstance(value, types.FunctionType):
                    yield from _search(value, f"{place}.{attribute}", modules, is_hidden, seen, 0)


def hidden_values(
    root: nn.Module, path: str, registered: Iterable[torch.Tensor], *, skip: Collection[int] = ()
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (path, tensor) of the floats that modules of the caller's classes keep as they are: neither parameters nor buffers.

    ``registered`` tensors and their views do not count, nor do modules whose ids are in ``skip``. Modules of torch's classes
    keep what they compute anew.
    """
    known = {address_of(tensor) for tensor in registered}

    def is_hidden(tensor: torch.Tensor) -> bool:
        is_number = tensor.is_floating_point() or tensor.is_complex()
        return is_number and not isinstance(tensor, nn.Parameter) and address_of(tensor) not in known

    modules = {*(id(module) for module in root.modules()), *skip}
    seen: set[int] = set()
    for name, module in root.named_modules():
        if not type(module).__module__.startswith("torch.") and id(module) not in skip:
            place = ".".join(part for part in (path, name) if part)
            yield from _search_attributes(module, place, modules, is_hidden, seen)


def _search_attributes(
    module: nn.Module, place: str, modules: set[int], is_hidden: Callable[[torch.Tensor], bool], seen: set[int]
) -> Iterator[tuple[str, torch.Tensor]]:
    for attribute, value in vars(module).items():
        if attribute not in MODULE_DICTS:
            yield from _search(value, f"{place}.{attribute}", modules, is_hidden, seen, 0)


MODULE_DICTS = frozenset({"_parameters", "_buffers", "_modules"})


def _search(
    value: Any, path: str, modules: set[int], is_hidden: Callable[[torch.Tensor], bool], seen: set[int], depth: int
) -> Iterator[tuple[str, torch.Tensor]]:
    if depth > _DEPTH or id(value) in seen or isinstance(value, (type, types.ModuleType)):
        return
    if isinstance(value, torch.Tensor):
        if is_hidden(value):
            yield path, value
        return
    if value is None or isinstance(value, (str, bytes, int, float, np.ndarray)) or id(value) in modules:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for name, tensor in (*value.named_parameters(), *value.named_buffers()):
            if is_hidden(tensor):
                yield f"{path}.{name}", tensor
        return
    for step, inner in held_by(value):
        yield from _search(inner, path + step, modules, is_hidden, seen, depth + 1)


def held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a container, a function or an object of the caller's own holds, with what a path calls it."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in list(value.items())[:_MOST_ITEMS])
    elif isinstance(value, (list, tuple, set, frozenset)):
        yield from ((f"[{place}]", item) for place, item in enumerate(list(value)[:_MOST_ITEMS]))
    elif isinstance(value, functools.partial):
        yield from (("", item) for item in (value.func, *value.args, *value.keywords.values()))
    elif isinstance(value, types.MethodType):
        yield "", value.__self__
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=False)
        yield from ((f".{name}", cell.cell_contents) for name, cell in cells if _is_filled(cell))
        yield from ((".defaults", item) for item in value.__defaults__ or ())
    elif not type(value).__module__.startswith(("torch", "numpy", "builtins")):
        yield from ((f".{name}", item) for name, item in list(getattr(value, "__dict__", {}).items()))
        slots = [vars(kind).get("__slots__", ()) for kind in type(value).__mro__]
        names = [name for its in slots for name in ([its] if isinstance(its, str) else its)]
        yield from ((f".{name}", getattr(value, name)) for name in names if name != "__dict__" and hasattr(value, name))


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 -- an empty cell raises
    except ValueError:
        return False
    return True


def _addresses_in(value: Any, depth: int) -> Iterator[int]:
    """Yield the addresses of tensors and arrays of a batch, within containers and objects."""
    if isinstance(value, torch.Tensor):
        yield address_of(value)
    elif isinstance(value, np.ndarray):
        yield int(value.ctypes.data)
    elif depth > _DEPTH or value is None or isinstance(value, (str, bytes, int, float, type, nn.Module)):
        return
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _addresses_in(item, depth + 1)
    elif isinstance(value, Sequence):
        for item in value[:_MOST_ITEMS]:
            yield from _addresses_in(item, depth + 1)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        for item in list(getattr(value, "__dict__", {}).values()):
            yield from _addresses_in(item, depth + 1)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors within lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def _describe(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
