"""Load the dense parameters of a checkpoint into the copy of the dense arch. Nothing is missed without being named."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from dist_export.archive.output_diff import has_same_values
from dist_export.checkpoint.extra_state import UntakenState, is_extra_state
from dist_export.checkpoint.model_weights import WRAPPER_ELEMENTS
from dist_export.dense.own_parameters import copied, say_lost
from dist_export.errors import ModelError
from dist_export.model.unwrap import is_lazy
from dist_export.model.user_errors import said

_SHOWN = 200


def load_dense_parameters(
    dense_arch: nn.Module,
    state: Mapping[str, Any],
    *,
    dense_model_name: str,
    allow_missing: Sequence[str],
    allow_unexpected: Sequence[str] = (),
    where: str,
) -> tuple[str, ...]:
    """Load ``state`` into ``dense_arch`` in place. Rank 0. Return notes for the summary.

    Keys are compared without the path elements of DDP, FSDP and ``torch.compile``, on both sides; of ``state`` those
    under ``<dense_model_name>.`` count. Of keys that are one tensor in the dense arch, ``state`` may have any. What a
    module's ``get_extra_state`` gave is loaded by its ``set_extra_state``.

    Args:
        allow_missing: patterns of keys (without the prefix) that ``state`` may lack.
        allow_unexpected: patterns of keys (without the prefix) that the dense arch may lack: they are left out.
        where: the file, for messages.

    Raises:
        ModelError: keys that are missing, unexpected or of another shape, or extra state that cannot be loaded, all of
            them in one message; a pattern that matches no key.
    """
    expected = _by_plain_key(dense_arch.state_dict(), what="the dense arch")
    found = _find_under_prefix(state, dense_model_name, where, is_needed=bool(expected))
    _refuse_idle(allow_missing, expected, "allow_missing_dense", "the dense arch")
    _refuse_idle(allow_unexpected, found, "allow_unexpected_dense", f"{where} under {dense_model_name!r}")
    tied = list_tied({key: value for key, (_, value) in expected.items()}, found)
    missing = [key for key in expected if key not in found and key not in tied]
    allowed = [key for key in missing if _matches(key, allow_missing)]
    unexpected = [key for key in found if key not in expected and not _is_unread_tensor(key, found[key])]
    left_out = [key for key in unexpected if _matches(key, allow_unexpected)]
    refused = _Refused(
        missing=[key for key in missing if key not in allowed],
        unexpected=[key for key in unexpected if key not in left_out],
    )
    common = {key: name for key, (name, _) in expected.items() if key in found}
    untaken = {key: found[key] for key in common if isinstance(found[key], UntakenState)}
    taken = {key: name for key, name in common.items() if key not in untaken}
    complaints = refused.describe(dense_model_name)
    kept = [key for key in untaken if _matches(key, allow_missing)]
    complaints += [_say_untaken(key, untaken[key]) for key in untaken if key not in kept]
    complaints += _compare_values(expected, {key: found[key] for key in taken}, is_fine_so_far=not complaints)
    if complaints:
        raise ModelError(f"{where} does not fit the dense arch {dense_model_name!r}. " + "; ".join(complaints))
    recast = [key for key in taken if not is_extra_state(key) and _has_other_dtype(found[key], expected[key][1])]
    _load(dense_arch, {name: copied(found[key]) for key, name in taken.items()}, where)
    notes = []
    if allowed or kept:
        notes.append(f"dense parameters taken from the model, not from the checkpoint: {_listed([*allowed, *kept])}")
    if left_out:
        notes.append(f"dense parameters of the checkpoint that the dense arch lacks are left out: {_listed(left_out)}")
    if recast:
        notes += _note_recast({key: (found[key], expected[key][1]) for key in recast})
    return tuple(notes)


def _note_recast(pairs: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Return a note for each pair of dtypes on parameters, (the checkpoint's, the dense arch's) by key."""
    by_dtypes: dict[tuple[str, str], list[str]] = {}
    for key, values in pairs.items():
        held, own = (str(value.dtype).removeprefix("torch.") for value in values)
        by_dtypes.setdefault((held, own), []).append(key)
    return [
        f"dense parameters are {held} in the checkpoint and {own} in the dense arch: they are cast, and the program has them "
        f"as {own}: {_listed(keys)}"
        for (held, own), keys in sorted(by_dtypes.items())
    ]


def list_taken(dense_arch: nn.Module, names: Iterable[str], *, dense_model_name: str) -> frozenset[str]:
    """Return those of a checkpoint's names that the dense arch has a parameter, a buffer or extra state for. Rank 0."""
    prefix = _plain_key(dense_model_name)
    expected = {f"{prefix}.{_plain_key(key)}" if prefix else _plain_key(key) for key in dense_arch.state_dict()}
    return frozenset(name for name in names if _plain_key(name) in expected)


def list_tied(own: Mapping[str, Any], found: Collection[str]) -> frozenset[str]:
    """Return the keys of ``own`` that ``found`` lacks, and that are one tensor with a key that it has.

    safetensors writes a tensor under one of its names alone.
    """
    given = {_identity_of(value) for key, value in own.items() if key in found and _has_memory(value)}
    return frozenset(
        key for key, value in own.items() if key not in found and _has_memory(value) and _identity_of(value) in given
    )


def _has_memory(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not is_lazy(value) and bool(value.numel())


def _identity_of(value: torch.Tensor) -> tuple[Any, ...]:
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


class _Refused(NamedTuple):
    """Keys that stand on one side alone."""

    missing: list[str]
    unexpected: list[str]

    def describe(self, dense_model_name: str) -> list[str]:
        complaints = []
        if self.missing:
            complaints.append(
                f"missing: {_listed(self.missing)} (allow_missing_dense: [patterns] lets the model's own values pass)"
            )
        if self.unexpected:
            complaints.append(
                f"unexpected under '{dense_model_name}.': {_listed(self.unexpected)} (allow_unexpected_dense: [patterns] "
                "leaves them out)"
            )
        if any("._packed_params" in f".{key}" for key in self.unexpected):
            complaints.append(
                "_packed_params are those of modules quantized by torch.ao.quantization: save the checkpoint of the model as it "
                "was before quantize_dynamic or convert"
            )
        return complaints


def _find_under_prefix(state: Mapping[str, Any], name: str, where: str, *, is_needed: bool) -> dict[str, Any]:
    """Return plain key -> value of what ``state`` holds under the path ``name``."""
    prefix = _plain_key(name)
    start = f"{prefix}." if prefix else ""
    under_prefix = {name: state[name] for name in state if _plain_key(name).startswith(start)}
    if not under_prefix and is_needed:
        seen = ", ".join(sorted({name.split(".")[0] for name in state})) or "nothing"
        raise ModelError(
            f"{where} has no parameter under '{start}'; its names begin with {seen}. dense_model_name is the path of the "
            "dense arch within the model that was trained"
        )
    return {key[len(start) :]: value for key, (_, value) in _by_plain_key(under_prefix, what=where).items()}


def _is_unread_tensor(key: str, value: Any) -> bool:
    """Whether a checkpoint's tensor cannot be read; where the dense arch does not have it, nobody asked for it."""
    return isinstance(value, UntakenState) and not is_extra_state(key)


def _refuse_idle(patterns: Sequence[str], keys: Iterable[str], setting: str, where: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(key, pattern) for key in keys):
            raise ModelError(f"{setting}: the pattern {pattern!r} matches no parameter of {where}")


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _compare_values(
    expected: Mapping[str, tuple[str, Any]], found: Mapping[str, Any], *, is_fine_so_far: bool
) -> list[str]:
    """Return complaints about shapes and, where there are no others, about ties."""
    misshapen = [
        f"{key} is {_shape(value)}, the dense arch has {list(expected[key][1].shape)}"
        for key, value in found.items()
        if not is_extra_state(key) and _has_other_shape(value, expected[key][1])
    ]
    if misshapen:
        return [f"of another shape: {_listed(misshapen)}"]
    lost = {
        key: say_lost(value, expected[key][1]) for key, value in found.items() if _can_be_cast(key, value, expected)
    }
    if told := [f"{key} {text}" for key, text in lost.items() if text]:
        return [f"{_listed(told)} (give the model the dtype that it was trained in)"]
    torn = _torn_ties(expected, found) if is_fine_so_far else []
    return [f"different values for what is one tensor in the dense arch: {_listed(torn)}"] if torn else []


def _say_untaken(key: str, untaken: UntakenState) -> str:
    return (
        f"{key} is in the checkpoint and cannot be taken: {untaken.reason} (allow_missing_dense: [patterns] keeps the "
        "model's own state)"
    )


def _load(dense_arch: nn.Module, state: dict[str, Any], where: str) -> None:
    try:
        dense_arch.load_state_dict(state, strict=False)
    except Exception as error:
        extra = [name for name in state if is_extra_state(name)]
        if not extra:
            raise
        raise ModelError(
            f"{where}: a module's set_extra_state does not take what the checkpoint holds ({_listed(extra)}): {said(error)}. "
            "Give the model that was trained, or keep the model's own state with allow_missing_dense"
        ) from error


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
    if not isinstance(expected, torch.Tensor):  # what hooks of a module put there is the module's own business
        return False
    if is_lazy(expected):
        return False
    return not isinstance(found, torch.Tensor) or found.shape != expected.shape


def _can_be_cast(key: str, found: Any, expected: Mapping[str, tuple[str, Any]]) -> bool:
    own = expected[key][1]
    return (
        not is_extra_state(key) and isinstance(own, torch.Tensor) and not is_lazy(own) and _has_other_dtype(found, own)
    )


def _has_other_dtype(found: Any, expected: Any) -> bool:
    return isinstance(expected, torch.Tensor) and found.dtype != expected.dtype


def _torn_ties(expected: Mapping[str, tuple[str, Any]], found: Mapping[str, Any]) -> list[str]:
    """Return keys that the dense arch holds as one tensor and the checkpoint as different ones: the last would win."""
    first: dict[tuple[Any, ...], str] = {}
    torn = []
    for key, (_, value) in expected.items():
        if key not in found or is_extra_state(key) or not _has_memory(value):
            continue
        other = first.setdefault(_identity_of(value), key)
        if other != key and not has_same_values(found[other], found[key]):
            torn.append(f"{other} and {key}")
    return torn


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
