"""Give modules of the caller's own sparse arch the checkpoint's extra state for a while, and put their own back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from dist_export.checkpoint.extra_state import EXTRA_STATE, UntakenState
from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS, is_below
from dist_export.dense.load_hooks import has_extra_state
from dist_export.dense.own_parameters import own_tensors_put_back
from dist_export.errors import ModelError
from dist_export.model.managed_collisions import is_collision_module
from dist_export.model.sparse_tables import keeps_tables
from dist_export.model.unwrap import unwrap
from dist_export.model.user_errors import said


class ExtraState(NamedTuple):
    """What the modules of the sparse arch have."""

    put: list[str]
    """Names within the model of what has the checkpoint's value."""
    lacking: list[str]
    """Names of what the checkpoint does not have, so that it is the model's own."""


@contextlib.contextmanager
def extra_state_within(
    module: nn.Module, state: Mapping[str, Any], *, path: str, except_below: str, keep: Sequence[str]
) -> Iterator[ExtraState]:
    """Within this block, modules of the sparse arch have the extra state that ``state`` holds, by their ``set_extra_state``.

    Any rank, for itself. Modules that keep tables are passed over: their state is read as tables.

    Args:
        module: the sparse arch of the caller's own model, at ``path`` within it.
        state: name within the model, or within ``module`` if no name begins with ``path``, -> value.
        except_below: the path within the model of the dense arch, which has its state in another way.
        keep: patterns of modules within the model that keep their own state.

    Raises:
        ModelError: a state cannot be read, or the module does not take it.
    """
    plain = {_plain(name): value for name, value in state.items()}
    begin = f"{_plain(path)}." if path else ""
    has_path = any(name.startswith(begin) for name in plain)
    found = ExtraState([], [])
    with contextlib.ExitStack() as held:
        for place, child in _list_modules(module):
            name = begin + (f"{_plain(place)}." if place else "") + EXTRA_STATE
            owner = name.removesuffix(EXTRA_STATE).removesuffix(".")
            if (except_below and is_below(name, _plain(except_below))) or _matches(owner or "model", keep):
                continue
            key = name if has_path else name.removeprefix(begin)
            if key not in plain:
                found.lacking.append(name)
                continue
            held.enter_context(_with_state(child, plain[key], name, owner or "model"))
            found.put.append(name)
        yield found


@contextlib.contextmanager
def _with_state(child: nn.Module, value: Any, name: str, owner: str) -> Iterator[None]:
    way_out = f"allow_load_hooks: [{owner!r}] keeps the model's own state"
    if isinstance(value, UntakenState):
        raise ModelError(
            f"{name} is in the checkpoint and cannot be taken: {value.reason}. Nothing was written; {way_out}"
        )
    attributes, own = dict(vars(child)), copy.deepcopy(child.get_extra_state())
    with own_tensors_put_back(child):
        try:
            try:
                child.set_extra_state(copy.deepcopy(value))
            except Exception as error:
                raise ModelError(
                    f"{name}: the module's set_extra_state does not take what the checkpoint holds: {said(error)}. Nothing was "
                    f"written. Give the model that was trained; or {way_out}"
                ) from error
            yield
        finally:
            vars(child).clear()
            vars(child).update(attributes)
            child.set_extra_state(own)  # it may have changed an attribute in place


def _list_modules(sparse_arch: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    passed: list[str] = []
    for path, module in sparse_arch.named_modules():
        if any(is_below(path, place) for place in passed) or unwrap(module) is not module:
            continue
        if keeps_tables(module) or is_collision_module(module):
            passed.append(path)
        elif has_extra_state(module):
            yield path, module


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _plain(name: str) -> str:
    return ".".join(element for element in name.split(".") if element not in WRAPPER_ELEMENTS)
