"""Run a model on one rank while the others wait. What gathers values over all ranks would wait for them forever."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_export.errors import ModelError
from dist_export.model.sparse_tables import keeps_tables
from dist_export.model.unwrap import is_fully_sharded, unwrap

_SENT = "c10d"
"""Namespace of the operators by which torch talks to other ranks, whatever function or wrapper calls them."""
_FUNCTIONAL = frozenset({"_c10d_functional", "_c10d_functional_autograd", "c10d_functional"})
"""Those that a trace takes in without sending anything. A program with one is refused once it is there, with its line."""
_TORCHREC_SHARDED = "torchrec.distributed."
_MISSING = object()


def say_sharded(root: nn.Module, dense_arch: nn.Module | None, tables: Collection[int]) -> str:
    """Return why a model runs on all ranks only; empty if one rank may run it.

    Args:
        root: the model, or its sparse arch.
        dense_arch: what is in ``root`` and has a plain copy in its place when one rank runs it.
        tables: ``id()`` of tensors that are taken out when one rank runs it.
    """
    for path, module, is_library in _walk(root, dense_arch):
        if is_fully_sharded(module):
            return _say(f"fully_shard is around {path or 'all of it'}", "without fully_shard")
        if type(module).__module__.startswith(_TORCHREC_SHARDED) and unwrap(module) is module:
            how = "before it is sharded, and a checkpoint that DCP has saved as ckpt_dir,"
            return _say(f"torchrec has sharded {path or 'all of it'} ({type(module).__name__})", how)
        own = {**module._parameters, **module._buffers}  # noqa: SLF001 -- its own alone
        for name, tensor in {} if is_library else own.items():
            if (
                id(tensor) not in tables
                and (mesh := getattr(tensor, "device_mesh", None)) is not None
                and mesh.size() > 1
            ):
                full = f"{path}.{name}".lstrip(".")
                return _say(f"{full} is a DTensor over {mesh.size():,} ranks", "with the whole tensor")
    return ""


def _say(what: str, how: str) -> str:
    return (
        f"{what}, so every rank must run it, and the trace is made by one. Only the dense arch is gathered for it. Give the "
        f"model {how} to have a program"
    )


def _walk(root: nn.Module, dense_arch: nn.Module | None) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield path, module and whether it is in one that keeps tables by itself, of all that runs beside the dense arch."""
    seen = set() if dense_arch is None else {id(dense_arch)}

    def below(module: nn.Module, path: str, *, is_library: bool) -> Iterator[tuple[str, nn.Module, bool]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        is_library = is_library or keeps_tables(module)
        yield path, module, is_library
        for name, child in module._modules.items():  # noqa: SLF001 -- named_children leaves a shared one out
            if child is not None:
                yield from below(child, f"{path}.{name}".lstrip("."), is_library=is_library)

    return below(root, "", is_library=False)


@contextlib.contextmanager
def without_replicas(root: nn.Module) -> Iterator[None]:
    """Within this block, DDP and DataParallel in ``root`` run what is in them, and nothing else. Their hooks run all the same.

    DDP sends the buffers of rank 0 to all ranks whenever it runs, in eval mode too.
    """
    undo: list[Callable[[], None]] = []
    try:
        for module in root.modules():
            if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
                held = vars(module)
                before = held.get("forward", _MISSING)
                held["forward"] = module.module.__call__
                undo.append(lambda held=held, before=before: _put_back(held, before))  # type: ignore[misc]
        yield
    finally:
        for step in reversed(undo):
            step()


def _put_back(held: dict[str, Any], before: Any) -> None:
    if before is _MISSING:
        del held["forward"]
    else:
        held["forward"] = before


def refuse_collectives() -> contextlib.AbstractContextManager[Any]:
    """Within this block, a collective of the model's code is a ModelError: this rank runs it alone. One process may.

    torch before 2.8 follows no operators through branches and loops, so it is not followed there.
    """
    dist = torch.distributed
    is_alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    if is_alone or not hasattr(TorchDispatchMode, "supports_higher_order_operators"):
        return contextlib.nullcontext()
    return _Collectives()  # type: ignore[no-untyped-call]


class _Collectives(TorchDispatchMode):
    """Refuses the operators of collectives before they are sent."""

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Call the operator."""
        space = getattr(func, "namespace", "")
        if space == _SENT or (space in _FUNCTIONAL and not any(map(is_fake, tree_leaves((args, kwargs))))):
            raise ModelError(
                f"the model's code calls a collective of torch.distributed ({func}), and here one rank runs it alone, as in "
                "serving. Let forward call it only `if self.training`"
            )
        return func(*args, **(kwargs or {}))
