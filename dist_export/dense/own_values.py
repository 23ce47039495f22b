"""Values that a program has from the caller's model itself: no checkpoint tells whether another model has the same ones."""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from dist_export.checkpoint.extra_state import UntakenState
from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS, is_below
from dist_export.dense.load_state import list_tied
from dist_export.model.sparse_tables import keeps_tables
from dist_export.model.unwrap import find_arch, unwrap
from dist_export.model.value_digest import Digester

_OF_TORCH = frozenset(vars(nn.Module()))
"""What each module has: registers and hooks."""
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def list_own_values(dense_arch: nn.Module, state: Mapping[str, Any], *, dense_model_name: str) -> list[str]:
    """Return names of what ``dense_arch`` holds and ``state``, the checkpoint's, did not give it. Rank 0.

    They are parameters, buffers (those that no state_dict has, too), extra state, and whatever else holds tensors or arrays:
    attributes of the modules and of their classes, objects, functions and unregistered modules in them, and what their methods
    have closed over or read as globals. Plain numbers count as code.
    """
    given = {_plain_key(name) for name, value in state.items() if not isinstance(value, UntakenState)}
    prefix = f"{_plain_key(dense_model_name)}." if dense_model_name else ""
    own = dense_arch.state_dict()
    found = {key for key in own if f"{prefix}{_plain_key(key)}" in given}
    missing = own.keys() - found - list_tied(own, found)
    return sorted({*missing, *_list_unsaved(dense_arch)})


def digest_own_values(dense_arch: nn.Module, names: Collection[str], *, skip: Collection[int] = ()) -> str | None:
    """Return a digest of the values of these names, as :func:`list_own_values` gives them; None where one cannot be read.

    Args:
        dense_arch: the caller's own, wrappers included. It must not have run since it was built, or have run alike.
        names: of the values.
        skip: ids of objects that do not count: the modules that the dense arch is in.

    Tensors that lie on several ranks, or on none, and extra state cannot be read.
    """
    return _digest(dense_arch.named_modules(), names, skip={*_list_registered(dense_arch), *skip})


def list_sparse_values(
    model: nn.Module, sparse_arch: nn.Module, given: Collection[str], *, sparse_model_name: str, dense_model_name: str
) -> list[str]:
    """Return names, within the sparse arch, of what it holds besides tables and the checkpoint did not give it. Rank 0.

    They are what :func:`list_own_values` names of a dense arch. What has no digest (sharded tensors, objects that hide their
    content) is left out, as are matrices and all that modules which keep tables hold.

    Args:
        model: the caller's, with both arches in it.
        sparse_arch: its sparse arch, which must not have run since it was built, or have run alike.
        given: names of the checkpoint's tables and tensors, within the model.
        sparse_model_name: the path of the sparse arch.
        dense_model_name: the path of the dense arch, whose values do not count here.
    """
    begin = f"{_plain_key(sparse_model_name)}." if sparse_model_name else ""
    plain = {_plain_key(name) for name in given}
    begin = begin if any(name.startswith(begin) for name in plain) else ""
    skip = _list_registered(model)
    modules = list_sparse_modules(model, sparse_arch, dense_model_name)
    names = set(_list_unsaved_of(modules, skip))
    for path, module in modules:
        held, buffers, passing = module._parameters, module._buffers, module._non_persistent_buffers_set  # noqa: SLF001
        saved = [name for name, its in held.items() if its is not None and its.dim() != 2]
        saved += [name for name, its in buffers.items() if its is not None and name not in passing]
        names |= {f"{path}.{name}" if path else name for name in saved}
    mine = [name for name in sorted(names) if begin + _plain_key(name) not in plain]
    return [name for name in mine if _digest(modules, [name], skip=skip) is not None]


def digest_sparse_values(
    model: nn.Module, sparse_arch: nn.Module, names: Collection[str], *, dense_model_name: str
) -> str | None:
    """Return a digest of the values of these names, as :func:`list_sparse_values` gives them; None where one cannot be read."""
    modules = list_sparse_modules(model, sparse_arch, dense_model_name)
    return _digest(modules, names, skip=_list_registered(model))


def list_sparse_modules(model: nn.Module, sparse_arch: nn.Module, dense_model_name: str) -> list[tuple[str, nn.Module]]:
    """Return path and module of what is in the sparse arch, but for the dense arch and what is in modules that keep tables."""
    dense = {id(child) for child in find_arch(model, dense_model_name, "dense_model_name").modules()}
    found: list[tuple[str, nn.Module]] = []
    passed: list[str] = []
    for path, module in sparse_arch.named_modules():
        if any(is_below(path, place) for place in passed):
            continue
        if unwrap(module) is not module:
            continue  # of a wrapper what is in it counts
        if keeps_tables(module):
            passed.append(path)
        elif id(module) not in dense:
            found.append((path, module))
    return found


def _digest(modules: Iterable[tuple[str, nn.Module]], names: Collection[str], *, skip: Collection[int]) -> str | None:
    held: dict[str, Any] = {}
    for path, module in modules:
        own = {**_list_attributes(module), **module._parameters, **module._buffers}  # noqa: SLF001 -- no module lists these
        held |= {_plain_key(f"{path}.{name}" if path else name): value for name, value in own.items()}
    digester = Digester(skip)
    for name in sorted(names):
        if _plain_key(name) not in held:
            return None
        digester.add(name)
        _take_in(digester, held[_plain_key(name)])
    return digester.digest


def _list_unsaved(dense_arch: nn.Module) -> Iterator[str]:
    return _list_unsaved_of(dense_arch.named_modules(), _list_registered(dense_arch))


def _list_unsaved_of(modules: Iterable[tuple[str, nn.Module]], skip: Collection[int]) -> Iterator[str]:
    known: dict[int, tuple[bool, Any]] = {}
    """id() of a value -> whether it holds arrays, and the value, which must not go while its id counts."""
    for path, module in modules:
        unsaved = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]  # noqa: SLF001
        for name, value in _list_attributes(module).items():
            if id(value) not in known:  # many modules have one class
                digester = Digester(skip)
                _take_in(digester, value)
                known[id(value)] = (digester.has_arrays, value)
            unsaved += [name] if known[id(value)][0] else []
        yield from (f"{path}.{name}" if path else name for name in unsaved)


def _list_registered(module: nn.Module) -> frozenset[int]:
    """Return the ids of what torch registers in a module: it is named as such, and does not count where it is referred to."""
    return frozenset(map(id, [*module.modules(), *module.parameters(), *module.buffers()]))


def _list_attributes(module: nn.Module) -> dict[str, Any]:
    """Return what a module has by name, its class included, besides what torch registers and what torch's classes have."""
    mine = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    for name in _HOOKS:  # by the order in which they run; they are numbered through the process
        if hooks := getattr(module, name):
            mine[name] = list(hooks.values())
    for kind in type(module).__mro__:
        if not kind.__module__.startswith("torch."):
            mine = {name: value for name, value in vars(kind).items() if not _is_of_class(name)} | mine
    return mine


def _is_of_class(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _take_in(digester: Digester, value: Any) -> None:
    """Take in a value of a module; of its methods what they have besides their code."""
    if isinstance(value, property):
        for function in (value.fget, value.fset, value.fdel):
            _take_in(digester, function)
        return
    plain = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(plain, types.FunctionType) and not str(plain.__module__).startswith("torch."):
        digester.add_values_of(plain)
    else:
        digester.add(plain)


def _plain_key(name: str) -> str:
    return ".".join(element for element in name.split(".") if element not in WRAPPER_ELEMENTS)
