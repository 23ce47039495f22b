"""Reader of RecIS checkpoints, 1.0 to 1.2: ``model-*-of-*.safetensors``, ``index``, ``tensorkey.json``.

Source: the directories that RecIS's own C++ writer leaves. Which part a block belongs to is told by ``tensorkey.json``,
never by the file's name; ``index`` says which files count, so files of an earlier save in the same directory do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.merged import check_merged
from dist_export.checkpoint.parts import PartBuilder
from dist_export.checkpoint.reader import Checkpoint, DenseTensor, Parts, SourceFile, TableMeta
from dist_export.errors import CheckpointError
from dist_export.layout.indexes import decode_indexes
from dist_export.layout.recis import DENSE_SUFFIX, INDEX, MERGED, TENSORKEY
from dist_export.layout.safetensors import Header, decode_header, header_length
from dist_export.storage import Directory

T = TypeVar("T")

_LEFTOVER = re.compile(r"ckpt-.*\.(tmp|json|index)$|.*\.tmp$|\d+tensorkey\.json$|\d+" + re.escape(MERGED) + "$")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors$")


class RecisReader:
    """Reads one RecIS checkpoint directory. See :class:`~dist_export.checkpoint.reader.CheckpointReader`."""

    def __init__(self, directory: Directory) -> None:
        """Read the indexes. CheckpointError where the directory, an index or a file that an index names is missing."""
        self.directory = directory
        names = set(_reading(directory.url, directory.names))
        if not names:
            what = "holds no files" if directory.exists() else "does not exist"
            raise CheckpointError(f"{directory.url}: {what}; ckpt_dir must be a RecIS checkpoint (.../ckpt_<step>)")
        missing = [name for name in (INDEX, TENSORKEY) if name not in names]
        if missing:
            raise CheckpointError(
                f"{directory.url}: no {' and no '.join(missing)} among its {len(names)} files; RecIS writes them last, "
                "so this is no RecIS checkpoint or its save did not finish"
            )
        self._raw = {
            name: _reading(directory.describe(name), partial(directory.read, name))
            for name in (INDEX, TENSORKEY, MERGED)
            if name in names
        }
        self._file_of_key, file_names, self._internal = decode_indexes(
            self._raw[INDEX], self._raw[TENSORKEY], where=directory.url.rstrip("/")
        )
        absent = [name for name in file_names if name not in names]
        if absent:
            raise CheckpointError(
                f"{directory.describe(absent[0])} is missing; {INDEX} names it ({len(absent)} missing)"
            )
        self.files: tuple[SourceFile, ...] = tuple(self._stat(name) for name in file_names)
        self._warnings = tuple(_list_bystanders(names, set(file_names)))
        if MERGED not in names:
            self._warnings += (f"{MERGED} is missing in the checkpoint; the package gets a new one",)

    def read_headers(self, files: range) -> list[Header]:
        """Read and check the headers of these files."""
        found = []
        for number in files:
            file = self.files[number]
            where = self.directory.describe(file.name)
            raw = _reading(where, partial(self._read_header, file, where))
            found.append(decode_header(raw, path=where, file_size=file.size))
        return found

    def assemble(self, headers: list[Header]) -> Checkpoint:
        """Match headers, ``index`` and ``tensorkey.json`` with each other and build the columns."""
        sparse = PartBuilder(tuple(self.directory.describe(file.name) for file in self.files))
        dense = _DenseBlocks()
        for number, header in enumerate(headers):
            self._match_index(number, header)
            for row, key in enumerate(header.keys):
                self._collect(sparse, dense, number, header, row, key)
        self._check_nothing_is_missing(headers)
        tables, parts, blocks = sparse.build()
        fingerprint = xxhash.xxh3_128()
        for file, header in zip(self.files, headers, strict=True):
            fingerprint.update(msgspec.json.encode([file.name, file.size, file.version, header.keys]))
            fingerprint.update(header.begins.tobytes() + header.dtypes.tobytes() + repr(header.shapes).encode())
        for name in sorted(self._raw):
            fingerprint.update(self._raw[name])
        checkpoint = Checkpoint(
            format="recis",
            directory=self.directory,
            files=self.files,
            tables=tables,
            parts=parts,
            blocks=blocks,
            dense=tuple(dense.tensors.values()),
            fingerprint=f"xxh3:{fingerprint.hexdigest()}",
            copy_hindrances=(
                *_list_hindrances(self.files, headers, tables, parts),
                *(f"RecIS cannot read {name!r} under the key that its writer gave it" for name in dense.bare),
            ),
            verbatim={name: self._raw[name] for name in (INDEX, TENSORKEY)},
            warnings=self._warnings,
        )
        if MERGED in self._raw:
            check_merged(self._raw[MERGED], headers, where=self.directory.describe(MERGED))
        return checkpoint

    def _read_header(self, file: SourceFile, where: str) -> bytes:
        with self.directory.open_reader(file.name) as reader:
            prefix = bytearray(min(8, file.size))  # header_length says that fewer are too few
            reader.read_into(memoryview(prefix), 0)
            raw = bytearray(header_length(bytes(prefix), path=where, file_size=file.size))
            reader.read_into(memoryview(raw), 8)
        return bytes(raw)

    def _stat(self, name: str) -> SourceFile:
        found = _reading(self.directory.describe(name), partial(self.directory.stat, name))
        return SourceFile(name=name, size=found.size, version=found.version)

    def _match_index(self, number: int, header: Header) -> None:
        name = self.files[number].name
        for key in header.keys:
            expected = self._file_of_key.get(key, self._file_of_key.get(key + DENSE_SUFFIX))
            if expected is None:
                raise CheckpointError(
                    f"{self.directory.describe(name)} holds {key!r}, which {INDEX} does not name; a loader would lose it"
                )
            if expected != number:
                raise CheckpointError(
                    f"{self.directory.describe(name)} holds {key!r}, but {INDEX} says that it is in "
                    f"{self.files[expected].name}"
                )

    def _check_nothing_is_missing(self, headers: list[Header]) -> None:
        found = {key for header in headers for key in header.keys}
        for key, number in self._file_of_key.items():
            # RecIS saves a dense tensor with "/part_" in its name under the bare name, and indexes it with the suffix
            if key not in found and key.removesuffix(DENSE_SUFFIX) not in found:
                raise CheckpointError(
                    f"{self.directory.describe(self.files[number].name)} should hold {key!r} by {INDEX}, but does not"
                )
        for key in self._internal:
            if key not in found:
                raise CheckpointError(
                    f"{self.directory.describe(TENSORKEY)} names {key!r}, which no file of the checkpoint holds"
                )

    def _collect(
        self, sparse: PartBuilder, dense: _DenseBlocks, number: int, header: Header, row: int, key: str
    ) -> None:
        where = self.directory.describe(self.files[number].name)
        internal = self._internal.get(key)
        is_bare = internal is None and not key.endswith(DENSE_SUFFIX) and key + DENSE_SUFFIX in self._file_of_key
        if internal is None and (is_bare or key.endswith(DENSE_SUFFIX)):
            name = key.removesuffix(DENSE_SUFFIX)
            if name in dense.tensors:
                raise CheckpointError(f"{where} holds {key!r}, a second dense tensor of that name")
            if is_bare:
                dense.bare.append(key)
            begin, end = int(header.begins[row]), int(header.ends[row])
            dense.tensors[name] = DenseTensor(
                name=name,
                dtype=int(header.dtypes[row]),
                shape=header.shapes[row],
                file=number,
                offset=begin,
                num_bytes=end - begin,
            )
            return
        if internal is None and "^" not in key:
            raise CheckpointError(
                f"{where} holds {key!r}, which {TENSORKEY} does not name; RecIS's loader would lose its rows without a "
                "word"
            )
        sparse.add(internal or key, key, number, header, row)


class _DenseBlocks:
    """The dense tensors among the sparse files, as they are met."""

    def __init__(self) -> None:
        self.tensors: dict[str, DenseTensor] = {}
        self.bare: list[str] = []
        """Those saved without the suffix, which RecIS cannot find again."""


def _reading(where: str, read: Callable[[], T]) -> T:
    """Return what ``read`` returns; a source that the system will not read is the user's to mend."""
    try:
        return read()
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error


def _list_bystanders(names: set[str], indexed: set[str]) -> Iterable[str]:
    strays = sorted(name for name in names if _SHARD.fullmatch(name) and name not in indexed)
    if strays:
        yield f"{len(strays)} model files are in no index and stay behind (an earlier save?), first {strays[0]}"
    leftovers = sorted(name for name in names if _LEFTOVER.fullmatch(name))
    if leftovers:
        yield f"{len(leftovers)} leftovers of an interrupted save stay behind, first {leftovers[0]}"


def _list_hindrances(
    files: tuple[SourceFile, ...], headers: list[Header], tables: tuple[TableMeta, ...], parts: Parts
) -> Iterable[str]:
    for file, header in zip(files, headers, strict=True):
        if header.has_lower_bool:
            yield f"{file.name} holds a tensor of dtype 'bool', with which RecIS can read no part of the file"
        if header.has_metadata:
            yield f"{file.name} has a __metadata__ entry, which RecIS's reader refuses"
    columns = np.stack([parts.table, parts.begin, parts.end], axis=1)
    unique, counts = np.unique(columns, axis=0, return_counts=True)
    for table, begin, end in unique[counts > 1]:
        yield (
            f"two parts of table {tables[table].name!r} carry the slice {begin}:{end}, and RecIS's loader keeps one of them"
        )
