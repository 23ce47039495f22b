"""Settings must be the same on all ranks: machines that were started differently are told which setting differs, and where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import xxhash

from dist_export.config.schema import ExportConfig
from dist_export.errors import ConfigError
from dist_export.model.user_objects import Objects, build_objects
from dist_export.redact import redact_text
from dist_export.runtime.ranks import Ranks

MAY_DIFFER = frozenset(
    {
        "storage_options",
        "target_storage_options",
        "registry_options",
        "timeout",
        "device",
        "model_args",
        "dataset_args",
        "fg_args",
        "events",
        "metrics",
        "progress",
    }
)
"""What may be a machine's own: its credentials and device, what its ranks' model and data are made of, and where
it leaves figures. None of it shapes the package, but through objects that are the caller's."""

_SHOWN_RANKS = 4
_SHOWN_CHARACTERS = 60


def digest_settings(config: ExportConfig) -> bytes:
    """Return what is the same where the settings are. Any rank."""
    return xxhash.xxh3_128_digest(msgspec.json.encode(_encode(config)))


def build_and_digest(ranks: Ranks, config: ExportConfig) -> tuple[Objects, Sequence[bytes]]:
    """Build the model and the dataset, and return them with the digests of the settings of all ranks. All ranks."""
    built: list[Objects] = []

    def build() -> bytes:
        built.append(build_objects(config))
        return digest_settings(config)

    digests = ranks.all_gather("build the model and the dataset", build, may_block=True)
    return built[0], digests


def refuse_different_settings(ranks: Ranks, config: ExportConfig, digests: Sequence[bytes]) -> None:
    """Compare the settings of all ranks, of which ``digests`` are known. All ranks; no collective where they are the same.

    Raises:
        ConfigError: on all ranks: names each setting that differs, its values and the ranks.
    """
    if len(set(digests)) == 1:
        return
    settings = ranks.all_gather("compare the settings", lambda: _encode(config))
    ranks.run("agree on the settings", lambda: _refuse(settings))


def _refuse(settings: Sequence[Mapping[str, bytes]]) -> None:
    differing = [name for name in settings[0] if len({its.get(name) for its in settings}) > 1]
    told = "; ".join(_say_values(name, [its.get(name, b"") for its in settings]) for name in differing)
    raise ConfigError(
        f"the ranks were started with different settings: {told or 'other versions of dist_export'}. Nothing was written. Start "
        "every machine with the same config and the same options"
    )


def _say_values(name: str, values: Sequence[bytes]) -> str:
    ranks_by_value: dict[bytes, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(value, []).append(rank)
    told = []
    for value, ranks in ranks_by_value.items():
        more = f" and {len(ranks) - _SHOWN_RANKS} more" if len(ranks) > _SHOWN_RANKS else ""
        text = redact_text(value.decode())
        shown = text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
        told.append(f"{shown} (rank {', '.join(map(str, ranks[:_SHOWN_RANKS]))}{more})")
    return f"{name} is {', '.join(told)}"


def _encode(config: ExportConfig) -> dict[str, bytes]:
    """Return each setting that counts as JSON; its values' own order counts, as that of patterns does."""
    return {
        name: msgspec.json.encode(value, enc_hook=_stand_in)
        for name, value in sorted(vars(config).items())
        if name not in MAY_DIFFER
    }


def _stand_in(value: Any) -> str:
    """Return what stands for an object that is no plain value, as Python callers may give."""
    return type(value).__qualname__
