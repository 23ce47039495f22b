"""The package manifest: the content of a package, as data and as JSON. Imports no torch, so that serving can read it.

``manifest.json`` is written last and is the commit. Readers ignore fields that they do not know.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import msgspec
import xxhash

from dist_export.errors import CheckpointError, PackageError
from dist_export.formats.delta_entries import (
    BaseEntry,
    CompactedEntry,
    Count,
    DeletedIdsEntry,
    DeltaEntry,
    RowFingerprintsEntry,
)
from dist_export.formats.package_entries import (
    AccountEntry,
    AccountTensor,
    CastEntry,
    DenseEntry,
    DenseTensorEntry,
    DriftEntry,
    DriftOutputEntry,
    FileEntry,
    FilesParityEntry,
    FormatEntry,
    LeftOutEntry,
    ParityEntry,
    PartDigest,
    PartEntry,
    PruneEntry,
    RowIndexEntry,
    ScoreEntry,
    ScoreParityEntry,
    SlotEntry,
    TableEntry,
    TensorEntry,
)
from dist_export.formats.serving_entries import (
    ColumnsEntry,
    DenseInputEntry,
    FeatureEntry,
    IdsEntry,
    ReplayEntry,
    ServingEntry,
    TransformEntry,
)
from dist_export.formats.source_entry import SourceEntry
from dist_export.formats.strict_json import decode_object

__all__ = [
    "BLOCKS",
    "DEFAULT_ROWS",
    "DELTA_SCHEMA_VERSION",
    "FORMAT",
    "MANIFEST",
    "OUTPUTS",
    "SAMPLE_ROWS",
    "SCHEMA_VERSION",
    "SCORE_FOLDER",
    "AccountEntry",
    "AccountTensor",
    "BaseEntry",
    "CastEntry",
    "ColumnsEntry",
    "CompactedEntry",
    "Count",
    "DeletedIdsEntry",
    "DeltaEntry",
    "DenseEntry",
    "DenseInputEntry",
    "DenseTensorEntry",
    "DriftEntry",
    "DriftOutputEntry",
    "FeatureEntry",
    "FileEntry",
    "FilesParityEntry",
    "FormatEntry",
    "IdsEntry",
    "LeftOutEntry",
    "Manifest",
    "ParityEntry",
    "PartDigest",
    "PartEntry",
    "PruneEntry",
    "ReplayEntry",
    "RowFingerprintsEntry",
    "RowIndexEntry",
    "ScoreEntry",
    "ScoreParityEntry",
    "ServingEntry",
    "SlotEntry",
    "SourceEntry",
    "TableEntry",
    "TensorEntry",
    "TransformEntry",
    "compute_digest",
    "decode_manifest",
    "encode_manifest",
    "seal",
]

MANIFEST = "manifest.json"
SAMPLE_ROWS = "sample_rows.json"
"""In the dense folder: table -> [{"id", "row"}] of the ids that rank 0's sample looked up, each with the xxh3-64 of its
row, or null for an out-of-vocabulary id."""
DEFAULT_ROWS = "default_rows.json"
"""In the dense folder: table -> xxh3-64 of the row, in its stored form, that the sample used for ids without a row."""
BLOCKS = "blocks.json"
"""In the dense folder: ``input_order`` and ``constants`` as the manifest has them, in a file with a digest of its own."""
OUTPUTS = "outputs_dict.json"
"""In the dense folder: the model's outputs for the sample by name, in the format of ``inputs_dict.json``."""
SCORE_FOLDER = "score_program"
"""The folder of the score program within a package."""

FORMAT = "dist_export"
SCHEMA_VERSION = 1
DELTA_SCHEMA_VERSION = 2
"""Of a delta package, so that readers that know full packages alone refuse it."""

_MAX_ROW_BYTES = 1 << 40
_MAX_ITEMSIZE = 8


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole package."""

    format: str = FORMAT
    schema_version: int = SCHEMA_VERSION
    mode: str
    """filter, copy, in_place or dense_only."""
    num_shards: Count
    source: SourceEntry
    base: BaseEntry | msgspec.UnsetType = msgspec.UNSET
    """In a delta package, the package that its rows go on top of. Absent in a full one."""
    compacted: CompactedEntry | msgspec.UnsetType = msgspec.UNSET
    """In a full package that ``compact`` made, the delta package and the base that it was made of."""
    tables: tuple[TableEntry, ...]
    left_out_tables: tuple[LeftOutEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    account: AccountEntry | msgspec.UnsetType = msgspec.UNSET
    """Absent if the source does not list what it contains besides tables."""
    prune: tuple[PruneEntry, ...] | msgspec.UnsetType = msgspec.UNSET
    """The rules in the order in which they were applied; absent if there are none."""
    dense_tensors: tuple[DenseTensorEntry, ...]
    dropped_dense_tensors: tuple[DenseTensorEntry, ...]
    files: tuple[FileEntry, ...]
    dense: DenseEntry | None
    parity: ParityEntry | None
    drift: DriftEntry | None = None
    score: ScoreEntry | msgspec.UnsetType = msgspec.UNSET
    """Absent if the package has no score program."""
    serving: ServingEntry | msgspec.UnsetType = msgspec.UNSET
    """The serving contract. Absent if nothing was to be stated."""
    notes: tuple[str, ...]
    versions: dict[str, str]
    digest: str = ""
    """xxh3-128 over the manifest's JSON without ``digest`` and ``run``."""
    run: dict[str, Any] = {}
    """Values that differ from run to run: times, durations, export_dir, world_size, what each rank moved, and how many ids the
    sample batches looked up: each time that an id occurs, over all ranks. Not in the digest."""

    @property
    def num_bytes(self) -> int:
        """The size of all files except the manifest itself."""
        return sum(file.num_bytes for file in self.files)

    def find_undigested(self) -> str:
        """Return the first file without a digest; empty if all have one.

        With such a file the manifest's digest does not tell the package from others.
        """
        return next((file.path for file in self.files if not file.digest), "")

    def list_older_slots(self) -> list[str]:
        """Return ``table.slot`` of each slot that a delta did not compare, if rows have its values in the base."""
        found = []
        for table in self.tables:
            ignored = table.delta.ignored_slots if isinstance(table.delta, DeltaEntry) and table.delta.same else ()
            names = () if isinstance(ignored, msgspec.UnsetType) else ignored
            found += [
                f"{table.name}.{slot.name}" for slot in table.kept if slot.is_ignored is True or slot.name in names
            ]
        return found

    def __str__(self) -> str:
        """Return the closing summary of the export."""
        from dist_export.reporting.summary import (
            summarize_again,  # serving reads manifests without all that an export imports
        )

        return "\n".join(summarize_again(self))


def compute_digest(document: dict[str, Any]) -> str:
    """Return the correct ``digest`` of a manifest given as plain JSON values, including fields that are unknown here."""
    plain = {name: value for name, value in document.items() if name not in ("digest", "run")}
    return "xxh3:" + xxhash.xxh3_128_hexdigest(msgspec.json.encode(plain, order="sorted"))


def seal(manifest: Manifest) -> Manifest:
    """Return the manifest with its digest filled in."""
    return msgspec.structs.replace(manifest, digest=_digest_of(manifest))


def encode_manifest(manifest: Manifest) -> bytes:
    """Return the content of ``manifest.json``."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(raw: bytes, *, where: str) -> Manifest:
    """Read a manifest. PackageError if it is no manifest, has a later schema, or was changed after the commit."""
    try:
        head = _HEADS.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PackageError(f"{where} is no package manifest: {error}") from None
    if head.format != FORMAT or head.schema_version > DELTA_SCHEMA_VERSION:
        raise PackageError(
            f"{where}: format {head.format!r} version {head.schema_version}; this reads {FORMAT!r} up to "
            f"{DELTA_SCHEMA_VERSION}. A newer dist_export may read it"
        )
    try:
        manifest = _MANIFESTS.decode(raw)
        # if encoding it gives the same bytes, it has no unknown fields, and need not be decoded to plain values too
        is_ours = encode_manifest(manifest) == raw
        digest = _digest_of(manifest) if is_ours else compute_digest(decode_object(raw, what=where))
    except CheckpointError as error:
        raise PackageError(str(error)) from None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise PackageError(f"{where} is damaged: {error}") from None
    _check_paths(manifest, where)
    _check_rows(manifest, where)
    _check_base(manifest, where)
    if manifest.digest != digest:
        raise PackageError(f"{where} is not what was committed: its digest is {digest}, it says {manifest.digest}")
    return manifest


def _digest_of(manifest: Manifest) -> str:
    """Return :func:`compute_digest` of a manifest without converting it to plain values: structs are sorted too."""
    values = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return compute_digest({name: value for name, value in values.items() if value is not msgspec.UNSET})


def _check_paths(manifest: Manifest, where: str) -> None:
    """Refuse a path that leads out of the package. A reader opens only files that are named by one of these paths."""
    paths = [entry.path for entry in manifest.files]
    parts = [part for table in manifest.tables for part in table.parts]
    paths += [part.file for part in parts]
    paths += [part.row_index.file for part in parts if part.row_index is not msgspec.UNSET]
    deltas = [table.delta for table in manifest.tables if table.delta is not msgspec.UNSET]
    paths += [entry.file for delta in deltas for entry in delta.deleted_ids]
    paths += [part.row_fingerprints.file for part in parts if part.row_fingerprints is not msgspec.UNSET]
    if manifest.dense is not None:
        formats = () if manifest.dense.formats is msgspec.UNSET else manifest.dense.formats
        paths += [manifest.dense.folder, manifest.dense.program, *(entry.file for entry in formats)]
        paths += [] if manifest.dense.layouts is msgspec.UNSET else manifest.dense.layouts.values()
    if manifest.score is not msgspec.UNSET:
        paths += [manifest.score.program, manifest.score.sample]
    for path in paths:
        pure = PurePosixPath(path)
        if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path or not path.isprintable():
            raise PackageError(f"{where}: {path!r} does not lie in the package")


def count_served(table: TableEntry) -> int:
    """Return how many rows of a table the package serves: of a delta, with those of its base."""
    return table.rows_out if isinstance(table.delta, msgspec.UnsetType) else table.delta.rows_served


def list_entries(layers: Sequence[Manifest], table: str) -> list[TableEntry]:
    """Return what a chain has of a table: the entries of its packages, the last one first, down to one that lacks the table.

    ``layers``: the manifests of the packages, the full one last. What lies below one without the table is not served.
    """
    found = (next((its for its in layer.tables if its.name == table), None) for layer in layers)
    return [its for its in itertools.takewhile(lambda its: its is not None, found) if its is not None]


def _check_rows(manifest: Manifest, where: str) -> None:
    """Refuse rows that are too large for any table, because a reader reserves memory for the claimed size."""
    for table in manifest.tables:
        for slot in table.kept:
            if math.prod(slot.shape) * _MAX_ITEMSIZE > _MAX_ROW_BYTES:
                raise PackageError(
                    f"{where}: {slot.name!r} of table {table.name!r} has rows of {list(slot.shape)}, which no table has"
                )


def _check_base(manifest: Manifest, where: str) -> None:
    """Refuse a delta that names no base, and accounts of a delta in a full package."""
    is_delta = manifest.base is not msgspec.UNSET
    if is_delta != (manifest.schema_version == DELTA_SCHEMA_VERSION):
        raise PackageError(
            f"{where} is damaged: schema {manifest.schema_version} {'with' if is_delta else 'without'} a base"
        )
    wrong = [table.name for table in manifest.tables if (table.delta is not msgspec.UNSET) != is_delta]
    if wrong:
        raise PackageError(
            f"{where} is damaged: table {wrong[0]!r} {'lacks its' if is_delta else 'has an'} account against a base"
        )


class _Head(msgspec.Struct):
    format: str
    schema_version: int


# made here, for msgspec's first look at a type crashes if several threads take it at once
_HEADS = msgspec.json.Decoder(_Head)
_MANIFESTS = msgspec.json.Decoder(Manifest)
