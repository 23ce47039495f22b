"""Open an exported directory: read its manifest, look rows up, load the dense program. Does not import the exporter."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dist_export.archive.safe_load import load_program
from dist_export.errors import DistExportError, PackageError, UserError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT, INDEX, TENSORKEY
from dist_export.formats.row_encodings import INT8_ROWWISE, TAIL_BYTES, U8, decode_int8, encode_values, widen_bfloat16
from dist_export.formats.safetensors import Header
from dist_export.manifest import MANIFEST, Manifest, SlotEntry, TableEntry, decode_manifest
from dist_export.package.dense_inputs import dense_inputs_of
from dist_export.package.local_cache import LocalCache
from dist_export.package.opened_files import OpenedFiles
from dist_export.package.other_formats import load_native_program, load_onnx
from dist_export.package.shard_headers import ShardHeaders
from dist_export.package.slot_reader import PartRun, SlotReader
from dist_export.registry import base
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from dist_export.archive.native_program import NativeProgram
    from dist_export.archive.onnx_model import OnnxProgram
    from dist_export.package.score import Scorer

_RUN_ROWS = 1 << 20
_TRIES = 10
"""Attempts to open a package that is being replaced."""


def is_sound_encoding(slot: SlotEntry) -> bool:
    """Return whether the encoding of a slot is known, and its dtype and shape match it."""
    return (
        slot.encoding == INT8_ROWWISE
        and slot.dtype == DTYPES[U8].torch
        and slot.dim is not msgspec.UNSET
        and slot.shape == (slot.dim + TAIL_BYTES,)
    )


def row_bytes_of(slot: SlotEntry) -> int:
    """Return the bytes of a row of a slot whose dtype is known, as it is stored."""
    return int(np.prod(slot.shape, dtype=np.int64)) * DTYPES[CODE_BY_TORCH[slot.dtype]].itemsize


def decode_rows(rows: np.ndarray, slot: SlotEntry) -> np.ndarray:
    """Return rows as they are stored (uint8, (n, row_bytes)) as values, (n, ...). bfloat16 and int8 with scale become float32."""
    if slot.encoding is not msgspec.UNSET:
        return decode_int8(rows)
    values = rows.reshape(-1).view(DTYPES[CODE_BY_TORCH[slot.dtype]].numpy).reshape(len(rows), *slot.shape)
    return widen_bfloat16(values) if slot.dtype == "bfloat16" else values


class Package:
    """A committed package. ``manifest`` describes it. Other files are only read when they are needed.

    It reads the package that was opened. If that was replaced and can no longer be read, it raises PackageError. Any thread
    may read it.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        unpublished: Manifest | None = None,
    ) -> None:
        """Open the package in a directory. Raises the errors of :func:`open_package`.

        ``unpublished``: what the manifest will say of a package whose manifest is not written yet.
        """
        self.directory = directory
        self.files, self.manifest = _open(directory) if unpublished is None else _open_written(directory, unpublished)
        self._cache_dir = cache_dir
        self._cache: LocalCache | None = None
        if cache_dir is not None and not directory.is_local:
            self._cache = LocalCache(cache_dir, self.files, self.manifest.digest)
        self._headers = ShardHeaders(self.files)
        self._readers: dict[tuple[str, str], SlotReader] = {}
        self._scorer: Scorer | None = None
        self._lock = threading.Lock()

    def hold(self) -> None:
        """Open the files on a disk that lookups and :meth:`load_program` read, as many as descriptors allow.

        An open file can still be read after the package is replaced and removed.
        """
        dense = self.manifest.dense
        parts = [part for table in self.manifest.tables for part in table.parts]
        indexes = (part.row_index.file for part in parts if part.row_index is not msgspec.UNSET)
        shards = (part.file for part in parts)
        score = self.manifest.score
        programs = [entry.program for entry in (dense, score) if entry not in (None, msgspec.UNSET)]
        if dense is not None and dense.formats is not msgspec.UNSET:
            programs += [entry.file for entry in dense.formats]
        self.files.hold([*programs, INDEX, TENSORKEY, *indexes, *shards])

    def close(self) -> None:
        """Close all files. They are also closed when the last reference to the package is gone."""
        self.files.close()

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Let another process open the package again, without the descriptors. It raises PackageError if it was replaced."""
        return _open_again, (self.directory, self.manifest.digest, self._cache_dir)

    def __enter__(self) -> Package:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def table(self, name: str) -> TableEntry:
        """Return a table's entry in the manifest. Raises PackageError if there is no such table."""
        found = next((table for table in self.manifest.tables if table.name == name), None)
        if found is None:
            names = ", ".join(table.name for table in self.manifest.tables) or "none"
            raise PackageError(f"{self.directory.url}: no table {name!r}; the package has {names}")
        return found

    def lookup(
        self, table: str, ids: Any, *, slot: str = EMBEDDING_SLOT, raw: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of ids, read from the shards without loading the table.

        For a row-indexed table, an id is a row number, counted from 0. For a hash table, the row index finds the rows; a
        package without one is read by its id columns. On a disk, files stay mapped between calls.

        Args:
            table: the name of the table.
            ids: int64, any shape ``(...)``. Ids may repeat.
            slot: ``embedding``, or another slot that was kept.
            raw: whether to return rows as they are stored, uint8 of shape ``(..., row_bytes)``.

        Returns:
            First the rows, of shape ``(..., dim)`` in the table's dtype. bfloat16, which numpy lacks, and rows of int8 with
            scale and bias are float32. Out-of-vocabulary ids get the table's ``default_row``; zeros if the manifest has none,
            and for other slots. Then whether each id has a row, bool of shape ``(...)``.

        Raises:
            PackageError: the table or slot does not exist, or the package is damaged or was replaced.
            TypeError: the ids are not integers.
        """
        reader = self._reader(table, slot)
        entry, kept = self.table(table), reader.slot
        asked = np.asarray(ids)
        if asked.dtype.kind not in "iu" and asked.size:  # floats would silently become other ids
            raise TypeError(f"ids are integers, found {asked.dtype}")
        if asked.dtype == np.uint64:
            asked = asked.view(np.int64)
        asked = asked.astype(np.int64)
        rows, has_row = reader.read(asked.reshape(-1))
        if slot == EMBEDDING_SLOT and not isinstance(entry.default_row, (msgspec.UnsetType, str)):
            rows[~has_row] = self._encode_default(entry, kept)
        shape = asked.shape
        has_row = has_row.reshape(shape)
        if raw:
            return rows.reshape(*shape, rows.shape[1]), has_row
        values = decode_rows(rows, kept)
        return values.reshape(*shape, *values.shape[1:]), has_row

    def rows_of(self, table: str, *, slot: str = EMBEDDING_SLOT) -> SlotReader:
        """Return what finds and reads rows of one slot of a table, as they are stored. PackageError as :meth:`lookup`."""
        return self._reader(table, slot)

    def _reader(self, table: str, slot: str) -> SlotReader:
        """Return what reads one slot of a table. PackageError if there is none, or one that cannot be read."""
        reader = self._readers.get((table, slot))
        if reader is not None:
            return reader
        entry = self.table(table)
        kept = next((found for found in entry.kept if found.name == slot), None)
        if kept is None:
            raise PackageError(f"{self.directory.url}: table {table!r} has no slot {slot!r}")
        if kept.dtype not in CODE_BY_TORCH:
            raise PackageError(
                f"{self.directory.url}: slot {slot!r} of table {table!r} has the unknown dtype {kept.dtype!r}"
            )
        encoding = "" if kept.encoding is msgspec.UNSET else kept.encoding
        if encoding and not is_sound_encoding(kept):
            raise PackageError(
                f"{self.directory.url}: slot {slot!r} of table {table!r} has the unknown encoding {encoding!r} of "
                f"{kept.dtype} {list(kept.shape)}"
            )
        row_bytes = row_bytes_of(kept)
        reader = SlotReader(self.files, self._headers, entry, kept, row_bytes=row_bytes, cache=self._cache)
        self._readers[table, slot] = reader
        return reader

    def default_row(self, table: str) -> np.ndarray:
        """Return the row that :meth:`lookup` gives for an out-of-vocabulary id, as it would be stored: uint8, (row_bytes,).

        Raises:
            PackageError: the table has no embedding of a known dtype, or its default row has the wrong number of values.
        """
        entry = self.table(table)
        kept = next((slot for slot in entry.kept if slot.name == EMBEDDING_SLOT and slot.dtype in CODE_BY_TORCH), None)
        if kept is None:
            raise PackageError(f"{self.directory.url}: table {table!r} has no embedding that can be read")
        if isinstance(entry.default_row, (msgspec.UnsetType, str)):
            return np.zeros(row_bytes_of(kept), np.uint8)
        return self._encode_default(entry, kept)

    def _encode_default(self, entry: TableEntry, kept: SlotEntry) -> np.ndarray:
        """Return the default row of a table as it would be stored, uint8 of shape (row_bytes,)."""
        assert not isinstance(entry.default_row, (msgspec.UnsetType, str))
        encoding = "" if kept.encoding is msgspec.UNSET else kept.encoding
        row = encode_values(entry.default_row, CODE_BY_TORCH[kept.dtype], encoding)
        if row.nbytes != row_bytes_of(kept):
            raise PackageError(
                f"{self.directory.url}: the default row of table {entry.name!r} has {len(entry.default_row):,} values, which "
                "is no row of it"
            )
        return row

    def load_program(self) -> ExportedProgram:
        """Return the traced dense arch. Its archive is checked before anything is unpickled.

        Call it as ``program.module()(**inputs)`` with ``manifest.dense.inputs``. It returns a Tensor, or a tuple in the
        order of ``manifest.dense.outputs``.
        """
        if self.manifest.dense is None:
            raise PackageError(f"{self.directory.url}: the package holds tables alone, no dense arch")
        name = self.manifest.dense.program
        return load_program(self.files.read(name))

    def load_score_program(self) -> ExportedProgram:
        """Return the score program, whose lookups read the rows of this package. Its archive is checked first.

        Call it as ``program.module()(**inputs)`` with the tensors of ``manifest.score.inputs``. It returns a Tensor, or a tuple
        in the order of ``manifest.score.outputs``. No code of the model is imported.

        Raises:
            PackageError: the package has no score program, or it is damaged.
        """
        from dist_export.package.score import load_score_program  # it imports torch

        return load_score_program(self)

    def score(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the scores of a batch: output name -> array. Any thread.

        Args:
            inputs: the tensors or arrays of ``manifest.score.inputs`` by name. Others are passed over.

        Raises:
            UserError: an input is missing, has another dtype or shape than the program takes, or holds a value that the
                program's dtype cannot hold. uint64 ids for int64 are the ids with the same bits, as in :meth:`lookup`.
            PackageError: the package has no score program, or it is damaged or was replaced.
        """
        with self._lock:
            if self._scorer is None:
                from dist_export.package.score import Scorer  # it imports torch

                self._scorer = Scorer(self)
        return self._scorer.score(inputs)

    def build_dense_inputs(self, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Return the inputs of the dense program for ``inputs``, the arrays that ``manifest.serving`` names. Imports no torch.

        Raises:
            UserError: one is missing, or its shape or dtype is not as the contract has it.
            PackageError: the contract does not know every dense input, or the package is damaged or was replaced.
        """
        return dense_inputs_of(self, inputs)

    def load_onnx(self) -> OnnxProgram:
        """Return the dense arch of the ONNX file, to call as ``program(**inputs)`` with tensors.

        It returns a tuple in the order of ``manifest.dense.outputs``, and runs on the CPU.

        Raises:
            PackageError: the package has no ONNX file, or ONNX Runtime is not installed or cannot load it.
        """
        return load_onnx(self)

    def load_native_program(self, *, allow_native_code: bool = False) -> NativeProgram:
        """Return the compiled dense arch, to call as ``program(**inputs)``. It returns what the program returns.

        Args:
            allow_native_code: must be true. The file is a shared library, which may do anything as soon as it is loaded: load
                it only from a source that you trust as you trust a program.

        Raises:
            UserError: ``allow_native_code`` is false.
            PackageError: the package has no such file, it is damaged, or it was compiled for another processor.
        """
        return load_native_program(self, allow_native_code=allow_native_code)

    def read_run(self, table: str, part: int, first: int, last: int, *, slot: str = EMBEDDING_SLOT) -> PartRun:
        """Return rows ``first`` to ``last`` - 1 of one part of a table, in the order of the shard.

        Args:
            table: the name of the table.
            part: the number of the part in the table's entry in the manifest.
            first: the first row within the part.
            last: the row behind the last one.
            slot: ``embedding``, or another slot that was kept.

        Raises:
            PackageError: the table or slot does not exist, or the package is damaged or was replaced.
        """
        return self._reader(table, slot).read_run(part, first, last)

    def header(self, name: str) -> Header:
        """Return the header of one shard file. It is read only once."""
        return self._headers.of(name)


def _open(directory: Directory) -> tuple[OpenedFiles, Manifest]:
    """Return the files and the manifest of a package. Both are of one package, even if it is being replaced."""
    for is_last in (*[False] * (_TRIES - 1), True):
        files: OpenedFiles | None = None
        try:
            files = OpenedFiles(directory)
            manifest = decode_manifest(files.anchor(MANIFEST), where=directory.describe(MANIFEST))
            paths = [entry.path for entry in manifest.files]
            paths += [part.file for table in manifest.tables for part in table.parts]
            files.vouch({entry.path: entry.digest for entry in manifest.files if entry.path != MANIFEST})
            if files.note(paths):
                return files, manifest
        except (OSError, PackageError) as error:
            # the package may just have been replaced, so that the opened directory is being removed
            if files is None or is_last or files.is_current():
                raise _refusal(directory, error) from error
        files.close()
    raise PackageError(f"{directory.url}: was replaced {_TRIES} times while it was being opened; open it again")


def _open_written(directory: Directory, manifest: Manifest) -> tuple[OpenedFiles, Manifest]:
    """Return the files of a package that is written except for its manifest, and what the manifest will say."""
    files = OpenedFiles(directory)
    files.anchor_unread(manifest.files[0].path)
    return files, manifest


def _open_again(directory: Directory, digest: str, cache_dir: str | os.PathLike[str] | None) -> Package:
    package = Package(directory, cache_dir=cache_dir)
    if package.manifest.digest != digest:
        raise PackageError(f"{directory.url}: the package was replaced since it was opened; open it again")
    package.hold()
    return package


def _refusal(directory: Directory, error: OSError | PackageError) -> DistExportError:
    """Return the error for a directory that cannot be opened as a package."""
    if isinstance(error, PackageError):
        return error
    try:
        if isinstance(error, (FileNotFoundError, NotADirectoryError)) and not directory.exists():
            return UserError(f"{directory.url}: {directory.say_missing()}")
        if isinstance(error, FileNotFoundError) and not directory.exists(MANIFEST):
            return PackageError(
                f"{directory.url}: no {MANIFEST}, so this is no package, or its export did not finish; run the export again"
            )
    except OSError as second:
        error = second
    where = directory.describe(MANIFEST)
    return PackageError(f"{error.filename or where} cannot be read: {error.strerror or error}")


def open_package(
    path: str | os.PathLike[str],
    *,
    storage_options: dict[str, Any] | None = None,
    registry_options: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Package:
    """Open the package at ``path``: a directory, an fsspec URL, or a model registry's URI such as ``models:/ctr_serving/3``.

    Args:
        path: the package.
        storage_options: options for its file system.
        registry_options: options for the registry.
        cache_dir: for a package in a store, a local directory that keeps row indexes and id columns, about 14 bytes a row.
            Lookups then ask the store for rows alone. Processes may share it; nothing in it is ever removed.

    Raises:
        UserError: there is no such directory, or no such version.
        PackageError: there is no manifest, so this is no package, or the manifest cannot be read, is damaged, or has a later
            schema.
    """
    found = base.resolve(os.fspath(path), registry_options or {})
    package = Package(open_directory(found.directory, storage_options), cache_dir=cache_dir)
    package.hold()
    return package
