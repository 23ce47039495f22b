"""What makes two exports the same one: their settings and their source. A package says whose it is (``run.identity``)."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import xxhash

from dist_export.checkpoint.metadata import Checkpoint, SourceFile
from dist_export.config.needs import UserCallables
from dist_export.config.prune_rules import parse_rules
from dist_export.config.schema import ExportConfig
from dist_export.formats.recis import MERGED
from dist_export.manifest import MANIFEST, Manifest
from dist_export.model.user_objects import Objects
from dist_export.model.value_digest import digest_value
from dist_export.pipeline.inputs import FG
from dist_export.plan.target_slices import resolve_num_shards
from dist_export.storage.directory import Directory, digest_file
from dist_export.storage.urls import open_directory

HOW = (
    "export_dir",
    "publish",
    "keep_versions",
    "follow_links",
    "num_shards",
    "max_memory",
    "threads",
    "storage_options",
    "target_storage_options",
    "timeout",
    "overwrite",
    "on_unfinished",
    "step",
    "register",
    "registry_options",
    "events",
    "metrics",
    "progress",
)
"""Settings that do not shape the package, or do so through what they lead to."""
ARGUMENTS = ("model_args", "dataset_args", "fg_args")
"""Settings whose values may be any objects, where the caller is a program."""


class Told(NamedTuple):
    """What shapes a package besides its settings and its tables."""

    small_files: Mapping[str, SourceFile]
    """Of the source, by name; of a model in memory something that no other export has."""
    confs: Sequence[Any]
    """What fg.json and the blocks hold."""
    world_size: int
    """It gives the number of shards where the settings do not."""


def identify_settings(config: ExportConfig) -> str:
    """Return the digest of the settings that shape a package. Cheap: nothing but settings is looked at."""
    settings = [
        (name, _digest_arguments(value) if name in ARGUMENTS else value)
        for name, value in sorted(vars(config).items())
        if name not in (*HOW, "ckpt_dir")
    ]
    source = None if config.ckpt_dir is None else open_directory(config.ckpt_dir, config.storage_options)
    where = source and (source.path if source.is_local else source.url)
    return _digest([where, settings])


def identify_export(
    config: ExportConfig,
    objects: Objects,
    checkpoint: Checkpoint | None,
    source: Directory | None,
    told: Told,
) -> str:
    """Return what an export is known by, from all that shapes its package but the code of the caller's objects. Rank 0.

    Args:
        config: the settings.
        objects: of which only the types count.
        checkpoint: the source's tables as they are exported; None without any.
        source: the checkpoint's directory; None for a model in memory, which is like no other.
        told: what else shapes the package.

    Raises:
        PlanError: more shards than ids can go to.
    """
    num_shards = None
    if checkpoint is not None and config.need_export_sparse and config.filter_sparse_opt:
        num_shards = resolve_num_shards(checkpoint, config.num_shards or "world_size", world_size=told.world_size)
    # an export into the checkpoint itself writes these, and none of them shapes a package
    files = {name: file for name, file in told.small_files.items() if name != MERGED}
    if source is not None and checkpoint is None:  # no fingerprint tells of the files that hold its dense parameters
        its = [name for name in source.names() if name not in (MANIFEST, MERGED, FG)]
        files |= {name: SourceFile.of(name, stat) for name, stat in source.find_many(its).items()}
    tables = () if checkpoint is None else [(table.name, table.name_in_source) for table in checkpoint.tables]
    kinds = [f"{type(its).__module__}.{type(its).__qualname__}" for its in (objects.model, objects.dataset)]
    versions = {name: f"{file.size} {file.version}" for name, file in files.items()}
    # a file that is written anew at its old size and with its old time of modification is another one by its trace
    every = [*files.values(), *(() if checkpoint is None else checkpoint.files)]
    traces = [(file.name, file.trace) for file in sorted(every, key=lambda file: file.name) if file.trace]
    lists = [_digest_list(rule.path, config.storage_options) for rule in parse_rules(config.prune) if rule.path]
    fingerprint = "" if checkpoint is None else checkpoint.fingerprint
    of_source = _digest(
        [fingerprint, versions, tables, kinds, objects.fg is not None, told.confs, num_shards, lists, traces]
    )
    return f"xxh3:{identify_settings(config)}-{of_source}"


def has_settings(manifest: Manifest, config: ExportConfig) -> bool:
    """Whether a package was exported with these settings, from whatever state of the source."""
    return str(manifest.run.get("identity", "")).startswith(f"xxh3:{identify_settings(config)}-")


def _digest(values: Any) -> str:
    # not with sorted keys: the order of patterns counts
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(values, enc_hook=_digest_object))


def _digest_object(value: Any) -> str:
    """Return a digest of an object that is no plain value, as Python callers may give; without one a word of no other export."""
    return digest_value(value).digest or uuid.uuid4().hex


def _digest_arguments(arguments: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, _digest_object(value)) for name, value in sorted(arguments.items())]


def find_incomparable(config: UserCallables) -> str:
    """Return why no package counts as this very export, whatever is in it, as a sentence; empty where one may."""
    for setting in ARGUMENTS:
        for name, value in getattr(config, setting).items():
            if unknown := digest_value(value).unknown:
                return (
                    f"{setting}.{name} holds a {unknown}, whose content cannot be compared: so no package counts as already "
                    "exported"
                )
    return ""


def _digest_list(path: str, storage_options: dict[str, Any] | None) -> str:
    """Return the digest of a list of ids; empty where it cannot be read, as whoever reads it tells."""
    folder, _, name = path.rpartition("/")
    try:
        options = storage_options if "://" in path else None
        return digest_file(
            open_directory(folder or ("/" if path.startswith("/") else "."), options, follow_links=True), name
        )
    except OSError:
        return ""
