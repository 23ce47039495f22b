"""The base of a delta: where it is, whether it fits, and which tables of the source are taken as it has them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.config.source_needs import BaseOfDelta, FittedBase
from dist_export.config.sparse_settings import LATEST
from dist_export.delta.mismatch import find_mismatch, row_indexed_in, state_of
from dist_export.errors import CommitError, ConfigError, DistExportError, ExportError, PackageError, PlanError
from dist_export.formats.recis import HASH_SIZE
from dist_export.manifest import MANIFEST, BaseEntry, Manifest, decode_manifest
from dist_export.package.local_cache import make_scratch
from dist_export.package.reader import Package, open_package
from dist_export.pipeline.older_rows import advise_compact, find_own_rows
from dist_export.pipeline.planning import choose, read_pruning
from dist_export.redact import first_line, redact_text
from dist_export.registry import base as registries
from dist_export.registry import bases
from dist_export.registry.versions import CURRENT
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory

EVERYTHING = "everything was exported"
"""Begins the note about a base that was to be used and was not."""


class FoundBase(NamedTuple):
    """What the setting ``base`` leads to."""

    directory: str | None = None
    """The package; None if everything is exported."""
    digest: str = ""
    """Of its manifest."""
    note: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with the directory in the place of what was given. Without one, those about its use are as if unset."""
        if self.directory:
            return {"base": self.directory}
        return {
            "base": None,
            "on_base_mismatch": "error",
            "compare": "fingerprints",
            "delta_ignore_slots": [],
            "delta_chain": 1,
        }


def find_base(config: BaseOfDelta, registry_options: dict[str, Any]) -> FoundBase:
    """Find the package that a delta goes on top of. Rank 0.

    Raises:
        ConfigError: there is none, or it cannot be read, and ``on_base_mismatch`` is ``error``.
    """
    if config.base is None:
        return FoundBase()
    try:
        uri = config.export_dir if config.base == LATEST else config.base
        directory = registries.resolve(uri, registry_options).directory
        manifest = _read_manifest(directory, config.options_of_target)
        if manifest.base is not msgspec.UNSET:
            directory, manifest = _choose_link(directory, manifest, config)
        if file := manifest.find_undigested():
            raise ConfigError(
                f"base {directory} does not fit: its {file} was written with digest: none, so nothing tells its rows from "
                "others. Nothing was written; export the base with digests, give another base, or set on_base_mismatch: full"
            )
    except DistExportError as error:
        if config.on_base_mismatch != "full":
            raise
        return FoundBase(note=f"{EVERYTHING}, because the base cannot be used: {first_line(error)}")
    place = open_directory(directory, config.options_of_target)
    # a link may lead elsewhere later, and whoever removes versions must know which one is meant
    return FoundBase(os.path.realpath(place.path) if place.is_local else directory, manifest.digest)


def find_committed_base(export_dir: str, storage_options: dict[str, Any]) -> FoundBase | None:
    """Return the base of the package in ``export_dir``; None if there is no package. Rank 0.

    The same export again is of the same base, even if ``latest`` is another package by now.
    """
    manifest = _read_committed(export_dir, storage_options)
    if manifest is None:
        return None
    if manifest.base is not msgspec.UNSET:
        return FoundBase(manifest.base.path, manifest.base.digest)
    misfit = manifest.run.get("misfit", ())
    is_told = isinstance(misfit, list) and len(misfit) == 2 and all(isinstance(its, str) for its in misfit)
    return FoundBase(*misfit) if is_told else FoundBase()


def has_lost_base(export_dir: str, storage_options: dict[str, Any]) -> bool:
    """Return whether the package in ``export_dir`` is a delta whose base is not where it was. Rank 0. ConfigError."""
    manifest = _read_committed(export_dir, storage_options)
    if manifest is None or manifest.base is msgspec.UNSET:
        return False
    place = open_directory(manifest.base.path, storage_options)
    found = bases.read_manifest(place)
    if found is None or found.digest != manifest.base.digest:
        return True
    links, lack = bases.follow(place, found)
    return bool(lack) or any(its.find_undigested() for _, its in links)


def _read_committed(export_dir: str, storage_options: dict[str, Any]) -> Manifest | None:
    if not open_directory(export_dir, storage_options).exists(MANIFEST):
        return None
    try:
        return _read_manifest(export_dir, storage_options)
    except ConfigError:  # whoever looks at export_dir says what is wrong with it
        return None


def _read_manifest(directory: str, storage_options: dict[str, Any]) -> Manifest:
    package = open_directory(directory, storage_options)
    try:
        return decode_manifest(package.read_text(MANIFEST), where=package.describe(MANIFEST))
    except PackageError as error:
        raise ConfigError(f"base {error}. Give another base, or set on_base_mismatch: full") from error
    except FileNotFoundError:
        other = f"versions:{directory}" if package.exists(CURRENT) else "a package"
        raise ConfigError(
            f"base {package.describe(MANIFEST)}: there is no such file, so that is no package; give {other}"
        ) from None
    except OSError as error:
        raise ConfigError(f"base {package.describe(MANIFEST)} cannot be read: {error.strerror or error}") from error


def _choose_link(directory: str, manifest: Manifest, config: BaseOfDelta) -> tuple[str, Manifest]:
    """Return what a delta goes on top of, where ``base`` is a delta itself: that one, or the full package at the bottom.

    ConfigError if something below is not there.
    """
    links, lack = bases.follow(open_directory(directory, config.options_of_target), manifest)
    if lack:
        raise ConfigError(f"base {config.base} {lack}; give another base")
    if config.is_refresh:
        _refuse_rows(links, config)
    place, found = links[-1] if len(links) > config.delta_chain else links[0]
    return place.location.given, found


def _refuse_rows(links: Sequence[tuple[Directory, Manifest]], config: BaseOfDelta) -> None:
    """Refuse a base of a dense part alone with rows that the full package below lacks: it would take them back. ConfigError."""
    manifests, is_latest = [manifest for _, manifest in links], config.base == LATEST
    name = config.export_dir if is_latest else str(config.base)
    for place, manifest in links[:-1]:
        if (found := find_own_rows(manifest)) is None:
            continue
        table, its = found
        full = links[-1][0].location.given
        given = links[0][0]
        which = f"is {given.location.given}, " if is_latest else "is "
        which += "a delta" if place is given else f"on top of {place.location.given}, a delta"
        again = f"; or give base: {full}, if its rows are to be served again"
        raise ConfigError(
            f"base {config.base} {which} with {its.changed:,} changed, {its.new:,} new and {its.deleted:,} deleted rows of table "
            f"{table!r}, and without tables (need_export_sparse: false) serving would go back to the rows of {full}. "
            f"{advise_compact(manifests, name, is_latest=is_latest)}{'' if is_latest else again}"
        )


def refuse_replaced_base(base: Package) -> None:
    """Refuse to publish a delta whose base, or what that needs, is there no more, before the commit. Rank 0. CommitError."""
    for layer in base.layers:
        where = layer.directory.describe(MANIFEST)
        try:
            found = decode_manifest(layer.directory.read_text(MANIFEST), where=where).digest
        except (OSError, PackageError) as error:
            found = str(error)
        if found != layer.manifest.digest:
            raise CommitError(
                f"{where}: the base had the manifest {layer.manifest.digest} when the export began, and now there is {found}. "
                "No manifest was written; export against the base that is there"
            )


def describe_base(base: Package, *, has_dense: bool = False) -> BaseEntry:
    """Return how a manifest names another package. ``has_dense``: all that is no table is that package's."""
    directory = base.directory
    return BaseEntry(
        path=redact_text(directory.path if directory.is_local else directory.url),
        digest=base.manifest.digest,
        has_dense=has_dense or msgspec.UNSET,
    )


def open_base(
    ranks: Ranks, config: BaseOfDelta, digest: str, final: Directory, *, held: contextlib.ExitStack
) -> Package | None:
    """Open the base, which is the directory ``config.base``; None without one. All ranks. ``final`` is export_dir.

    ``held`` closes it. The ids, row indexes and fingerprints of a base in a store that a rank asks for are in its TMPDIR until
    then: rows are compared in pieces, of which each needs them.

    Raises:
        ConfigError: it is the base, which the delta would replace.
        ExportError: a rank finds another package there.
    """
    path, storage_options = config.base, config.options_of_target
    if path is None:
        return None

    def open_it() -> Package:
        directory = open_directory(path, storage_options)
        if final.is_same(directory):
            raise ConfigError(
                f"base {path} is export_dir, so that the delta would take its place; give another export_dir"
            )
        package = open_package(path, storage_options=storage_options, cache_dir=make_scratch(directory, held))
        held.callback(package.close)
        if any(final.is_same(layer.directory) for layer in package.layers):
            raise ConfigError(
                f"base {path} needs export_dir, whose place the delta would take; give another export_dir"
            )
        if package.manifest.digest != digest:
            raise ExportError(
                f"base {path}: the package with the manifest {package.manifest.digest} is there, and rank 0 found {digest}. "
                "Nothing was written; see that all ranks share the directory and that nobody replaces it, and export again"
            )
        return package

    return ranks.check("open the base", open_it)


def fit_base(
    ranks: Ranks, checkpoint: Checkpoint, config: FittedBase, base: Package | None, *, world_size: int
) -> tuple[Checkpoint, Package | None, list[str]]:
    """Compare the tables with those of the base. All ranks.

    Returns:
        The checkpoint as the delta takes it; the base, None if everything is to be exported; and notes.

    Raises:
        PlanError: the base does not fit, and ``on_base_mismatch`` is ``error``.
    """
    if base is None:
        return checkpoint, None, []
    # rules for tables whose rows go by number are refused here, before these become hash tables
    pruning = ranks.check("read the rules for rows", lambda: read_pruning(checkpoint, config))
    state = state_of([layer.manifest for layer in base.layers])
    by_number = row_indexed_in(state)
    fitting = number_rows(checkpoint, by_number)

    def compare() -> str | None:
        for table, rules in zip(fitting.tables, pruning.rules, strict=True):
            if rules and table.name in by_number:
                return f"its table {table.name!r} is row-indexed, of which no row can be deleted, and prune has a rule for it"
        return find_mismatch(fitting, choose(fitting, config, world_size)[0], state)

    reason = ranks.check("compare the tables with the base", compare)
    if reason is None:
        return fitting, base, []
    told = f"base {config.base} does not fit: {reason}"
    if config.on_base_mismatch != "full":
        raise PlanError(f"{told}. Nothing was written; give another base, or set on_base_mismatch: full")
    return checkpoint, None, [f"{EVERYTHING}: {told}"]


def number_rows(checkpoint: Checkpoint, names: frozenset[str]) -> Checkpoint:
    """Return the checkpoint with some of its row-indexed tables as hash tables of row numbers, as ``to_hash_tables`` does."""
    becomes_hash = np.array([not table.is_hashed and table.name in names for table in checkpoint.tables], bool)
    if not becomes_hash.any():
        return checkpoint
    parts = checkpoint.parts
    changed = becomes_hash[parts.table]
    return replace(
        checkpoint,
        tables=tuple(
            replace(table, is_hashed=True) if becomes else table
            for table, becomes in zip(checkpoint.tables, becomes_hash.tolist(), strict=True)
        ),
        parts=replace(
            parts,
            begin=np.where(changed, 0, parts.begin),
            end=np.where(changed, HASH_SIZE, parts.end),
            size=np.where(changed, HASH_SIZE, parts.size),
        ),
    )
