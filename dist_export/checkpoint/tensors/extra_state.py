"""Extra state of modules in a file of ``torch.save``, as its pickle describes it. Reads no payload."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_export.checkpoint.extra_state import UnreadableError, is_extra_state
from dist_export.formats.pickle_values import Global, Record
from dist_export.formats.pickled_tensor import PickledTensor
from dist_export.formats.torch_pickle import as_tensor

_MAX_DEPTH = 32


def list_extra_states(root: Any) -> dict[tuple[str, ...], Any]:
    """Return the extra states in nested dicts, by the keys that lead to them; single tensors are no part of it."""
    found = _walk((), root)
    return {path: value for path, value in found if path and is_extra_state(path[-1]) and as_tensor(value) is None}


def holds_foreign_objects(root: Any, foreign: set[str]) -> bool:
    """Whether an object of one of the classes ``foreign`` lies anywhere but in the extra state of a module."""
    outside = [value for path, value in _walk((), root) if not (path and is_extra_state(path[-1]))]
    return any(_is_foreign(value, foreign) or _holds_below(value, foreign) for value in outside)


def make_extra_state(value: Any, make_tensor: Callable[[PickledTensor], Any]) -> Any:
    """Return an extra state with its tensors, made by ``make_tensor``, in nested dicts, lists and tuples.

    Raises:
        UnreadableError: it holds something else than tensors and plain values.
    """
    return _make(value, make_tensor, _MAX_DEPTH)


def _walk(path: tuple[str, ...], value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each value of nested dicts with its keys; what lies within extra state or in lists is a part of that value."""
    is_open = type(value) is dict and len(path) < _MAX_DEPTH and not (path and is_extra_state(path[-1]))
    if not is_open:
        yield path, value
        return
    for key, member in value.items():
        yield from _walk((*path, str(key)), member)


def _is_foreign(value: Any, foreign: set[str]) -> bool:
    return (type(value) is Record and value.kind in foreign) or (type(value) is Global and value.name in foreign)


def _holds_below(value: Any, foreign: set[str]) -> bool:
    waiting, seen = [value], set()
    while waiting:
        found = waiting.pop()
        if _is_foreign(found, foreign):
            return True
        if type(found) in (dict, list, tuple) and id(found) not in seen:
            seen.add(id(found))
            waiting += [*found.keys(), *found.values()] if type(found) is dict else found
    return False


def _make(value: Any, make_tensor: Callable[[PickledTensor], Any], depth: int) -> Any:
    if not depth:
        raise UnreadableError(f"it is nested more than {_MAX_DEPTH} deep")
    tensor = as_tensor(value)
    if tensor is not None:
        if tensor.reason:
            raise UnreadableError(f"it holds a tensor that is {tensor.reason}")
        return make_tensor(tensor)
    if isinstance(value, Mapping):
        return {key: _make(member, make_tensor, depth - 1) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_make(member, make_tensor, depth - 1) for member in value)
    if isinstance(value, Record):
        raise UnreadableError(f"it holds an object of {value.kind}, which is not read")
    if isinstance(value, Global):
        raise UnreadableError(f"it holds {value.name}, which is not read")
    return value
