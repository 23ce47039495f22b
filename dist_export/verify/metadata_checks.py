"""Find out what a directory is, and read and compare its names, sizes, manifests and headers. Rank 0."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np

from dist_export.checkpoint.recis.model_pt import describe_dense_state
from dist_export.errors import CheckpointError, DistExportError, PackageError, UserError, WrongBaseError
from dist_export.formats.dtypes import I64
from dist_export.formats.package_signs import list_side_files
from dist_export.formats.recis import DENSE_STATE, ID_SLOT, INDEX, MERGED, TENSORKEY
from dist_export.formats.row_encodings import U8
from dist_export.formats.tuning import STANDARD
from dist_export.humanize import count, few
from dist_export.manifest import MANIFEST, SCORE_FOLDER, Manifest
from dist_export.package.reader import Package
from dist_export.package.stored_rows import is_sound_encoding
from dist_export.storage.directory import WORK_DIRECTORY, Directory
from dist_export.verify.blocks import Blocks, read_blocks
from dist_export.verify.delta import open_base
from dist_export.verify.files import check_sizes, find_parts
from dist_export.verify.finite import BITS
from dist_export.verify.indexed_tables import list_row_indexed
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
from dist_export.verify.row_fingerprints import find_fingerprinted_parts
from dist_export.verify.row_indexes import find_indexed_parts
from dist_export.verify.work_split import Work

_DAMAGE = (DistExportError, OSError, ValueError, OverflowError, RecursionError)
"""Errors that a check may raise for a damaged directory. Any other error is a bug, and keeps its traceback."""


CHANGED = "was replaced or changed while it was being checked, so nothing can be said of it"


class Survey:
    """The state of a verification on rank 0: the metadata of the directory, and the report."""

    def __init__(
        self,
        directory: Directory,
        *,
        finite: bool,
        base: Directory | None = None,
        json_bytes: int = STANDARD.json_bytes,
    ) -> None:
        """Begin; nothing is read. ``base``: where the base of a delta package is; by default it is searched for."""
        self._json_bytes = json_bytes
        self.report = Report()
        self._given_base = base
        self.directory = directory
        self.is_finite_asked = finite
        self.package: Package | None = None
        """The package with its manifest; None if there is no readable one."""
        self.blocks: Blocks | None = None
        self.id_rows = np.zeros(0, np.int64)
        """The rows of ``blocks`` that are id columns, in the order of the work."""
        self.value_rows = np.zeros(0, np.int64)
        """The rows of ``blocks`` whose values should be finite."""
        self.bad: frozenset[str] = frozenset()
        """Files with a finding. They are not read."""

    @property
    def manifest(self) -> Manifest | None:
        """The manifest; None if there is no readable one."""
        return None if self.package is None else self.package.manifest

    def refuse_replaced(self) -> None:
        """Raise UserError if the package changed during the verification, because the findings mix two states. At the end."""
        if self.package is not None and not self.package.files.is_current():
            raise UserError(f"{self.directory.url}: {CHANGED}; run verify again")

    def take(self) -> Work | None:
        """Read and compare all metadata, and return the payload to read; None if there is nothing to read.

        Raises:
            UserError: the directory cannot be read, or holds nothing that can be checked.
        """
        report, directory = self.report, self.directory
        try:
            self._recognize()
            if report.kind in ("interrupted export", "package without manifest"):
                return None
            listing = list_files(directory, is_deep=report.kind == "package")
        except OSError as error:  # an unreachable store does not make a package unsound
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
        if self.package is not None and self.package.is_delta:
            package = self.package
            self.guard(MANIFEST, lambda: open_base(package, self._given_base, report))
        elif self._given_base is not None:
            raise UserError(f"{directory.url} is no delta package, so it has no base; leave base out")
        return self._plan(to_hash, parts)

    def _recognize(self) -> None:
        """Find out what the directory is. Raises UserError if it holds nothing that can be checked."""
        directory, report = self.directory, self.report
        names = directory.names()
        # a manifest that is no regular file counts too, because a package was meant
        if os.path.lexists(directory.join(MANIFEST)) if directory.is_local else MANIFEST in names:
            try:
                self.package = Package(directory, opens_base=False)
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
        elif signs := list_side_files(names) + [f"{name}/" for name in directory.folders() if name == SCORE_FOLDER]:
            report.kind = "package without manifest"
            report.add(
                MANIFEST,
                "manifest",
                f"is not there, and {few(signs)} of a package {'is' if len(signs) == 1 else 'are'}: nothing says what its files "
                "must be, nor whether it is a delta. Copy the package again, or export again; if this is a checkpoint, "
                "remove the files that an export put there",
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
        """Read indexes and headers, and compare everything that describes tables."""
        report, directory, manifest = self.report, self.directory, self.manifest
        listed = set() if manifest is None else {entry.path for entry in manifest.files}
        shards = [name for name in listing.shards() if manifest is None or name in listed]
        row_indexed = None if manifest is None else list_row_indexed(manifest)
        blocks = self.blocks = read_blocks(directory, shards, self.bad, report, row_indexed=row_indexed)
        is_new = manifest is not None and manifest.mode == "filter"
        if manifest is None:
            check_recis_files(listing, blocks.files if blocks.has_index else tuple(shards), report)
            if not blocks.has_index:
                self._note_mixed(shards)
        else:
            check_package_files(listing, manifest, blocks.files, report)
            for name in (INDEX, TENSORKEY, MERGED) if row_indexed is None or row_indexed.needs_index else (MERGED,):
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
                piece_bytes=self._json_bytes,
            )
        if manifest is not None:
            check_tables(manifest, blocks, report)
        elif blocks.is_whole and not report.count():
            what = f"{count(len(blocks.files), 'shard')}, {count(len(blocks), 'block')}"
            report.checked.append(f"{what}: headers, index, tensorkey.json and merged manifest agree")
        if manifest is not None and not report.count():
            what = "headers, index, tensorkey.json" if row_indexed is None or row_indexed.needs_index else "headers"
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
        """Return the parameters in model.pt of a checkpoint; None if it is missing or cannot be read."""
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
            & ~blocks.is_row_indexed
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
            indexes=() if self.manifest is None else find_indexed_parts(self.manifest, blocks, self.report),
            fingerprints=()
            if self.manifest is None
            else find_fingerprinted_parts(self.manifest, blocks, self.bad, self.report),
        )

    def _row_widths(self, blocks: Blocks) -> np.ndarray:
        """Return for each block the bytes of a row (int64) if its rows have scale and bias, else 0."""
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
        """Run a check and return its result. If it raises because the directory is damaged, add a finding and return None."""
        try:
            return check()
        except WrongBaseError:
            raise
        except _DAMAGE as error:
            first = next(iter(str(error).strip().splitlines()), "")
            known = isinstance(error, DistExportError)
            self.report.add(what, "guard", first if known else f"cannot be checked: {type(error).__name__}: {first}")
            return None


def _place_of(blocks: Blocks, shape: tuple[int, ...]) -> int:
    return blocks.inner_shapes.index(shape) if shape in blocks.inner_shapes else -2
