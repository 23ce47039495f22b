"""Tell of what a forward makes at its first call: the sample fills it, and everything that is compared later agrees with it."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.checkpoint.model_weights import is_below, plain_name
from dist_export.humanize import few
from dist_export.model.sparse_tables import keeps_tables

_CONTAINERS = (Mapping, list, tuple, set, frozenset)
_DEPTH = 4
_MOST_ITEMS = 1_000
"""How deep, and how far along a container, numbers are looked for."""


class BeforeCall:
    """Knows which attributes modules of the caller's classes have before they run. Any rank, for itself."""

    def __init__(self, *roots: tuple[str, nn.Module]) -> None:
        """``roots``: each with its path within the model. Modules that keep tables, and what is in them, do not count."""
        self._modules = [
            (path, module, set(_list_filled(module))) for root in roots for path, module in list_modules(*root)
        ]

    def notes(self) -> list[str]:
        """Return a note on attributes that were absent, None or empty, and hold a tensor or a number now."""
        made: dict[str, None] = {}
        for path, module, before in self._modules:
            for name, value in {**vars(module), **module._buffers}.items():  # noqa: SLF001 -- None stands there, too
                if name not in before and name not in _OF_TORCH and _holds_numbers(value):
                    made[f"{plain_name(f'{path}.{name}' if path else name)} ({type(module).__name__})"] = None
        if not made:
            return []
        told = (
            f"forward makes {few(list(made))} at its first call, and no checkpoint has what training made: where scores are made "
            "of it, the package has what the sample made of it. If it is more than a cache, make it in __init__ and register it "
            "as a buffer"
        )
        return [told]


_OF_TORCH = frozenset(vars(nn.Module()))
"""What each module has: registers and hooks."""


def list_modules(path: str, root: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield path and module of the caller's own classes, but for what is in modules that keep tables."""
    passed: list[str] = []
    for name, module in root.named_modules():
        if any(is_below(name, place) for place in passed):
            continue
        if keeps_tables(module):
            passed.append(name)
        elif not all(kind.__module__.startswith(("torch.", "builtins")) for kind in type(module).__mro__):
            yield ".".join(part for part in (path, name) if part), module


def _list_filled(module: nn.Module) -> Iterator[str]:
    yield from module._parameters  # noqa: SLF001 -- FSDP has plain tensors in their place while it runs
    for name, value in {**vars(module), **module._buffers}.items():  # noqa: SLF001
        if value is not None and not (isinstance(value, _CONTAINERS) and not value):
            yield name


def _holds_numbers(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (bool, nn.Parameter)):
        return False  # a flag that it has run; what is registered
    if isinstance(value, (torch.Tensor, np.ndarray, numbers.Number)):
        return True
    if depth > _DEPTH or not isinstance(value, _CONTAINERS):
        return False
    items: Iterable[Any] = value.values() if isinstance(value, Mapping) else value
    return any(_holds_numbers(item, depth + 1) for item in list(items)[:_MOST_ITEMS])
