"""A plain copy of the dense arch: no DDP, FSDP or ``torch.compile`` around any module, full tensors, no gradients.

The export loads an older checkpoint's weights into the copy and traces it, so the caller's model, which may be in the
middle of training, stays as it is.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from dist_export.errors import ModelError

WRAPPER_ELEMENTS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})
"""Path elements that DDP, ``torch.compile`` and FSDP put into parameter names."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def copy_dense_arch(module: nn.Module, *, device: torch.device | str | None) -> nn.Module:
    """Return a plain copy in eval mode on ``device`` (None: where the dense arch is). All ranks.

    With FSDP or DTensor parameters this gathers them, which is collective over the ranks that hold them.

    Raises:
        ModelError: a parameter that cannot be gathered, with the reason.
    """
    if device is None:
        tensor = next((t for t in (*module.parameters(), *module.buffers())), None)
        device = tensor.device if tensor is not None else torch.device("cpu")
    with _whole_parameters(module):
        plain = _Copier().copy(module)
    for parameter in plain.parameters():
        parameter.grad = None
    return plain.to(device).eval()


def unwrap(module: nn.Module) -> nn.Module:
    """Take wrappers off one module: DataParallel, DDP, FSDP, ``torch.compile``, torchrec's DistributedModelParallel."""
    while True:
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)):
            module = cast("nn.Module", module.module)
        elif isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = cast("nn.Module", module._orig_mod)  # noqa: SLF001 -- torch.compile's wrapper has no public way to its inside
        elif isinstance(getattr(module, "_dmp_wrapped_module", None), nn.Module):
            module = cast("nn.Module", module._dmp_wrapped_module)  # noqa: SLF001 -- the same for torchrec
        else:
            return module


def is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a lazy module has not seen its first input yet, so that this parameter has no shape."""
    return isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))


@contextlib.contextmanager
def _whole_parameters(module: nn.Module) -> Iterator[None]:
    """Give FSDP (version 1) modules their whole parameters for a while."""
    if not any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        yield
        return
    with FullyShardedDataParallel.summon_full_params(module, writeback=False):
        yield


class _Copier:
    """Copies a tree of modules; what is shared inside the tree is shared inside the copy."""

    def __init__(self) -> None:
        self._memo: dict[int, Any] = {}
        self._inner: list[tuple[nn.Module, nn.Module]] = []

    def copy(self, root: nn.Module) -> nn.Module:
        plain = self._allocate(root)
        for original, new in self._inner:
            self._fill(original, new)
        return plain

    def _allocate(self, wrapped: nn.Module) -> nn.Module:
        """Make the empty copies first, so that references among modules find them."""
        original = unwrap(wrapped)
        if id(original) not in self._memo:
            kind = _plain_class(original)
            new = kind.__new__(kind)
            self._memo[id(original)] = new
            self._inner.append((original, new))
            for child in original._modules.values():  # noqa: SLF001 -- children() leaves out what stands there twice
                if child is not None:
                    self._allocate(child)
        new = self._memo[id(original)]
        while wrapped is not original:
            self._memo[id(wrapped)] = new
            wrapped = next(child for child in wrapped.children() if unwrap(child) is original)
        return new  # type: ignore[no-any-return]

    def _fill(self, original: nn.Module, new: nn.Module) -> None:
        is_sharded = _plain_class(original) is not type(original)
        for name, value in original.__dict__.items():
            if name in {"_parameters", "_buffers"}:
                new.__dict__[name] = {key: self._copy_tensor(t, original) for key, t in value.items()}
            elif name == "_modules":
                new.__dict__[name] = {key: None if m is None else self._memo[id(m)] for key, m in value.items()}
            elif name == "_compiled_call_impl":
                new.__dict__[name] = None
            elif is_sharded and name in _HOOKS:
                new.__dict__[name] = type(value)()  # FSDP's own: they would gather what is whole already
            elif isinstance(value, torch.Tensor):
                new.__dict__[name] = self._copy_tensor(value, original)
            else:
                new.__dict__[name] = self._copy_attribute(value)

    def _copy_tensor(self, tensor: torch.Tensor | None, owner: nn.Module) -> torch.Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in self._memo:
            whole = tensor.detach()
            if hasattr(whole, "full_tensor"):  # DTensor
                try:
                    whole = whole.full_tensor()
                except RuntimeError as error:
                    raise ModelError(
                        f"a parameter of {type(owner).__name__} is a DTensor that cannot be gathered: {error}"
                    ) from error
            if not is_lazy(tensor):
                whole = whole.clone()
            self._memo[id(tensor)] = (
                nn.Parameter(whole, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
            )
        return self._memo[id(tensor)]  # type: ignore[no-any-return]

    def _copy_attribute(self, value: Any) -> Any:
        try:
            return copy.deepcopy(value, self._memo)
        except Exception:  # noqa: BLE001 -- process groups, streams, locks, graphs: what cannot be copied is shared
            return value


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that the user wrote: FSDP2's ``fully_shard`` puts a subclass of its own in front of it."""
    try:
        from torch.distributed.fsdp import FSDPModule
    except ImportError:  # before torch 2.6 under another path; there is no FSDP2 module then
        return type(module)
    if isinstance(module, FSDPModule):
        return cast("type[nn.Module]", next(k for k in type(module).__mro__[1:] if not issubclass(k, FSDPModule)))
    return type(module)
