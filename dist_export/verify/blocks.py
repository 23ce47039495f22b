"""Read all blocks of a directory as columns: match its headers with ``index`` and ``tensorkey.json``.

A difference between the three is a finding, and reading continues. If ``index`` is missing or damaged, the headers replace it.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from dist_export.errors import PackageError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.interning import Numbering
from dist_export.formats.recis import DENSE_SUFFIX, INDEX, TENSORKEY, Slice, encode_index, format_slice, parse_slice
from dist_export.formats.recis_index import Indexes, decode_indexes, split_internal, split_stem
from dist_export.formats.safetensors import Header
from dist_export.package.shard_headers import read_header
from dist_export.storage.directory import Directory
from dist_export.verify.index_files import decodable, decode_both, read_small, without
from dist_export.verify.indexed_tables import RowIndexedBlocks
from dist_export.verify.report import Report

_REQUESTS_AT_ONCE = 16
_HEADERS_AT_ONCE = 128


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Blocks:
    """The blocks of all readable headers, as parallel columns of length n in the order of files and headers."""

    files: tuple[str, ...]
    has_index: bool
    """Whether ``files`` and their order are those of ``index``."""
    is_whole: bool
    """Whether every block and its name are known. If not, missing blocks are not findings."""
    keys: tuple[str, ...]
    """The names in the headers, by place."""
    place_of_key: dict[str, int]
    """Name in ``index`` -> place. A dense tensor always has the suffix there, even if its header has none."""
    row_of_place: np.ndarray
    """int64: the row of each name; -1 for a name that no header has."""
    place: np.ndarray
    """int32"""
    file: np.ndarray
    """int32"""
    dtype: np.ndarray
    """int8: index into ``DTYPES``."""
    rows: np.ndarray
    """int64: the first dimension, -1 for a scalar."""
    inner: np.ndarray
    """int32: the other dimensions, as an index into ``inner_shapes``."""
    inner_shapes: tuple[tuple[int, ...], ...]
    begin: np.ndarray
    end: np.ndarray
    """int64: absolute positions in the file, in bytes."""
    stem: np.ndarray
    """int32: the internal name before the caret, as an index into ``stems``; -1 for a dense tensor, -2 if it is not known."""
    text: np.ndarray
    """int32: the internal name after the caret, as an index into ``texts``; -1 if ``stem`` is negative."""
    stems: tuple[tuple[str, str], ...]
    """Table and slot."""
    texts: tuple[str, ...]
    """Slices, in any spelling."""
    table: np.ndarray
    """int32: an index into ``tables``; -1 if ``stem`` is negative."""
    tables: tuple[str, ...]
    slice: np.ndarray
    """int32: an index into ``slices``; -1 if ``stem`` is negative."""
    slices: np.ndarray
    """int64 (n, 3): begin, end and size."""
    is_row_indexed: np.ndarray
    """bool: whether the block is of a row-indexed table. The manifest names such a block, and no index does."""

    def __len__(self) -> int:
        return len(self.place)

    def key(self, row: int) -> str:
        """Return a block's name in its header."""
        return self.keys[int(self.place[row])]

    def file_of(self, row: int) -> str:
        """Return the file of a block."""
        return self.files[int(self.file[row])]

    def shape(self, row: int) -> tuple[int, ...]:
        """Return a block's shape."""
        rows = int(self.rows[row])
        return (rows, *self.inner_shapes[self.inner[row]]) if rows >= 0 else ()

    def torch_dtype(self, row: int) -> str:
        """Return torch's name of a block's dtype."""
        return DTYPES[int(self.dtype[row])].torch

    def slice_of(self, row: int) -> Slice:
        """Return the slice of a sparse block."""
        return Slice(*self.slices[self.slice[row]].tolist())

    def internal(self, row: int) -> str:
        """Return the internal name of a sparse block, for messages."""
        table, slot = self.stems[self.stem[row]]
        return f"{table}@{slot}^{format_slice(self.slice_of(row))}"

    def find(self, keys: Iterable[str], count: int) -> np.ndarray:
        """Return the row of each of ``count`` keys (int64); -1 for a key without a row."""
        place = np.fromiter(map(self.place_of_key.get, keys, repeat(-1)), np.int64, count)
        if not len(self.row_of_place):
            return np.full(count, -1, np.int64)
        return np.where(place >= 0, self.row_of_place[place], np.int64(-1))

    def is_slot(self, name: str) -> np.ndarray:
        """Return which blocks are of this slot, in any table (bool)."""
        of_stem: np.ndarray = np.array([slot == name for _, slot in self.stems] + [False], bool)
        found: np.ndarray = of_stem[np.maximum(self.stem, -1)]
        return found


def read_blocks(
    directory: Directory,
    shards: Sequence[str],
    unreadable: frozenset[str],
    report: Report,
    *,
    row_indexed: RowIndexedBlocks | None = None,
) -> Blocks:
    """Read indexes and headers, and report what is wrong with them or differs between them.

    Args:
        directory: the directory to check.
        shards: the files to read if ``index`` cannot be used.
        unreadable: files with a finding already. They are not read.
        report: gets the findings.
        numbered: blocks of row-indexed tables, from the manifest; by default there are none.
    """
    row_indexed = row_indexed or RowIndexedBlocks()
    raw_index = None if INDEX in unreadable else read_small(directory, INDEX, report, row_indexed)
    raw_tensorkey = None if TENSORKEY in unreadable else read_small(directory, TENSORKEY, report, row_indexed)
    reader = _Reader(directory, unreadable, report, row_indexed)
    indexes = None if raw_index is None or raw_tensorkey is None else decode_both(raw_index, raw_tensorkey)
    if indexes is not None:
        del raw_index, raw_tensorkey
        return reader.match(indexes, has_index=True, has_tensorkey=True)
    if raw_index is not None:
        raw_index = decodable(INDEX, (raw_index, b"{}"), report)
    if raw_tensorkey is not None:
        raw_tensorkey = decodable(TENSORKEY, (encode_index({}), raw_tensorkey), report)
    stand_in = encode_index(reader.index_by_headers(shards)) if raw_index is None else raw_index
    indexes = decode_indexes(stand_in, raw_tensorkey or b"{}", where="")
    return reader.match(indexes, has_index=raw_index is not None, has_tensorkey=raw_tensorkey is not None)


class _Reader:
    """Reads headers one file after the other and matches them with the names of the index."""

    def __init__(
        self, directory: Directory, unreadable: frozenset[str], report: Report, row_indexed: RowIndexedBlocks
    ) -> None:
        self._directory = directory
        self._unreadable = unreadable
        self._report = report
        self._row_indexed = row_indexed
        self._unstated: set[str] = set()
        self._elsewhere: list[tuple[str, int]] = []
        self._is_whole = True
        self._kept: dict[str, Header] = {}

    def index_by_headers(self, shards: Sequence[str]) -> dict[str, str]:
        """Return key -> file as ``index`` would, from the headers. Keys are the names in the headers, with no suffix added."""
        found: dict[str, str] = {}
        for name, header in self._headers(shards):
            self._kept[name] = header
            for key in header.keys:
                if found.setdefault(key, name) != name:
                    self._report.add(name, INDEX, f"holds {key!r}, which also stands in {found[key]}")
        return found

    def match(self, indexes: Indexes, *, has_index: bool, has_tensorkey: bool) -> Blocks:
        """Return the columns of all blocks."""
        if self._row_indexed:
            indexes, self._is_row_indexed = self._row_indexed.add_to(indexes, self._report, is_read=has_index)
        else:
            self._is_row_indexed = np.zeros(len(indexes.keys), bool)
        self._indexes = indexes
        self._has_index = has_index
        self._extra: Numbering[str] = Numbering()
        self._inner: Numbering[tuple[int, ...]] = Numbering()
        self._row_indexed_keys: dict[int, str] = {}
        columns, is_read = self._read_headers(indexes)
        self._is_whole &= bool(is_read.all())
        place, file, dtype, rows, inner, begin, end = self._join(columns)
        keys = (*indexes.keys, *self._extra)
        row_of_place = np.full(len(keys), -1, np.int64)
        row_of_place[place] = np.arange(len(place))
        self._tell_of_missing(row_of_place, is_read)
        for row_indexed, key in self._row_indexed_keys.items():
            keys = (*keys[:row_indexed], key, *keys[row_indexed + 1 :])
        stem, text, stems, texts = self._name(place, keys, has_tensorkey=has_tensorkey)
        indexes.place_of_key.update({key: len(indexes.keys) + number for key, number in self._extra.items()})
        split = tuple(split_stem(name) or ("", name) for name in stems)
        tables: Numbering[str] = Numbering()
        table_of_stem = np.array([tables[table] for table, _ in split] + [-1], np.int32)
        slices: Numbering[Slice] = Numbering()
        slice_of_text = np.array([slices[parse_slice(t) or Slice(0, 0, 1)] for t in texts] + [-1], np.int32)
        return Blocks(
            files=indexes.files,
            has_index=has_index,
            is_whole=self._is_whole,
            keys=keys,
            place_of_key=indexes.place_of_key,
            row_of_place=row_of_place,
            place=place,
            file=file,
            dtype=dtype,
            rows=rows,
            inner=inner,
            inner_shapes=tuple(self._inner),
            begin=begin,
            end=end,
            stem=stem,
            text=text,
            stems=split,
            texts=texts,
            table=table_of_stem[np.maximum(stem, -1)],
            tables=tuple(tables),
            slice=slice_of_text[text],
            slices=np.array(list(slices), np.int64).reshape(-1, 3),
            is_row_indexed=np.append(self._is_row_indexed, np.zeros(len(self._extra), bool))[place],
        )

    def _read_headers(self, indexes: Indexes) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
        """Return the columns of the blocks of each file whose header can be read, and which files those are."""
        order = np.argsort(indexes.file, kind="stable")
        edges = np.searchsorted(indexes.file[order], np.arange(1, max(len(indexes.files), 1)))
        positions_by_file = dict(zip(indexes.files, np.split(order, edges), strict=False))
        numbers = {name: number for number, name in enumerate(indexes.files)}
        is_read = np.zeros(len(indexes.files), bool)
        columns: list[tuple[np.ndarray, ...]] = []
        for name, header in self._headers(indexes.files):
            number = numbers[name]
            is_read[number] = True
            self._tell_of_header(name, header)
            inner = np.array([self._inner[shape] for shape in header.inner_shapes] or [0], np.int32)[header.inner]
            place = self._positions(name, header, positions_by_file[name])
            file = np.full(len(place), number, np.int32)
            columns.append((place, file, header.dtypes, header.rows, inner, header.begins, header.ends))
        return columns, is_read

    def _headers(self, names: Sequence[str]) -> Iterator[tuple[str, Header]]:
        """Yield the headers that can be read, and report the others."""
        wanted = [name for name in names if name not in self._unreadable]
        if self._directory.is_local:  # threads would only delay each other
            yield from self._sound(zip(wanted, map(self._read, wanted), strict=True))
            return
        with concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            for first in range(0, len(wanted), _HEADERS_AT_ONCE):
                some = wanted[first : first + _HEADERS_AT_ONCE]
                yield from self._sound(zip(some, pool.map(self._read, some), strict=True))

    def _sound(self, found: Iterable[tuple[str, Header | str]]) -> Iterator[tuple[str, Header]]:
        for name, header in found:
            if isinstance(header, Header):
                yield name, header
            elif header:
                self._report.add(name, "header", header)

    def _read(self, name: str) -> Header | str:
        """Return a file's header, or the text of a finding."""
        kept = self._kept.pop(name, None)
        if kept is not None:
            return kept
        try:
            return read_header(self._directory, name)
        except PackageError as error:
            message = without(self._directory.describe(name), str(error))
            return "is missing; index names it" if message == "is missing" else message
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    def _tell_of_header(self, name: str, header: Header) -> None:
        if header.has_metadata:
            self._report.add(
                name, "metadata", "has a __metadata__ entry, with which RecIS's reader can read no part of the file"
            )
        if header.has_lower_bool:
            self._report.add(
                name, "bool", "holds a tensor of dtype 'bool', with which RecIS's reader can read no part of the file"
            )

    def _positions(self, name: str, header: Header, expected: np.ndarray) -> np.ndarray:
        """Return the place of each block of a file among the names of the index. Other blocks get new places after those."""
        indexes = self._indexes
        here = expected.tolist()
        place_here = {indexes.keys[place]: place for place in here}
        place = np.fromiter(map(place_here.get, header.keys, repeat(-1)), np.int32, len(header.keys))
        for row in np.flatnonzero(place < 0).tolist():
            key = header.keys[row]
            known = indexes.place_of_key.get(key)
            if known is not None:
                if self._is_row_indexed[known]:  # compared later with the manifest's tables
                    self._elsewhere.append((name, known))
                elif self._has_index:  # without an index, the second file was already reported
                    self._report.add(
                        name, INDEX, f"holds {key!r}, but index says that it is in {indexes.files[indexes.file[known]]}"
                    )
                place[row] = known
                continue
            known = indexes.place_of_key.get(key + DENSE_SUFFIX)
            if known is not None:
                self._report.add(
                    name,
                    INDEX,
                    f"holds {key!r}, which index names with {DENSE_SUFFIX!r} behind it; RecIS cannot read it",
                )
                self._row_indexed_keys[known] = key
                place[row] = known
                continue
            if self._row_indexed and key not in indexes.strays and not self._row_indexed.is_hashed(key):
                self._unstated.add(key)  # reported when the manifest's tables are compared
            else:
                self._report.add(name, INDEX, f"holds {key!r}, but index does not name it; RecIS's loader loses it")
            place[row] = len(indexes.keys) + self._extra[key]
        return place

    def _join(self, columns: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        """Join the columns of all files. If two files hold a block, the one that the index names counts."""
        kinds = (np.int32, np.int32, np.int8, np.int64, np.int32, np.int64, np.int64)
        place, file, *others = (
            np.concatenate([np.zeros(0, kind), *(found[number] for found in columns)])
            for number, kind in enumerate(kinds)
        )
        num_named = len(self._indexes.keys)
        times = np.bincount(place, minlength=num_named)
        is_known = place < num_named
        is_stray = (times[place] > 1) & is_known
        for name, known in self._elsewhere:
            if times[known] > 1:
                self._report.add(name, "manifest", f"holds {self._indexes.keys[known]!r}, which another file holds too")
        if is_stray.any():
            is_stray[is_known] &= file[is_known] != self._indexes.file[place[is_known]]
            kept = ~is_stray
            return tuple(column[kept] for column in (place, file, *others))
        return (place, file, *others)

    def _tell_of_missing(self, row_of_place: np.ndarray, is_read: np.ndarray) -> None:
        indexes = self._indexes
        absent = np.flatnonzero((row_of_place[: len(indexes.keys)] < 0) & ~self._is_row_indexed)
        for place in absent[is_read[indexes.file[absent]]].tolist():
            self._report.add(
                INDEX, INDEX, f"{indexes.keys[place]!r} should be in {indexes.files[indexes.file[place]]}, but is not"
            )
            self._is_whole = False
        if is_read.all():
            for key in indexes.strays:
                if key not in self._extra:
                    self._report.add(TENSORKEY, TENSORKEY, f"{key!r} is in no file")

    def _name(
        self, place: np.ndarray, keys: tuple[str, ...], *, has_tensorkey: bool
    ) -> tuple[np.ndarray, np.ndarray, tuple[str, ...], tuple[str, ...]]:
        """Return the numbers of stem and slice of each row, and the stems and slices by number."""
        indexes = self._indexes
        stems: Numbering[str] = Numbering(zip(indexes.stems, range(len(indexes.stems)), strict=True))
        texts: Numbering[str] = Numbering(zip(indexes.slices, range(len(indexes.slices)), strict=True))
        unnamed = np.full(len(self._extra), -1, np.int32)
        stem = np.concatenate([indexes.stem, unnamed])[place]
        text = np.concatenate([indexes.slice, unnamed])[place]
        for row in np.flatnonzero(stem < 0).tolist():
            number = int(place[row])
            key = keys[number]
            internal = indexes.strays.get(key)
            if internal is None and (key.endswith(DENSE_SUFFIX) or number in self._row_indexed_keys):
                continue
            internal = key if internal is None else internal
            if split_internal(internal) is not None:  # a key may be the internal name itself
                before, _, behind = internal.rpartition("^")
                stem[row], text[row] = stems[before], texts[behind]
                continue
            stem[row] = -2
            if key in self._unstated:
                continue
            self._is_whole = False
            if has_tensorkey:
                self._report.add(
                    TENSORKEY, TENSORKEY, f"does not name {key!r}; RecIS's loader loses its rows without a word"
                )
        return stem, text, tuple(stems), tuple(texts)
