"""A package as the source of another one: its tables as they were written, and what their manifest says of them.

A package of hash tables alone is read as RecIS's own reader reads it. One that has tables by row number is read by the merged
manifest too. What the first export cast away is not there any more, and the manifest is asked so that nothing is mistaken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import xxhash

from dist_export.checkpoint.metadata import Checkpoint, CheckpointReader, SourceFile, TableMeta
from dist_export.checkpoint.package_reader import PackageReader
from dist_export.checkpoint.payload import Payload
from dist_export.errors import CheckpointError, PackageError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.package_signs import list_deleted_ids, list_side_files
from dist_export.formats.recis import DENSE_STATE, EMBEDDING_SLOT
from dist_export.formats.row_encodings import INT8_ROWWISE, U8
from dist_export.formats.source_entry import PRUNED, RENAMED
from dist_export.humanize import few
from dist_export.manifest import MANIFEST, Manifest, SlotEntry, TableEntry, decode_manifest
from dist_export.storage.directory import WORK_DIRECTORY, Directory

_OF_CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".distcp", ".metadata")
"""Ends of the names of files that may hold tensors of a checkpoint."""
_OBJECTS = msgspec.json.Decoder(dict[str, Any])


def find_package(directory: Directory) -> Manifest | None:
    """Return the manifest of a package that was written anew; None for what is none, or is a checkpoint with one beside it.

    CheckpointError as :func:`find_manifest`.
    """
    manifest = find_manifest(directory)
    if manifest is None:
        return None
    # an encoding and what casts took are told by no shard, and a copy of a package has them too
    is_needed = manifest.mode == "filter" or any(
        slot.encoding is not msgspec.UNSET or slot.casts or slot.is_ignored is True
        for table in manifest.tables
        for slot in table.kept
    )
    return manifest if is_needed else None


def list_earlier(directory: Directory) -> tuple[str, ...]:
    """Return the settings by which names or rows of a package are not those of its checkpoint; none for what is no package.

    CheckpointError as :func:`find_manifest`.
    """
    manifest = find_package(directory)
    if manifest is None:
        return ()
    found = [RENAMED] if any(table.source_name is not msgspec.UNSET for table in manifest.tables) else []
    found += [PRUNED] if manifest.prune is not msgspec.UNSET else []
    before = () if manifest.source.earlier is msgspec.UNSET else manifest.source.earlier
    return tuple(sorted({*found, *before}))


def find_manifest(directory: Directory) -> Manifest | None:
    """Return the manifest of a package with tables, also of a copy and of one in its checkpoint; None for what is none.

    Raises:
        CheckpointError: the manifest is one of ours, and damaged, cannot be read, or is that of a delta package.
    """
    try:
        raw = directory.read_text(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        where = error.filename or directory.describe(MANIFEST)
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
    try:
        if _OBJECTS.decode(raw).get("format") != "dist_export":
            return None
        manifest = decode_manifest(raw, where=directory.describe(MANIFEST))
    except msgspec.MsgspecError:
        return None
    except PackageError as error:
        raise CheckpointError(str(error)) from None
    if manifest.base is not msgspec.UNSET:
        raise CheckpointError(
            f"{directory.url} is a delta package of {manifest.base.path}, whose rows alone are not the model. Export from the "
            "checkpoint that it was made of, or make a full package of both first: python -m dist_export compact DELTA OUT"
        )
    return manifest if manifest.tables else None


def note_lost_manifest(directory: Directory, names: set[str]) -> list[str]:
    """Return a note on what may be a package that has lost its manifest: nothing tells whether it is a delta.

    A checkpoint in which an export did not finish is none. ``names``: of all its files.

    Raises:
        CheckpointError: files lie there that only a delta has, whose rows alone are not the model.
    """
    signs = list_side_files(names)
    if MANIFEST in names or not signs:
        return []
    if deleted := list_deleted_ids(names):
        raise CheckpointError(
            f"{directory.url} has {deleted[0]} and no {MANIFEST}: this is a delta package without its manifest, and its rows "
            "alone are not the model. Export from the checkpoint that it was made of, or copy the package again, and make "
            "a full package of it and its base: python -m dist_export compact DELTA OUT"
        )
    if DENSE_STATE in names or directory.exists(WORK_DIRECTORY):
        return []
    told = "if it is a package that lost it, it may be a delta, whose rows alone are not the model; copy it again then"
    return [f"{directory.url} has {few(signs)}, which only a package has, and no {MANIFEST}: {told}"]


def has_row_indexed(manifest: Manifest) -> bool:
    """Whether a package has a table whose rows go by number."""
    return any(table.is_hashed is False for table in manifest.tables)


class PackageSource:
    """Reads a package. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(self, directory: Directory, manifest: Manifest, inner: CheckpointReader[Any] | None = None) -> None:
        """Refuse what cannot be read back. ``inner`` is the reader of its shards; None takes that of packages.

        Raises:
            CheckpointError: a table whose rows have an unknown encoding, or the indexes are damaged.
        """
        for table in manifest.tables:
            _refuse_unknown(table, directory)
        shards = sorted({part.file for table in manifest.tables for part in table.parts})
        self._directory, self._manifest = directory, manifest
        self._is_own = inner is None
        self._inner: CheckpointReader[Any] = (
            PackageReader(directory, shards, _list_row_indexed(manifest)) if inner is None else inner
        )
        self.files: tuple[SourceFile, ...] = self._inner.files

    def read_headers(self, files: range) -> Any:
        """Read the headers of these files."""
        return self._inner.read_headers(files)

    def assemble(self, shares: Sequence[Any]) -> Checkpoint:
        """Put the tables together as the shards have them, with the encodings and default rows of the manifest."""
        found = self._inner.assemble(shares)
        entries = {table.name: table for table in self._manifest.tables}
        tables = tuple(_with_entry(table, entries.get(table.name), self._directory.url) for table in found.tables)
        found = replace(found, tables=tables, warnings=(*found.warnings, *self._list_notes()))
        if not self._is_own:
            return replace(found, fingerprint=self._fingerprint(found.fingerprint))
        # each block of a hash table is of one slot, and a table counts its tensors by slot
        slots = sum(len(table.slots) if table.has_ids else len(table.slots) - 1 for table in found.tables)
        parts = found.parts
        num_bytes = sum(
            slot.num_bytes(int(parts.rows[parts.of_table(number)].sum()))
            for number, table in enumerate(found.tables)
            for slot in table.slots
            if table.has_ids or slot.column
        )
        dense_bytes = sum(tensor.num_bytes for tensor in found.dense)
        return replace(
            found,
            fingerprint=self._fingerprint(),
            copy_hindrances=("it is a package with tables by row number, whose manifest is written anew",),
            payload=Payload(tensors=slots + len(found.dense), num_bytes=num_bytes + dense_bytes),
        )

    def _list_notes(self) -> list[str]:
        where = self._directory.url
        own = {MANIFEST, *(file.path for file in self._manifest.files), *(file.name for file in self.files)}
        foreign = [name for name in self._directory.names() if name not in own and name.endswith(_OF_CHECKPOINTS)]
        notes = [
            _tell_lost(f"{where}: table {table.name!r}", slot)
            for table in self._manifest.tables
            for slot in table.kept
            if slot.casts or slot.encoding is not msgspec.UNSET
        ]
        notes += [
            f"{where}: slot {slot.name!r} of table {table.name!r} was not compared when a delta was made, so rows that stayed "
            "have older values of it"
            for table in self._manifest.tables
            for slot in table.kept
            if slot.is_ignored is True
        ]
        if foreign:
            notes.append(f"{where} is a package, and these files are no part of it: {few(foreign)}; they are not read")
        return notes

    def _fingerprint(self, of_shards: str = "") -> str:
        """Return a fingerprint that covers the manifest too, and ``of_shards``, that of the reader of the shards."""
        hasher = xxhash.xxh3_128(f"{self._manifest.digest} {of_shards}".encode())
        for file in self.files:
            hasher.update(msgspec.json.encode([file.name, file.size, file.version]))
        return f"xxh3:{hasher.hexdigest()}"


def _list_row_indexed(manifest: Manifest) -> dict[str, tuple[str, str]]:
    """Return table and slot by the key of each block of a table whose rows go by number."""
    return {
        key: (table.name, slot)
        for table in manifest.tables
        if table.is_hashed is False
        for part in table.parts
        for slot, key in part.keys.items()
    }


def _tell_lost(which: str, slot: SlotEntry) -> str:
    """Return what an earlier cast took from a table for good."""
    precision = slot.dtype if slot.encoding is msgspec.UNSET else slot.encoding
    casts = slot.casts
    if not casts:
        return f"{which} stays at the precision of {precision}, in which this package has it"
    targets = [*(cast.source_dtype for cast in casts[1:]), precision]
    told = [
        f"from {cast.source_dtype} to {target} (largest error {cast.max_abs_error:.3g}, mean {cast.mean_abs_error:.3g})"
        for cast, target in zip(casts, targets, strict=True)
    ]
    return f"{which} was cast {', then '.join(told)}, and stays at the precision that this left"


def _refuse_unknown(table: TableEntry, directory: Directory) -> None:
    for slot in table.kept:
        is_known = slot.encoding == INT8_ROWWISE and slot.name == EMBEDDING_SLOT
        if slot.encoding is not msgspec.UNSET and not is_known:
            raise CheckpointError(
                f"{directory.url} is a package whose table {table.name!r} is encoded as {slot.encoding}, which is not known "
                "here. Export from the checkpoint that it was made of"
            )


def _with_entry(table: TableMeta, entry: TableEntry | None, where: str) -> TableMeta:
    """Return a table with what the shards do not tell: how its rows are packed, and its default row. CheckpointError."""
    if entry is None:
        return table
    slots = []
    for slot in table.slots:
        known = next((its for its in entry.kept if its.name == slot.name), None)
        packed = (
            slot if known is None else replace(slot, earlier_casts=known.casts, is_ignored=known.is_ignored is True)
        )
        if known is not None and known.encoding is not msgspec.UNSET:
            packed = replace(packed, encoding=known.encoding)
            if slot.dtype != U8 or len(slot.inner_shape) != 1 or packed.values_shape != (known.dim,):
                raise CheckpointError(
                    f"{where}: table {table.name!r} is said to be {known.encoding} with {known.dim} values a row, and the "
                    f"shards hold rows of {DTYPES[slot.dtype].torch} {list(slot.inner_shape)}; verify tells more"
                )
        slots.append(packed)
    default = None if entry.default_row is msgspec.UNSET else entry.default_row
    width = next(math.prod(slot.values_shape) for slot in slots if slot.name == EMBEDDING_SLOT)
    if default is not None and default != "zeros" and (isinstance(default, str) or len(default) != width):
        raise CheckpointError(
            f"{where}: the default row of table {table.name!r} does not have its {width} values"
            "; export from the checkpoint that it was made of"
        )
    return replace(table, slots=tuple(slots), default_row=default)
