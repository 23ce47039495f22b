"""The setting ``serving``: what the user states of features and dense inputs where no other source does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dist_export.errors import ConfigError
from dist_export.formats.serving_entries import IdsEntry, Pooling, TransformEntry


class StatedFeature(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of ``serving.features``. What is absent is left to other sources."""

    table: str | msgspec.UnsetType = msgspec.UNSET
    ids: IdsEntry | str | msgspec.UnsetType = msgspec.UNSET
    """Where the ids are; a name is that of a tensor with the ids of each example in its rows."""
    pooling: Pooling | msgspec.UnsetType = msgspec.UNSET
    padding_id: int | msgspec.UnsetType | None = msgspec.UNSET
    transforms: tuple[TransformEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    longest: int | msgspec.UnsetType = msgspec.UNSET


class StatedContract(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The setting ``serving`` as a mapping."""

    features: dict[str, StatedFeature] = {}
    inputs: dict[str, tuple[str, ...]] = {}
    """Dense input -> the features, or tensors of a batch, whose columns it has, in order."""


def read_serving(serving: str | Mapping[str, Any]) -> StatedContract:
    """Return what the setting states; nothing for ``auto`` and ``off``.

    Raises:
        ConfigError: it is another text, or has a field that there is none of, or a value of another kind.
    """
    if isinstance(serving, str):
        if serving not in ("auto", "off"):
            raise ConfigError(f"serving is {serving!r}; give auto, off, or a mapping with features and inputs")
        return StatedContract()
    try:
        return msgspec.convert(dict(serving), StatedContract)
    except msgspec.ValidationError as error:
        raise ConfigError(f"serving: {error}") from None
