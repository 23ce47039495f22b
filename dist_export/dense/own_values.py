"""Values that a program has from the caller's model itself: no checkpoint tells whether another model has the same ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dist_export.checkpoint.extra_state import UntakenState
from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS


def list_own_values(dense_arch: nn.Module, state: Mapping[str, Any], *, dense_model_name: str) -> list[str]:
    """Return names of what ``dense_arch`` holds and ``state``, the checkpoint's, did not give it. Rank 0.

    They are parameters, buffers (those that no state_dict has, too), extra state, and tensors that are plain attributes.
    Plain numbers count as code.
    """
    given = {_plain_key(name) for name, value in state.items() if not isinstance(value, UntakenState)}
    prefix = f"{_plain_key(dense_model_name)}." if dense_model_name else ""
    missing = [key for key in dense_arch.state_dict() if f"{prefix}{_plain_key(key)}" not in given]
    return sorted({*missing, *_list_unsaved(dense_arch)})


def _list_unsaved(dense_arch: nn.Module) -> Iterator[str]:
    for path, module in dense_arch.named_modules():
        unsaved = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]  # noqa: SLF001
        registered = ("_parameters", "_buffers", "_modules")
        unsaved += [name for name, value in vars(module).items() if name not in registered and _holds_tensor(value)]
        yield from (f"{path}.{name}" if path else name for name in unsaved)


def _holds_tensor(value: Any, depth: int = 3) -> bool:
    if isinstance(value, torch.Tensor):
        return True
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return depth > 0 and any(_holds_tensor(member, depth - 1) for member in members)


def _plain_key(name: str) -> str:
    return ".".join(element for element in name.split(".") if element not in WRAPPER_ELEMENTS)
