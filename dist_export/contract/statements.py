"""What fg and mc, and the configs of torchrec's collections, state of features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dist_export.dense.fg import Features
from dist_export.dense.fg_rules import FgEntries
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.table_names import TableNames
from dist_export.model.unwrap import unwrap

_COMBINERS = frozenset({"sum", "mean", "max"})
_CONFIGS = {"embedding_bag_configs": "embedding_bags", "embedding_configs": "embeddings"}
"""Method or attribute of a collection with its configs -> the module that holds the tables."""


@dataclass(frozen=True, slots=True)
class FeatureStatement:
    """What one source says of a feature. None where it says nothing."""

    source: str
    table: str | None = None
    """By its name in the package."""
    dim: int | None = None
    pooling: str | None = None
    longest: int | None = None
    is_number: bool = False
    """It looks nothing up: its columns are those of the tensor with its name."""


@dataclass(frozen=True, slots=True)
class Statements:
    """What the sources say. Features go by name."""

    features: dict[str, FeatureStatement]
    blocks: dict[str, tuple[tuple[str, int], ...]]
    """Dense input -> its features in order, each with its number of columns."""


def read_fg(fg_conf: Mapping[str, Any] | None, features: Features, finder: RowFinder | None) -> Statements:
    """Return what fg and mc state. Both were checked before.

    A pooling is stated only by a ``combiner`` of a feature that is no sequence: RecIS's defaults say nothing of a model that
    pools by itself.
    """
    entries = {} if fg_conf is None else FgEntries(fg_conf).features
    stated: dict[str, FeatureStatement] = {}
    widths: dict[str, int] = {}
    for feature in features.features:
        named = entries.get(feature.name)
        if named is None:
            continue
        widths[feature.name] = feature.width
        if feature.kind == "idle":
            stated[feature.name] = FeatureStatement("fg", is_number=True)
            continue
        if len(feature.tables) != 1:  # several tables that are joined: the contract has no word for that
            continue
        combiner = named.entry.get("combiner")
        stated[feature.name] = FeatureStatement(
            "fg",
            table=_name_in_package(feature.tables[0], finder),
            dim=feature.dimension,
            pooling=combiner if combiner in _COMBINERS and not named.num_steps else None,
            longest=named.num_steps or None,
        )
    blocks = {
        block.name: tuple((name, widths[name]) for name in block.features)
        for block in features.blocks
        if block.width is not None and all(name in widths for name in block.features)
    }
    return Statements(stated, blocks if features.has_mc else {})


def read_collections(sparse_arch: nn.Module, finder: RowFinder, prefix: str) -> dict[str, FeatureStatement]:
    """Return what torchrec's collections within a sparse arch state of their features, by name."""
    names = TableNames(finder, prefix)
    found: dict[str, FeatureStatement] = {}
    for path, module in unwrap(sparse_arch).named_modules():
        for attribute, holder in _CONFIGS.items():
            configs = getattr(module, attribute, None)
            configs = configs() if callable(configs) else configs
            for config in configs if isinstance(configs, list | tuple) else ():
                if not all(hasattr(config, name) for name in ("name", "feature_names", "embedding_dim")):
                    continue
                table = names.find(".".join(part for part in (path, holder, str(config.name)) if part))
                pooling = getattr(getattr(config, "pooling", None), "name", "NONE").lower()
                for feature in config.feature_names:
                    found[str(feature)] = FeatureStatement(
                        "collection",
                        table=None if table is None else finder.written_name(table),
                        dim=int(config.embedding_dim),
                        pooling=pooling if pooling in _COMBINERS else "none",
                    )
    return found


def _name_in_package(table: str, finder: RowFinder | None) -> str | None:
    if finder is None or not finder.has_table(table):
        return None
    return finder.written_name(table)
