"""The files that the check of the shards writes beside them: row indexes and row fingerprints, as the settings want them."""

from __future__ import annotations

from dist_export.commit.row_indexes import index_name
from dist_export.config.schema import ExportConfig
from dist_export.formats.row_fingerprints import fingerprints_name
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory


def writes_fingerprints(config: ExportConfig, target: Directory) -> bool:
    """Return whether an export into ``target`` writes row fingerprints.

    ``auto`` depends on where the package is: from a disk the rows come back from the page cache, from a store over the network.
    """
    return target.is_local if config.row_fingerprints == "auto" else bool(config.row_fingerprints)


def list_planned(plan: SparsePlan, target: Directory, config: ExportConfig) -> list[str]:
    """Return the names of the shards, and of the files beside them. A shard without rows has none of the latter."""
    shards = [file.name for file in plan.files]
    indexes = [index_name(name) for name in shards] if config.row_index else []
    fingerprints = [fingerprints_name(name) for name in shards] if writes_fingerprints(config, target) else []
    return [*shards, *indexes, *fingerprints]
