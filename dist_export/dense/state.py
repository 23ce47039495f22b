"""Load the dense parameters of a checkpoint into the copy of the dense arch. Nothing is missed without being named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from dist_export.dense.plain_copy import WRAPPER_ELEMENTS, is_lazy
from dist_export.errors import ModelError

_SHOWN = 200


def load_dense_parameters(
    dense_arch: nn.Module,
    state: Mapping[str, Any],
    *,
    dense_model_name: str,
    allow_missing: Sequence[str],
    where: str,
) -> tuple[str, ...]:
    """Load ``state`` into ``dense_arch`` in place. Rank 0. Return notes for the summary.

    Keys are compared without the path elements of DDP, FSDP and ``torch.compile``, on both sides; of ``state`` those
    under ``<dense_model_name>.`` count.

    Args:
        allow_missing: patterns of keys (without the prefix) that ``state`` may lack.
        where: the file, for messages.

    Raises:
        ModelError: keys that are missing, unexpected or of another shape, all of them in one message; a pattern that
            matches no key of the dense arch.
    """
    prefix = _plain_key(dense_model_name)
    expected = _by_plain_key(dense_arch.state_dict(), what="the dense arch")
    start = f"{prefix}." if prefix else ""
    under_prefix = {name: state[name] for name in state if _plain_key(name).startswith(start)}
    if not under_prefix and expected:
        seen = ", ".join(sorted({name.split(".")[0] for name in state})) or "nothing"
        raise ModelError(
            f"{where} has no parameter under '{start}'; its names begin with {seen}. dense_model_name is the path of the "
            "dense arch within the model that was trained"
        )
    found = {key[len(start) :]: value for key, (_, value) in _by_plain_key(under_prefix, what=where).items()}
    for pattern in allow_missing:
        if not any(fnmatchcase(key, pattern) for key in expected):
            raise ModelError(f"allow_missing_dense: the pattern {pattern!r} matches no parameter of the dense arch")
    missing = [key for key in expected if key not in found]
    allowed = [key for key in missing if any(fnmatchcase(key, pattern) for pattern in allow_missing)]
    refused = [key for key in missing if key not in allowed]
    unexpected = [key for key in found if key not in expected]
    misshapen = [
        f"{key} is {_shape(found[key])}, the dense arch has {list(value.shape)}"
        for key, (_, value) in expected.items()
        if key in found and _has_other_shape(found[key], value)
    ]
    complaints = []
    if refused:
        complaints.append(
            f"missing: {_listed(refused)} (allow_missing_dense: [patterns] lets the model's own values pass)"
        )
    if unexpected:
        complaints.append(f"unexpected under '{dense_model_name}.': {_listed(unexpected)}")
    if misshapen:
        complaints.append(f"of another shape: {_listed(misshapen)}")
    torn = _torn_ties(expected, found)
    if torn and not complaints:
        complaints.append(f"different values for what is one tensor in the dense arch: {_listed(torn)}")
    if complaints:
        raise ModelError(f"{where} does not fit the dense arch {dense_model_name!r}. " + "; ".join(complaints))
    recast = [
        key
        for key, (_, value) in expected.items()
        if key in found and isinstance(value, torch.Tensor) and found[key].dtype != value.dtype
    ]
    dense_arch.load_state_dict({name: found[key] for key, (name, _) in expected.items() if key in found}, strict=False)
    notes = []
    if allowed:
        notes.append(f"dense parameters taken from the model, not from the checkpoint: {_listed(allowed)}")
    if recast:
        notes.append(f"dense parameters cast to the dtype of the dense arch: {_listed(recast)}")
    return tuple(notes)


def _by_plain_key(state: Mapping[str, Any], *, what: str) -> dict[str, tuple[str, Any]]:
    plain: dict[str, tuple[str, Any]] = {}
    for name, value in state.items():
        key = _plain_key(name)
        if key in plain:
            raise ModelError(f"{what}: {plain[key][0]!r} and {name!r} are one name without wrapper elements")
        plain[key] = (name, value)
    return plain


def _plain_key(name: str) -> str:
    return ".".join(element for element in name.split(".") if element not in WRAPPER_ELEMENTS)


def _has_other_shape(found: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor):  # extra state is the module's own business
        return False
    if is_lazy(expected):
        return False
    return not isinstance(found, torch.Tensor) or found.shape != expected.shape


def _torn_ties(expected: Mapping[str, tuple[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """Return keys that the dense arch holds as one tensor and the checkpoint as different ones: the last would win."""
    first: dict[tuple[Any, ...], str] = {}
    torn = []
    for key, (_, value) in expected.items():
        if key not in found or not isinstance(value, torch.Tensor) or is_lazy(value) or not value.numel():
            continue
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        other = first.setdefault(place, key)
        if other != key and not torch.equal(found[other].nan_to_num(), found[key].nan_to_num()):
            torn.append(f"{other} and {key}")
    return torn


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
