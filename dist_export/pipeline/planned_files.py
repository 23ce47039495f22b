"""The files that the check of the shards writes beside them: row indexes and row fingerprints, as the settings want them."""

from __future__ import annotations

from dist_export.commit.row_indexes import index_name
from dist_export.config.publishing import VERSIONS
from dist_export.config.schema import ExportConfig
from dist_export.formats.row_fingerprints import fingerprints_name
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory


def writes_fingerprints(config: ExportConfig, plan: SparsePlan, target: Directory) -> bool:
    """Return whether an export into ``target`` writes row fingerprints.

    ``auto`` writes them where deltas will want them: in a full package of a directory of versions. On a disk alone, because
    rows are read back for it: there they come from the page cache, and from a store over the network.
    """
    if config.is_refresh:  # without rows there are none
        return False
    if config.row_fingerprints != "auto":
        return bool(config.row_fingerprints)
    is_delta = plan.pruning is not None and plan.pruning.is_delta
    return target.is_local and not is_delta and (config.register or "").startswith(VERSIONS)


def list_planned(plan: SparsePlan, target: Directory, config: ExportConfig) -> list[str]:
    """Return the names of the shards, and of the files beside them. A shard without rows has none of the latter."""
    shards = [file.name for file in plan.files]
    indexes = [index_name(name) for name in shards] if config.row_index else []
    fingerprints = [fingerprints_name(name) for name in shards] if writes_fingerprints(config, plan, target) else []
    return [*shards, *indexes, *fingerprints]
