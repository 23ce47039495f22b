"""Values that a program has from the caller's model itself: no checkpoint tells whether another model has the same ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import xxhash
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


def digest_own_values(dense_arch: nn.Module, names: Collection[str]) -> str | None:
    """Return a digest of the values of these names, as :func:`list_own_values` gives them; None where one cannot be read.

    Args:
        dense_arch: the caller's own, wrappers included. It must not have run since it was built, or have run alike.

    Tensors that lie on several ranks, or on none, and extra state cannot be read.
    """
    held: dict[str, Any] = {}
    for path, module in dense_arch.named_modules():
        own = {**vars(module), **module._parameters, **module._buffers}  # noqa: SLF001 -- no module lists these
        held |= {_plain_key(f"{path}.{name}" if path else name): value for name, value in own.items()}
    hasher = xxhash.xxh3_128()
    for name in sorted(names):
        if _plain_key(name) not in held or not _hash_value(held[_plain_key(name)], hasher):
            return None
        hasher.update(f"\0{name}\0".encode())
    return f"xxh3:{hasher.hexdigest()}"


def _hash_value(value: Any, hasher: xxhash.xxh3_128, depth: int = 3) -> bool:
    """Take in a value; return whether it could be."""
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter, nn.Buffer) or value.layout != torch.strided or value.is_meta:
            return False
        hasher.update(f"{value.dtype} {list(value.shape)} ".encode())
        plain = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        hasher.update(plain.view(torch.uint8).numpy().data if plain.numel() else b"")
        return True
    if isinstance(value, (list, tuple, dict)) and depth:
        hasher.update(f"{type(value).__name__} {len(value)} ".encode())
        members = [member for item in value.items() for member in item] if isinstance(value, dict) else value
        return all(_hash_value(member, hasher, depth - 1) for member in members)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        hasher.update(f"{type(value).__name__} {value!r} ".encode())
        return True
    return False


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
