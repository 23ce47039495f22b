"""What ``ckpt_dir`` and ``export_dir`` mean: paths, URIs of a model registry, or a training run with many checkpoints."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import msgspec
import xxhash

from dist_export.checkpoint.detect import PACKAGE, RECIS, detect_format
from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.checkpoint.package_source import find_manifest, find_package
from dist_export.config.prune_rules import parse_rules
from dist_export.config.schema import ExportConfig
from dist_export.config.source_needs import RegisteredExport, Registries
from dist_export.config.sparse_settings import LATEST
from dist_export.errors import ConfigError
from dist_export.manifest import Manifest
from dist_export.pipeline.base_package import FoundBase, find_base, find_committed_base, has_lost_base
from dist_export.pipeline.identity import HOW
from dist_export.pipeline.older_rows import NewRows, refuse_older_rows
from dist_export.pipeline.run_dir import FoundCheckpoint, find_checkpoint
from dist_export.pipeline.taken_back import refuse_taken_back
from dist_export.pipeline.trainer_delta import find_dumps, is_trainer_delta, list_steps, stat_dumps
from dist_export.redact import redact_text
from dist_export.registry import base, bases
from dist_export.registry.versions import SCHEME, refuse_needed
from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.urls import open_directory, open_place


@dataclass(frozen=True, slots=True, kw_only=True)
class Locations:
    """What the two settings stand for; the same on all ranks."""

    ckpt_dir: str | None
    """The checkpoint's own directory; None for a model in memory."""
    export_dir: str
    source_uri: str
    """The registry's version that ``ckpt_dir`` is; empty for a path."""
    filter_sparse_opt: bool
    """Whether new shards are written; the setting, or what it is by default for the checkpoint's format."""
    step: int | None
    """Of a training run's checkpoint, or what a package says of itself; None if nothing tells."""
    rows_step: int | msgspec.UnsetType | None
    """As a manifest has it: the step of a package's rows, if it is not ``step``."""
    is_run: bool
    """Whether ``step`` is that of a training run's checkpoint, or was asked for."""
    register: str
    """The registry's URI under which the package becomes a new version; empty for none."""
    seen: str
    """The state of that registry before the export; empty if it has none."""
    base: FoundBase
    """What a delta goes on top of."""
    notes: tuple[str, ...]

    def apply(self, config: ExportConfig) -> ExportConfig:
        """Return the settings with paths in the place of what was given, and with what the format decides."""
        return config.with_changes(
            ckpt_dir=self.ckpt_dir,
            export_dir=self.export_dir,
            register=self.register or None,
            filter_sparse_opt=self.filter_sparse_opt,
            **self.base.settings,
        )


def locate(
    config: ExportConfig,
    *,
    needs_dense: bool,
    weights: ModelWeights | None = None,
    found: FoundCheckpoint | None = None,
) -> Locations:
    """Ask the registries and look into the run, once: an alias may move while an export runs. Rank 0.

    ``needs_dense``: a dense arch is exported too, of a model that says ``weights`` of a checkpoint's tensors. ``found`` is what
    ``ckpt_dir`` leads to; None looks into it for a checkpoint.

    Raises:
        ConfigError: a URI that no registry resolves; a setting that needs new shards, where files are copied.
        CheckpointError: no complete checkpoint, or none of the step; one that looks like several formats.
    """
    is_known = found is not None  # of the package that is compacted
    if config.ckpt_dir is None:  # a model in memory
        resolved, found = base.Resolved("", ""), FoundCheckpoint(None, None, ())
    else:
        resolved = base.resolve(config.ckpt_dir, config.registry_options)
        if found is None and is_trainer_delta(config.format):
            found = find_dumps(resolved.directory, config, until_step=config.until_step)
        elif found is None:
            found = find_checkpoint(
                config, resolved.directory, step=config.step, needs_dense=needs_dense, weights=weights
            )
    config = config.with_changes(filter_sparse_opt=_resolve_filter(config, found.directory))
    register, export_dir = config.register or "", config.export_dir
    _refuse_two_registries(config.export_dir, register)
    options = options_for_registries(config)
    found_base, given = find_base(config, options), config
    is_latest = config.base == LATEST  # another package each time, and yet the same export
    config = config if is_latest else config.with_changes(**found_base.settings)
    target, notes = base.find_registry(config.export_dir, options), list(found.notes)
    if target is not None:
        register = register or config.export_dir
        export_dir = _place(target, config, found, notes)
        if is_latest:
            found_base = find_committed_base(export_dir, config.options_of_target) or found_base
    seen = _look_at_registry(register, options, export_dir) if register else ""
    step, rows_step = _find_steps(config, found, is_compacted=is_known)
    rows, publish = _find_rows(config, found_base, rows_step), register if base.scheme_of(register) == SCHEME else ""
    if publish and rows:
        notes += refuse_older_rows(rows, publish, options, config.options_of_target, export_dir=export_dir)
    if is_trainer_delta(config.format) and found_base.directory is not None:
        steps = list_steps(resolved.directory, config)
        stores, below = (options, config.options_of_target), found_base.directory
        refuse_taken_back(given, *stores, steps, base=below, export_dir=export_dir, publish=publish)
    if config.overwrite:
        refuse_needed(open_directory(export_dir, config.options_of_target))
    is_in_run = found.step is not None and found.directory != resolved.directory
    notes += [found_base.note] if found_base.note else []
    notes += [f"ckpt_dir is a training run; this is its step {found.step}, {found.directory}"] if is_in_run else []
    return Locations(
        ckpt_dir=found.directory,
        export_dir=export_dir,
        filter_sparse_opt=bool(config.filter_sparse_opt),
        source_uri=resolved.uri if resolved.uri != resolved.directory else "",
        step=step,
        rows_step=rows_step,
        is_run=found.step is not None,
        register=register,
        seen=seen,
        base=found_base,
        notes=tuple(notes),
    )


def _refuse_two_registries(export_dir: str, register: str) -> None:
    """Refuse a package that would be in one registry alone, or not where the directory of versions looks for it."""
    if not register:
        return
    if base.scheme_of(export_dir) == SCHEME:
        raise ConfigError(
            f"the package is published to {export_dir} and registered as {register}; one export does one of the two"
        )
    if base.scheme_of(register) == SCHEME:
        raise ConfigError(
            f"register is {register}, whose packages are in that directory, and export_dir is {export_dir}; "
            "leave both out and set publish"
        )


def _look_at_registry(register: str, options: dict[str, Any], export_dir: str) -> str:
    """Return what a registry says before the export. ConfigError where it cannot take the package."""
    base.require(register, options)
    _refuse_credentials(export_dir)
    return base.look(register, options)


def _refuse_credentials(export_dir: str) -> None:
    """Refuse credentials in the URL of a package that a registry gets."""
    if redact_text(export_dir) != export_dir:
        raise ConfigError(
            f"export_dir {redact_text(export_dir)} has credentials in its URL, which a registry would show to everybody; put "
            "them into target_storage_options"
        )


def _resolve_filter(config: ExportConfig, ckpt_dir: str | None) -> bool:
    """Return whether new shards are written, where the setting is null by the checkpoint's format."""
    if config.is_refresh:
        return True
    if config.filter_sparse_opt is not None or ckpt_dir is None:
        return config.filter_sparse_opt is not False
    directory = open_place(ckpt_dir, config.storage_options, follow_links=config.follow_links)
    found = detect_format(directory, asked=config.format)
    if found is None:  # a RecIS checkpoint of dense parameters alone, or no checkpoint, which its reader says
        return config.need_export_sparse
    return found != RECIS or find_package(directory) is not None


_RowsStep: TypeAlias = int | msgspec.UnsetType | None
"""As a manifest has it."""


def _find_steps(config: ExportConfig, found: FoundCheckpoint, *, is_compacted: bool) -> tuple[int | None, _RowsStep]:
    """Return the step of the source and, where it is another one, that of its rows: a package says both. CheckpointError."""
    if found.directory is None or is_trainer_delta(config.format):
        return found.step, msgspec.UNSET
    directory = open_place(found.directory, config.storage_options, follow_links=config.follow_links)
    if is_compacted:
        manifest = bases.read_manifest(directory)
    elif detect_format(directory, asked=config.format) not in (RECIS, PACKAGE):
        return found.step, msgspec.UNSET
    else:
        manifest = find_manifest(directory)
    if manifest is None or manifest.mode == "in_place":  # there a trainer may have saved anew
        return found.step, msgspec.UNSET
    source = manifest.source
    step = source.dense_step if found.step is None else found.step
    is_silent = source.dense_step is None and source.rows_step is msgspec.UNSET
    return step, msgspec.UNSET if is_silent or source.step_of_rows == step else source.step_of_rows


def _find_rows(config: ExportConfig, found_base: FoundBase, rows_step: _RowsStep) -> NewRows | None:
    """Return what is known of the rows of the new package, if its own step does not tell; else None."""
    if not config.is_refresh:
        return None if isinstance(rows_step, msgspec.UnsetType) else NewRows(rows_step)
    path = found_base.directory
    manifest = None if path is None else bases.read_manifest(open_directory(path, config.options_of_target))
    if path is None or manifest is None:  # whoever opens the base says so
        return None
    return NewRows(manifest.source.step_of_rows, path, manifest.digest)


def register_package(config: RegisteredExport, locations: Locations, manifest: Manifest, directory: str) -> str:
    """Register a committed package; return the URI of its version, empty where none was asked for. Rank 0. ExportError."""
    if not locations.register:
        return ""
    dense = manifest.dense
    package = base.Registered(
        directory=_absolute(directory, config.options_of_target),
        source=redact_text(locations.source_uri or _absolute(locations.ckpt_dir or "", config.storage_options)),
        digest=manifest.digest,
        inputs=() if dense is None else tuple((t.name, t.dtype, t.shape) for t in dense.inputs),
        outputs=() if dense is None else tuple((t.name, t.dtype, t.shape) for t in dense.outputs),
        versions=manifest.versions,
        step=locations.step,
        seen=locations.seen,
        base="" if manifest.base is msgspec.UNSET else manifest.base.path,
    )
    again = "Run the same export again, which only registers it"
    if manifest.base is not msgspec.UNSET:
        again += ", or exports anew if its base is gone"
    if locations.ckpt_dir is None:  # the model may have changed since
        again = f"Register it by hand: another export of the model in memory would not be the same (digest {manifest.digest})"
    return base.register(locations.register, options_for_registries(config), package, advice=again)


def _absolute(url: str, options: dict[str, Any]) -> str:
    """Return a local path from the root on, for whoever reads it elsewhere; a store's URL, and an empty one, as it is."""
    directory = open_directory(url, options) if url else None
    return directory.path if directory is not None and directory.is_local else url


def options_for_registries(config: Registries) -> dict[str, Any]:
    """Return the options for registries, with those that a directory of versions takes from other settings."""
    own = {"storage_options": config.options_of_target, "keep_versions": config.keep_versions}
    given = config.registry_options.get(SCHEME)
    return {**config.registry_options, SCHEME: own | (dict(given) if isinstance(given, Mapping) else {})}


def _place(target: base.Registry, config: ExportConfig, found: FoundCheckpoint, notes: list[str]) -> str:
    """Return where a registry puts the package.

    With ``latest`` as base that is not where this very export has put a delta whose base is there no more: nobody can read it, as
    ``notes`` then say.
    """
    attempt = 0
    while True:
        export_dir = base.place(target, config.export_dir, key=_key_of(config, found, attempt))
        if config.base != LATEST or not has_lost_base(export_dir, config.options_of_target):
            return export_dir
        notes.append(
            f"{export_dir} is this export as a delta whose base is there no more, so it became another version"
        )
        attempt += 1


def _key_of(config: ExportConfig, found: FoundCheckpoint, attempt: int) -> str:
    """Return a name for the package of this checkpoint and these settings; of a model in memory, one that no other has.

    Of a version in a directory, it begins with the step or the time. Each ``attempt`` has another name.
    """
    is_version = base.scheme_of(config.export_dir) == SCHEME
    if found.directory is None:
        key = uuid.uuid4().hex[:16]
        return f"{time.strftime('%Y%m%dT%H%M%S')}-{key}" if is_version else key
    settings = [(name, value) for name, value in sorted(vars(config).items()) if name not in {*HOW, "ckpt_dir"}]
    lists = [_version_of(rule.path, config.storage_options) for rule in parse_rules(config.prune) if rule.path]
    # not with sorted keys: the order of patterns counts
    source: list[Any] = [_absolute(found.directory, config.storage_options), *([attempt] if attempt else [])]
    if is_version:  # a checkpoint at a path that is written again and again is a new version each time
        directory = open_place(found.directory, config.storage_options, follow_links=config.follow_links)
        source.append(
            sorted(
                (name, stat.size, stat.version)
                for name, stat in (stat_dumps if is_trainer_delta(config.format) else _stats)(directory).items()
            )
        )
    key = xxhash.xxh3_64_hexdigest(msgspec.json.encode([*source, config.num_shards, settings, lists]))
    return f"{found.step}-{key}" if is_version and found.step is not None else key


def _stats(directory: Directory) -> dict[str, FileStat]:
    return directory.stat_many(directory.names())


def _version_of(path: str, storage_options: dict[str, Any] | None) -> str:
    """Return what tells one content of a list from another; empty where it cannot be looked at, as whoever reads it tells."""
    folder, _, name = path.rpartition("/")
    try:
        found = open_directory(folder or ".", storage_options if "://" in path else None, follow_links=True).stat(name)
    except OSError:
        return ""
    return f"{found.size} {found.version}"
