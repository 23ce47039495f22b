"""What a directory is, and what its names, sizes, manifests and headers say: read and compared by rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dist_export.checkpoint.recis.model_pt import describe_dense_state
from dist_export.errors import CheckpointError, DistExportError, PackageError, UserError
from dist_export.formats.dtypes import I64
from dist_export.formats.recis import DENSE_STATE, ID_SLOT, INDEX, MERGED, TENSORKEY
from dist_export.formats.row_encodings import U8
from dist_export.humanize import count
from dist_export.manifest import MANIFEST, Manifest
from dist_export.package.reader import Package, is_sound_encoding
from dist_export.storage.directory import WORK_DIRECTORY, Directory
from dist_export.verify.blocks import Blocks, read_blocks
from dist_export.verify.files import check_sizes, find_parts
from dist_export.verify.finite import BITS
from dist_export.verify.indexed_tables import list_numbered
from dist_export.verify.listing import (
    SHARD,
    Listing,
    check_listing,
    check_package_files,
    check_recis_files,
    list_files,
)
from dist_export.verify.manifest_tables import check_tables
from dist_export.verify.merged_manifest import DenseState, check_merged
from dist_export.verify.parts import FoundParts, check_parts, check_prefixes
from dist_export.verify.report import Report
from dist_export.verify.work_split import Work

_DAMAGE = (DistExportError, OSError, ValueError, OverflowError, RecursionError)
"""What a damaged directory may make a check raise. Anything else is a bug of ours, and keeps its traceback."""


CHANGED = "was replaced or changed while it was being checked, so nothing can be said of it"


class Survey:
    """What rank 0 knows of the directory: its metadata before the payload is read, and the report."""

    def __init__(self, directory: Directory, *, finite: bool) -> None:
        self.report = Report()
        self.directory = directory
        self.is_finite_asked = finite
        self.package: Package | None = None
        """With its manifest; None where there is none that can be read."""
        self.blocks: Blocks | None = None
        self.id_rows = np.zeros(0, np.int64)
        """The rows of ``blocks`` that are columns of ids, in the order of the work."""
        self.value_rows = np.zeros(0, np.int64)
        """Those whose values are to be finite."""
        self.bad: frozenset[str] = frozenset()
        """Files that something is wrong with, so that they are not read: it has been told."""

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None where there is none that can be read."""
        return None if self.package is None else self.package.manifest

    def refuse_replaced(self) -> None:
        """Refuse a package that was not the same all the while: what was found is of neither. UserError. At the end."""
        if self.package is not None and not self.package.files.is_current():
            raise UserError(f"{self.directory.url}: {CHANGED}; run verify again")

    def take(self) -> Work | None:
        """Read and compare all metadata; return what is to be read of the payload, None where nothing is.

        Raises:
            UserError: it cannot be looked at, or is nothing that can be checked.
        """
        report, directory = self.report, self.directory
        try:
            self._recognize()
            if report.kind == "interrupted export":
                return None
            listing = list_files(directory, is_deep=report.kind == "package")
        except OSError as error:  # a store that is not reached or lets nobody in is no unsound package
            raise UserError(
                f"{error.filename or directory.url} cannot be read: {error.strerror or error}. Nothing was checked"
            ) from error
        check_listing(listing, report)
        to_hash: tuple[tuple[str, int, str], ...] = ()
        self.bad = frozenset(path for path in listing.files if listing.leads_out(path))
        if self.manifest is not None:
            to_hash, self.bad = check_sizes(directory, self.manifest, listing, report)
        parts: FoundParts | None = None
        if self.manifest is None or self.manifest.mode != "dense_only":
            parts = self.guard(INDEX, lambda: self._compare(listing))
        elif self.manifest is not None:
            check_package_files(listing, self.manifest, (), report)
        return self._plan(to_hash, parts)

    def _recognize(self) -> None:
        """Find out what the directory is. UserError where it is nothing that can be checked."""
        directory, report = self.directory, self.report
        names = directory.names()
        # also one that is no file: whoever made that meant to have a package
        if os.path.lexists(directory.join(MANIFEST)) if directory.is_local else MANIFEST in names:
            try:
                self.package = Package(directory)
            except PackageError as error:
                message = str(error).removeprefix(directory.describe(MANIFEST)).removeprefix(":").strip()
                report.add(MANIFEST, "manifest", message)
            except OSError as error:
                report.add(MANIFEST, "manifest", f"cannot be read: {error.strerror or error}")
        elif directory.exists(WORK_DIRECTORY):
            report.kind = "interrupted export"
            report.add(
                MANIFEST,
                "manifest",
                f"no {MANIFEST}, so this is no package: its export did not finish ({WORK_DIRECTORY} is there); run it again",
            )
        elif {INDEX, TENSORKEY, MERGED} & set(names) or any(map(SHARD.fullmatch, names)):
            report.kind = "RecIS directory"
            report.note(MANIFEST, "manifest", "is not there, so this is no package; checked as a directory of RecIS")
        elif not directory.exists():
            raise UserError(f"{directory.url}: {directory.say_missing()}")
        else:
            advice = directory.tell_folders() or ". Give the directory that holds them"
            raise UserError(
                f"{directory.url} is no package and nothing that RecIS wrote; looked for {MANIFEST}, {INDEX}, {TENSORKEY} and "
                f"model-*-of-*.safetensors{advice}"
            )

    def _compare(self, listing: Listing) -> FoundParts:
        """Read indexes and headers, and compare all that speaks of tables."""
        report, directory, manifest = self.report, self.directory, self.manifest
        listed = set() if manifest is None else {entry.path for entry in manifest.files}
        shards = [name for name in listing.shards() if manifest is None or name in listed]
        numbered = None if manifest is None else list_numbered(manifest)
        blocks = self.blocks = read_blocks(directory, shards, self.bad, report, numbered=numbered)
        is_new = manifest is not None and manifest.mode == "filter"
        if manifest is None:
            check_recis_files(listing, blocks.files if blocks.has_index else tuple(shards), report)
            if not blocks.has_index:
                self._note_mixed(shards)
        else:
            check_package_files(listing, manifest, blocks.files, report)
            for name in (INDEX, TENSORKEY, MERGED) if numbered is None or numbered.needs_index else (MERGED,):
                if name not in listed:
                    report.add(MANIFEST, "manifest", f"does not name {name}, so nothing vouches for it")
            for name in blocks.files:
                if blocks.has_index and name not in listed:
                    report.add(name, "manifest", "is in index, but not in the manifest")
        parts = check_parts(blocks, report, must_cover=is_new)
        if manifest is None:
            check_prefixes(blocks, report)
        dense_state = self._read_dense_state(listing)
        if MERGED not in self.bad:
            check_merged(
                directory,
                blocks,
                parts,
                report,
                is_ours=manifest is not None and manifest.mode != "in_place",
                must_be=manifest is not None,
                dense_state=dense_state,
            )
        if manifest is not None:
            check_tables(manifest, blocks, report)
        elif blocks.is_whole and not report.count():
            what = f"{count(len(blocks.files), 'shard')}, {count(len(blocks), 'block')}"
            report.checked.append(f"{what}: headers, index, tensorkey.json and merged manifest agree")
        if manifest is not None and not report.count():
            what = "headers, index, tensorkey.json" if numbered is None or numbered.needs_index else "headers"
            report.checked.append(f"{count(len(blocks.files), 'shard')}: {what} and merged manifest agree")
        return parts

    def _note_mixed(self, shards: list[str]) -> None:
        totals = sorted({found[1] for found in map(SHARD.fullmatch, shards) if found})
        if len(totals) > 1:
            self.report.note(
                shards[0],
                "stray",
                f"shards of {' and of '.join(totals)} files lie here, and no index tells which count",
            )

    def _read_dense_state(self, listing: Listing) -> DenseState | None:
        """Return what model.pt of a checkpoint holds; None where there is none, or none that can be read."""
        if DENSE_STATE not in listing.files or self.package is not None or listing.leads_out(DENSE_STATE):
            return None
        try:
            state = describe_dense_state(self.directory) or []
        except CheckpointError as error:
            message = str(error).removeprefix(self.directory.describe(DENSE_STATE)).strip()
            self.report.add(DENSE_STATE, "model.pt", message)
            return None
        self.report.checked.append(f"model.pt: {len(state)} tensors, readable with weights_only")
        return {name: (dtype, shape) for name, dtype, shape in state}

    def _plan(self, to_hash: tuple[tuple[str, int, str], ...], parts: FoundParts | None) -> Work:
        blocks = self.blocks
        in_parts = {} if self.manifest is None else find_parts(self.manifest, to_hash)
        if blocks is None or parts is None:
            return Work(digest_files=to_hash, digest_parts=in_parts)
        is_flat = np.array([not shape for shape in blocks.inner_shapes] + [False], bool)[blocks.inner]
        is_id = (
            (blocks.stem >= 0)
            & ~blocks.is_numbered
            & blocks.is_slot(ID_SLOT)
            & (blocks.dtype == I64)
            & is_flat
            & (blocks.rows >= 0)
        )
        self.id_rows = ids = np.flatnonzero(is_id)
        widths = self._row_widths(blocks)
        is_float = (np.isin(blocks.dtype, list(BITS)) | (widths > 0)) & (blocks.end > blocks.begin)
        self.value_rows = values = np.flatnonzero(is_float & self.is_finite_asked)
        return Work(
            digest_files=to_hash,
            digest_parts=in_parts,
            shards=blocks.files,
            id_file=blocks.file[ids].astype(np.int64),
            id_offset=blocks.begin[ids],
            id_rows=blocks.rows[ids],
            id_table=blocks.table[ids].astype(np.int64),
            id_slice=blocks.slices[blocks.slice[ids]],
            is_disjoint=parts.is_disjoint,
            value_file=blocks.file[values].astype(np.int64),
            value_offset=blocks.begin[values],
            value_bytes=(blocks.end - blocks.begin)[values],
            value_dtype=blocks.dtype[values].astype(np.int64),
            value_width=widths[values],
        )

    def _row_widths(self, blocks: Blocks) -> np.ndarray:
        """Return for each block the bytes of a row where its rows have scale and bias (int64), else 0."""
        widths = np.zeros(len(blocks), np.int64)
        stems = {name: number for number, name in enumerate(blocks.stems)}
        for table in self.manifest.tables if self.manifest is not None else ():
            for slot in table.kept:
                if is_sound_encoding(slot):
                    its = blocks.stem == stems.get((table.name, slot.name), -3)
                    its &= (blocks.dtype == U8) & (blocks.inner == _place_of(blocks, slot.shape))
                    widths[its] = slot.shape[0]
        return widths

    def guard(self, what: str, check: Callable[[], Any]) -> Any:
        """Return what a check returns; whatever a damaged directory makes it raise is a finding."""
        try:
            return check()
        except _DAMAGE as error:
            first = next(iter(str(error).strip().splitlines()), "")
            known = isinstance(error, DistExportError)
            self.report.add(what, "guard", first if known else f"cannot be checked: {type(error).__name__}: {first}")
            return None


def _place_of(blocks: Blocks, shape: tuple[int, ...]) -> int:
    return blocks.inner_shapes.index(shape) if shape in blocks.inner_shapes else -2
