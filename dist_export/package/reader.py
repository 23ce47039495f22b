"""Open an exported directory: read its manifest, look rows up, load the dense program. Does not import the exporter."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from dist_export.archive.safe_load import load_program
from dist_export.errors import PackageError, UserError
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.safetensors import Header
from dist_export.manifest import Manifest, TableEntry
from dist_export.package.dense_inputs import dense_inputs_of
from dist_export.package.layered_package import LayeredPackage
from dist_export.package.local_cache import LocalCache
from dist_export.package.open_count import OpenCount
from dist_export.package.opening import list_files_to_hold, open_committed, open_written
from dist_export.package.other_formats import load_native_program, load_onnx
from dist_export.package.shard_headers import ShardHeaders
from dist_export.package.slot_reader import PartRun, SlotReader
from dist_export.package.stored_rows import decode_rows, encode_default, is_sound_encoding, row_bytes_of
from dist_export.registry.base import resolve
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from dist_export.archive.native_program import NativeProgram
    from dist_export.archive.onnx_model import OnnxProgram
    from dist_export.package.score import Scorer


class Package(LayeredPackage):
    """A committed package. ``manifest`` describes it. Other files are only read when they are needed.

    It reads the package that was opened. If that was replaced and can no longer be read, it raises PackageError. Any thread
    may read it. ``base`` is the open base of a delta package; None for a full package.
    """

    def __init__(
        self,
        directory: Directory,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        unpublished: Manifest | None = None,
        base_directory: Directory | None = None,
        opens_base: bool = True,
        opened: Package | None = None,
    ) -> None:
        """Open the package in a directory. Raises the errors of :func:`open_package`.

        Args:
            directory: the package.
            cache_dir: as in :func:`open_package`.
            unpublished: what the manifest will say of a package whose manifest is not written yet.
            base_directory: where the base of a delta package is. By default it is searched for.
            opens_base: false leaves the base of a delta package closed until ``open_base``. There are no lookups before.
            opened: an open package, which becomes the base, or whose base does, if it has the digest of this one's base.
        """
        self.directory = directory
        self.files, self.manifest = (
            open_committed(directory) if unpublished is None else open_written(directory, unpublished)
        )
        self._readers_of_files = OpenCount(self.files.close)
        self._cache_dir = cache_dir
        self.cache: LocalCache | None = None
        if cache_dir is not None and not directory.is_local:
            self.cache = LocalCache(cache_dir, self.files, self.manifest.digest)
        self._headers = ShardHeaders(self.files)
        self._readers: dict[tuple[str, str], SlotReader] = {}
        self._prepare_layers()
        self._scorer: Scorer | None = None
        self._lock = threading.Lock()
        if base_directory is not None and not self.is_delta:
            self.close()
            raise UserError(f"{directory.url} is a full package, which needs no base; leave base out")
        if self.is_delta and opens_base:
            try:
                self.open_base(base_directory, opened=opened)
            except PackageError:
                self.close()
                raise

    def hold(self) -> None:
        """Open the files on a disk that lookups and :meth:`load_program` read, as many as descriptors allow.

        An open file can still be read after the package is replaced and removed.
        """
        self.files.hold(list_files_to_hold(self.manifest))
        if self.base is not None:
            self.base.hold()

    def close(self) -> None:
        """Close all files, also of the base unless others read it. They are also closed with the last reference to it."""
        for leave in self._leave:
            leave()

    @classmethod
    def open_alone(cls, directory: Directory, cache_dir: str | os.PathLike[str] | None) -> Package:
        """Open a package without what is below it."""
        return cls(directory, cache_dir=cache_dir, opens_base=False)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """Let another process open the package again, without the descriptors. It raises PackageError if it was replaced."""
        below = [layer.directory for layer in self.layers[1:]]
        return _open_again, (self.directory, self.manifest.digest, self._cache_dir, below)

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
        package without one is read by its id columns. On a disk, files stay mapped between calls. A delta package gives its
        own rows, no row for its deleted ids, and the rows of its base for all others.

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
        reader = self.layered_reader(table, slot) if self.is_delta else self.rows_of(table, slot=slot)
        entry, kept = self.table(table), reader.slot
        asked = np.asarray(ids)
        if asked.dtype.kind not in "iu" and asked.size:  # floats would silently become other ids
            raise TypeError(f"ids are integers, found {asked.dtype}")
        if asked.dtype == np.uint64:
            asked = asked.view(np.int64)
        asked = asked.astype(np.int64)
        rows, has_row = reader.read(asked.reshape(-1))
        if slot == EMBEDDING_SLOT and not isinstance(entry.default_row, (msgspec.UnsetType, str)):
            rows[~has_row] = encode_default(entry, kept, where=self.directory.url)
        shape = asked.shape
        has_row = has_row.reshape(shape)
        if raw:
            return rows.reshape(*shape, rows.shape[1]), has_row
        values = decode_rows(rows, kept)
        return values.reshape(*shape, *values.shape[1:]), has_row

    def rows_of(self, table: str, *, slot: str = EMBEDDING_SLOT) -> SlotReader:
        """Return what finds and reads stored rows of one slot of a table, in this package's own shards alone.

        PackageError if there is no such slot, or one that cannot be read.
        """
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
        reader = SlotReader(self.files, self._headers, entry, kept, row_bytes=row_bytes, cache=self.cache)
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
        return encode_default(entry, kept, where=self.directory.url)

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
        return self.rows_of(table, slot=slot).read_run(part, first, last)

    def header(self, name: str) -> Header:
        """Return the header of one shard file. It is read only once."""
        return self._headers.of(name)


def _open_again(
    directory: Directory, digest: str, cache_dir: str | os.PathLike[str] | None, below: Sequence[Directory]
) -> Package:
    package = Package(directory, cache_dir=cache_dir, opens_base=False)
    if package.manifest.digest != digest:
        raise PackageError(f"{directory.url}: the package was replaced since it was opened; open it again")
    if below:
        package.open_base(below[0], below=below[1:])
    package.hold()
    return package


def open_package(
    path: str | os.PathLike[str],
    *,
    storage_options: dict[str, Any] | None = None,
    registry_options: dict[str, Any] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Package:
    """Open the package at ``path``: a directory, an fsspec URL, or a model registry's URI such as ``models:/ctr_serving/3``.

    A delta package is opened together with its base, and then reads like a full package.

    Args:
        path: the package.
        storage_options: options for its file system.
        registry_options: options for the registry.
        cache_dir: for a package in a store, a local directory that keeps row indexes and id columns, about 14 bytes a row.
            Lookups then ask the store for rows alone. Processes may share it; nothing in it is ever removed.
        base: the base of a delta package, as ``path``. By default it is where it was when the delta was exported, or beside
            the delta.

    Raises:
        UserError: there is no such directory, or no such version; ``base`` is given for a full package.
        PackageError: there is no manifest, so this is no package, or the manifest cannot be read, is damaged, or has a later
            schema; the base of a delta package is not found, or is another package. Where ``base`` is, it is a UserError too.
    """
    found = resolve(os.fspath(path), registry_options or {})
    below = None if base is None else resolve(os.fspath(base), registry_options or {}).directory
    package = Package(
        open_directory(found.directory, storage_options),
        cache_dir=cache_dir,
        base_directory=None if below is None else open_directory(below, storage_options),
    )
    package.hold()
    return package
