"""Modules in eval mode for a while, and back in their own: through ``train`` and ``eval``, which a module may override.

Some modules do work there. A LoRA layer, for example, adds its low-rank product to its weight in ``eval()`` and takes it off
again in ``train()``: setting the attribute ``training`` alone would leave the weight changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_export.dense.origins import address_of, tensors_in
from dist_export.errors import ModelError


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode within this block, and back into their own afterwards."""
    modes = _modes_of(module)
    if hasattr(module, "training"):
        module.eval()
    try:
        yield
    finally:
        _restore(modes)


@contextlib.contextmanager
def ready_to_load(module: nn.Module) -> Iterator[None]:
    """Within this block, modules that override ``train`` or ``eval`` have their weights as a checkpoint holds them.

    That is their state in training mode. The modes are put back afterwards.
    """
    if not _overrides_modes(module):
        yield
        return
    modes = _modes_of(module)
    module.train()
    try:
        yield
    finally:
        _restore(modes)


def refuse_merging(sparse_arch: nn.Module, path: str, *, is_live: bool) -> None:
    """Refuse a sparse arch that writes into its parameters when its mode changes: its rows are not those that are exported.

    Any rank. Nothing is written into: the write is refused before it happens, and the modes are put back. Of a model in
    memory (``is_live``), rows that are merged already are the ones that are exported.

    Raises:
        ModelError: names the parameter.
    """
    if not _overrides_modes(sparse_arch):
        return
    named = {address_of(tensor): f"{path}.{name}".lstrip(".") for name, tensor in sparse_arch.named_parameters()}
    modes = _modes_of(sparse_arch)
    try:
        with _Guard({address: name for address, name in named.items() if address}):
            for is_training in (False,) if is_live else (True, False):
                sparse_arch.train(is_training)
    finally:
        for child, mode in modes:
            child.training = mode


def _overrides_modes(module: nn.Module) -> bool:
    return any(
        type(child).train is not nn.Module.train or type(child).eval is not nn.Module.eval
        for child in module.modules()
        if not isinstance(child, torch.jit.ScriptModule)
    )


def _modes_of(module: nn.Module) -> list[tuple[nn.Module, bool]]:
    # torch.jit.freeze takes the mode away, and with it the way to change it
    return [(child, child.training) for child in module.modules() if hasattr(child, "training")]


def _restore(modes: list[tuple[nn.Module, bool]]) -> None:
    """Put modules back into their modes, parents first, because a parent's ``train`` changes its children's."""
    for child, mode in modes:
        if child.training != mode:
            child.train(mode)
    for child, mode in modes:
        child.training = mode


class _Guard(TorchDispatchMode):
    """Refuses an operator before it writes into one of these tensors."""

    supports_higher_order_operators = True

    def __init__(self, names: Mapping[int, str]) -> None:
        """``names`` has the address of a storage -> the parameter's name."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for tensor in written_by(func, args, kwargs or {}):
            name = self._names.get(address_of(tensor))
            if name is not None:
                raise ModelError(
                    f"{name} is changed by train() or eval() of its module (a LoRA layer that merges, for example), so the rows "
                    "that the model computes with are not those that are exported. Nothing was written. Merge the weights "
                    "before the checkpoint is saved, and give a model without such modules in its sparse arch"
                )
        return func(*args, **(kwargs or {}))


def written_by(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operator writes into, as its schema says."""
    schema = getattr(func, "_schema", None)
    for place, argument in enumerate(() if schema is None else schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        yield from tensors_in(value)
