"""Reader of RecIS checkpoints, 1.0 to 1.2: ``model-*-of-*.safetensors``, ``index``, ``tensorkey.json``.

Source: the directories that RecIS's own C++ writer leaves. Which part a block belongs to is told by ``tensorkey.json``,
never by the file's name; ``index`` says which files count, so files of an earlier save in the same directory do not.
"""

from __future__ import annotations

import concurrent.futures
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.metadata import Checkpoint, Parts, SourceFile, TableMeta
from dist_export.checkpoint.payload import Payload
from dist_export.checkpoint.recis.assemble import build_parts
from dist_export.checkpoint.recis.header_columns import HeaderColumns, join_columns, to_columns
from dist_export.checkpoint.recis.match_index import match_blocks
from dist_export.checkpoint.recis.merged_manifest import check_merged
from dist_export.errors import CheckpointError
from dist_export.formats.recis import DENSE_SUFFIX, INDEX, MERGED, TENSORKEY
from dist_export.formats.recis_index import decode_indexes
from dist_export.formats.safetensors import Header, decode_header, header_length
from dist_export.formats.tuning import STANDARD
from dist_export.storage.directory import Directory

T = TypeVar("T")

_REQUESTS_AT_ONCE = 16
"""Of an object store, where the answer to each takes longer than the header behind it."""
_HEADERS_AT_ONCE = 128
"""Held in memory as they came."""

_LEFTOVER = re.compile(r"ckpt-.*\.(tmp|json|index)$|.*\.tmp$|\d+tensorkey\.json$|\d+" + re.escape(MERGED) + "$")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors$")


class HeaderShare(NamedTuple):
    """What one rank read."""

    columns: HeaderColumns
    index_digest: bytes
    """Of the index whose places the columns count in."""


def list_finished(directory: Directory) -> set[str]:
    """Return the names of a checkpoint's files. CheckpointError where there are none, or an index is not among them."""
    names = set(_reading(directory.url, directory.names))
    if not names:
        what = _reading(directory.url, lambda: f"{directory.say_missing()}; looked for {INDEX} and {TENSORKEY} (RecIS)")
        raise CheckpointError(f"{directory.url}: {what}{_reading(directory.url, directory.tell_folders)}")
    missing = [name for name in (INDEX, TENSORKEY) if name not in names]
    if missing:
        raise CheckpointError(
            f"{directory.url}: no {' and no '.join(missing)} among its {len(names)} files; RecIS writes them last, "
            "so this is no RecIS checkpoint or its save did not finish"
        )
    return names


class RecisReader:
    """Reads one RecIS checkpoint directory. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`."""

    def __init__(
        self,
        directory: Directory,
        *,
        warn: Callable[[set[str]], Sequence[str]] | None = None,
        json_bytes: int = STANDARD.json_bytes,
    ) -> None:
        """Read the indexes. CheckpointError where the directory, an index or a file that an index names is missing.

        ``warn``: returns further warnings, given the names of all files. ``json_bytes``: the size of the pieces in which the
        indexes are decoded.
        """
        self.directory = directory
        self._json_bytes = json_bytes
        names = list_finished(directory)
        more_warnings = () if warn is None else warn(names)
        self._raw = {name: self._read(name) for name in (INDEX, TENSORKEY)}
        raws = self._raw[INDEX], self._raw[TENSORKEY]
        self._index = decode_indexes(*raws, where=directory.url.rstrip("/"), piece_bytes=json_bytes)
        absent = [name for name in self._index.files if name not in names]
        if absent:
            raise CheckpointError(
                f"{directory.describe(absent[0])} is missing; {INDEX} names it ({len(absent)} missing)"
                ". Copy the checkpoint again, or take an earlier one"
            )
        self.files: tuple[SourceFile, ...] = tuple(_stat_files(directory, self._index.files))
        order = np.argsort(self._index.file, kind="stable").astype(np.int32)
        starts = np.searchsorted(self._index.file[order], np.arange(1, len(self.files)))
        self._positions_by_file = np.split(order, starts)
        self._has_merged = MERGED in names
        self._warnings = (*more_warnings, *_list_bystanders(names, set(self._index.files)))
        if not self._has_merged:
            self._warnings += (f"{MERGED} is missing in the checkpoint; the package gets a new one",)

    def read_headers(self, files: range) -> HeaderShare:
        """Read and check the headers of these files, and that ``index`` knows each of their blocks."""
        found = []
        for number, raw in zip(files, self._read_raw_headers(files), strict=True):
            file = self.files[number]
            header = decode_header(raw, path=self.directory.describe(file.name), file_size=file.size)
            found.append(self._match_index(number, header))
        return HeaderShare(join_columns(found), self._index_digest())

    def assemble(self, shares: Sequence[HeaderShare]) -> Checkpoint:
        """Match headers, ``index`` and ``tensorkey.json`` with each other and build the columns."""
        if any(share.index_digest != self._index_digest() for share in shares):
            raise CheckpointError(
                f"{self.directory.describe(INDEX)} is not the same on all ranks; it must be one shared directory whose "
                "files no longer change"
            )
        headers = join_columns([share.columns for share in shares])
        where = tuple(self.directory.describe(file.name) for file in self.files)
        matched = match_blocks(headers, self._index, where=where, tensorkey=self.directory.describe(TENSORKEY))
        tables, parts, blocks = build_parts(matched.sparse)
        dense, row_indexed = matched.dense, matched.row_indexed
        payload = Payload(
            tensors=len(np.unique(matched.sparse.kind)) + len(dense),
            num_bytes=int((headers.end - headers.begin).sum()),
        )
        del matched  # its columns, as long as all headers together, are of no more use
        if self._has_merged:
            self._raw[MERGED] = self._read(MERGED)
            check_merged(
                self._raw[MERGED],
                headers,
                self._index.keys,
                self._index.place_of_key,
                where=self.directory.describe(MERGED),
                piece_bytes=self._json_bytes,
            )
        return Checkpoint(
            format="recis",
            directory=self.directory,
            files=self.files,
            tables=tables,
            parts=parts,
            blocks=blocks,
            dense=dense,
            fingerprint=self._fingerprint(headers),
            copy_hindrances=(
                *_list_hindrances(self.files, headers, tables, parts),
                *(f"RecIS cannot read {name!r} under the key that its writer gave it" for name in row_indexed),
            ),
            verbatim=_Unchanged(self.directory, {name: self._raw[name] for name in (INDEX, TENSORKEY)}),
            warnings=(*self._warnings, *_list_lookalikes(tables)),
            payload=payload,
        )

    def _read(self, name: str) -> bytes:
        return _reading(self.directory.describe(name), partial(self.directory.read_text, name))

    def _read_raw_headers(self, files: range) -> Iterator[bytes]:
        if self.directory.is_local:  # threads would only get in each other's way
            yield from map(self._read_raw_header, files)
            return
        with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            for first in range(0, len(files), _HEADERS_AT_ONCE):
                yield from pool.map(self._read_raw_header, files[first : first + _HEADERS_AT_ONCE])

    def _read_raw_header(self, number: int) -> bytes:
        file = self.files[number]
        where = self.directory.describe(file.name)
        return _reading(where, partial(self._read_header, file, where))

    def _read_header(self, file: SourceFile, where: str) -> bytes:
        with self.directory.open_reader(file.name) as reader:
            prefix = bytearray(min(8, file.size))  # header_length says that fewer are too few
            reader.read_into(memoryview(prefix), 0)
            return reader.read_text(8, header_length(bytes(prefix), path=where, file_size=file.size))

    def _index_digest(self) -> bytes:
        return bytes(xxhash.xxh3_128_digest(self._raw[INDEX]))

    def _match_index(self, number: int, header: Header) -> HeaderColumns:
        """Find each block of a file in ``index``."""
        index = self._index
        # a search among the names of this file alone misses the processor's cache a third as often
        here = self._positions_by_file[number].tolist()
        place_here = {index.keys[place]: place for place in here}
        place = np.fromiter(map(place_here.get, header.keys, repeat(-1)), np.int32, len(header.keys))
        if (place >= 0).all():
            return to_columns(header, file=number, place=place)
        is_row_indexed = np.zeros(len(place), bool)
        where = self.directory.describe(self.files[number].name)
        for row, key in enumerate(header.keys):
            place[row] = index.place_of_key.get(key, -1)
            if place[row] < 0:
                # RecIS saves a dense tensor with "/part_" in its name under the bare name, and indexes it with the suffix
                place[row] = index.place_of_key.get(key + DENSE_SUFFIX, -1)
                is_row_indexed[row] = True
            if place[row] < 0:
                raise CheckpointError(
                    f"{where} holds {key!r}, which {INDEX} does not name; a loader would lose it"
                    ". Copy the checkpoint again, or take an earlier one"
                )
            expected = index.file[place[row]]
            if expected != number:
                raise CheckpointError(
                    f"{where} holds {key!r}, but {INDEX} says that it is in {self.files[expected].name}"
                    ". Copy the checkpoint again, or take an earlier one"
                )
        return to_columns(header, file=number, place=place, is_row_indexed=is_row_indexed)

    def _fingerprint(self, headers: HeaderColumns) -> str:
        """Return the digest of the files' names, sizes, versions and headers, and of the indexes."""
        hasher = xxhash.xxh3_128()
        starts = np.searchsorted(headers.file, np.arange(len(self.files) + 1))
        begins, dtypes = headers.begin.tobytes(), headers.dtype.tobytes()
        # the text of a million tuples of numbers, without the tuples
        ends = [f", {', '.join(map(str, shape))})" if shape else ",)" for shape in headers.inner_shapes]
        for number, file in enumerate(self.files):
            first, last = starts[number], starts[number + 1]
            keys = [self._index.keys[place] for place in headers.place[first:last].tolist()]
            if headers.is_row_indexed[first:last].any():
                row_indexed = headers.is_row_indexed[first:last].tolist()
                keys = [key.removesuffix(DENSE_SUFFIX) if b else key for key, b in zip(keys, row_indexed, strict=True)]
            hasher.update(msgspec.json.encode([file.name, file.size, file.version, keys]))
            hasher.update(begins[8 * first : 8 * last] + dtypes[first:last])
            columns = zip(headers.rows[first:last].tolist(), headers.inner[first:last].tolist(), strict=True)
            shapes = [f"({rows}{ends[inner]}" if rows >= 0 else "()" for rows, inner in columns]
            hasher.update(f"({', '.join(shapes)}{',' if len(shapes) == 1 else ''})".encode())
        for name in (INDEX, TENSORKEY):  # the merged manifest says nothing more, and an export may write it
            hasher.update(self._raw[name])
        return f"xxh3:{hasher.hexdigest()}"


class _Unchanged(Mapping[str, bytes]):
    """Small files as they were read, read again when they are asked for: some are a hundred MB, and most plans ask for none."""

    def __init__(self, directory: Directory, files: Mapping[str, bytes]) -> None:
        self._directory = directory
        self._digests = {name: xxhash.xxh3_128_digest(data) for name, data in files.items()}

    def __getitem__(self, name: str) -> bytes:
        expected = self._digests[name]
        where = self._directory.describe(name)
        data = _reading(where, partial(self._directory.read_text, name))
        if xxhash.xxh3_128_digest(data) != expected:
            raise CheckpointError(
                f"{where} has changed since it was read; run the export again on a finished checkpoint"
            )
        return data

    def __iter__(self) -> Iterator[str]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


def _reading(where: str, read: Callable[[], T]) -> T:
    """Return what ``read`` returns; a source that the system will not read is the user's to mend."""
    try:
        return read()
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error


def _stat_files(directory: Directory, names: Sequence[str]) -> Iterator[SourceFile]:
    if directory.s3 is None:
        stats = {name: _reading(directory.describe(name), partial(directory.stat, name)) for name in names}
    else:
        stats = _reading(directory.url, partial(directory.stat_many, names))
    for name in names:
        yield SourceFile.of(name, stats[name])


def _list_bystanders(names: set[str], indexed: set[str]) -> Iterable[str]:
    strays = sorted(name for name in names if _SHARD.fullmatch(name) and name not in indexed)
    if strays:
        yield f"{len(strays)} model files are in no index and stay behind (an earlier save?), first {strays[0]}"
    leftovers = sorted(name for name in names if _LEFTOVER.fullmatch(name))
    if leftovers:
        yield f"{len(leftovers)} leftovers of an interrupted save stay behind, first {leftovers[0]}"


def _list_lookalikes(tables: tuple[TableMeta, ...]) -> Iterable[str]:
    first: dict[str, str] = {}
    for table in tables:
        other = first.setdefault(unicodedata.normalize("NFKC", table.name), table.name)
        if other != table.name:
            yield (
                f"the tables {other!a} and {table.name!a} differ in unicode normalisation alone; both are kept, "
                "but whoever compares normalised names takes one for the other"
            )


def _list_hindrances(
    files: tuple[SourceFile, ...], headers: HeaderColumns, tables: tuple[TableMeta, ...], parts: Parts
) -> Iterable[str]:
    for number in sorted({*headers.with_lower_bool, *headers.with_metadata}):
        name = files[number].name
        if number in headers.with_lower_bool:
            yield f"{name} holds a tensor of dtype 'bool', with which RecIS can read no part of the file"
        if number in headers.with_metadata:
            yield f"{name} has a __metadata__ entry, which RecIS's reader refuses"
    columns = np.stack([parts.table, parts.begin, parts.end], axis=1)
    is_same = (columns[1:] == columns[:-1]).all(axis=1)  # parts come in the order of tables and slices
    is_first = is_same & ~np.concatenate([[False], is_same[:-1]]) if len(is_same) else is_same
    for table, begin, end in columns[:-1][is_first]:
        yield (
            f"two parts of table {tables[table].name!r} carry the slice {begin}:{end}, and RecIS's loader keeps one of them"
        )
