"""The files of an export besides the manifest: which are written beside the shards, and whether a store copies ranges itself."""

from __future__ import annotations

from dist_export.commit.row_indexes import index_name
from dist_export.config.publishing import VERSIONS
from dist_export.config.source_needs import FilesBesideShards
from dist_export.formats.row_fingerprints import fingerprints_name
from dist_export.pipeline.target import ExportPaths
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory


def writes_fingerprints(config: FilesBesideShards, plan: SparsePlan, target: Directory) -> bool:
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


def list_planned(plan: SparsePlan, target: Directory, config: FilesBesideShards) -> list[str]:
    """Return the names of the shards, and of the files beside them. A shard without rows has none of the latter."""
    shards = [file.name for file in plan.files]
    indexes = [index_name(name) for name in shards] if config.row_index else []
    fingerprints = [fingerprints_name(name) for name in shards] if writes_fingerprints(config, plan, target) else []
    return [*shards, *indexes, *fingerprints]


def may_copy_within(paths: ExportPaths, *, server_side_copy: bool) -> bool:
    """Whether byte ranges of the source become parts of the target within one S3 store, without coming here.

    It is one store where both are reached with the same options.
    """
    is_one_store = paths.source is not None and paths.source.is_same_store(paths.target)
    return paths.target.s3 is not None and is_one_store and server_side_copy
