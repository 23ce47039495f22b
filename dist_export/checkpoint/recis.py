"""Reader of RecIS checkpoints, 1.0 to 1.2: ``model-*-of-*.safetensors``, ``index``, ``tensorkey.json``.

Source: the directories that RecIS's own C++ writer leaves. Which part a block belongs to is told by ``tensorkey.json``,
never by the file's name; ``index`` says which files count, so files of an earlier save in the same directory do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.reader import Blocks, Checkpoint, DenseTensor, Parts, SlotMeta, SourceFile, TableMeta
from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import DTYPES, I64
from dist_export.layout.indexes import decode_indexes, split_internal
from dist_export.layout.recis import (
    DENSE_SUFFIX,
    EMBEDDING_SLOT,
    ID_SLOT,
    INDEX,
    MERGED,
    TENSORKEY,
    Slice,
    key_stem,
)
from dist_export.layout.safetensors import Header, decode_header, decode_object, header_length
from dist_export.storage import Directory

_LEFTOVER = re.compile(r"ckpt-.*\.(tmp|json|index)$|.*\.tmp$|\d+tensorkey\.json$|\d+" + re.escape(MERGED) + "$")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors$")
_LAST_NUMBERS = re.compile(r"\d+")


class RecisReader:
    """Reads one RecIS checkpoint directory. See :class:`~dist_export.checkpoint.reader.CheckpointReader`."""

    def __init__(self, directory: Directory) -> None:
        """Read the indexes. CheckpointError where the directory, an index or a file that an index names is missing."""
        self.directory = directory
        names = set(directory.names())
        if not names:
            what = "is an empty directory" if directory.exists() else "does not exist"
            raise CheckpointError(f"{directory.url}: {what}; ckpt_dir must be a RecIS checkpoint (.../ckpt_<step>)")
        missing = [name for name in (INDEX, TENSORKEY) if name not in names]
        if missing:
            raise CheckpointError(
                f"{directory.url}: no {' and no '.join(missing)} among its {len(names)} files; RecIS writes them last, "
                "so this is no RecIS checkpoint or its save did not finish"
            )
        self._raw = {name: directory.read(name) for name in (INDEX, TENSORKEY, MERGED) if name in names}
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
            if file.size < 8:
                raise CheckpointError(f"{where}: {file.size} bytes, too short for a safetensors file; it is truncated")
            with self.directory.open_reader(file.name) as reader:
                prefix = bytearray(8)
                reader.read_into(memoryview(prefix), 0)
                raw = bytearray(header_length(bytes(prefix), path=where, file_size=file.size))
                reader.read_into(memoryview(raw), 8)
            found.append(decode_header(bytes(raw), path=where, file_size=file.size))
        return found

    def assemble(self, headers: list[Header]) -> Checkpoint:
        """Match headers, ``index`` and ``tensorkey.json`` with each other and build the columns."""
        collected = _Collected(self.directory)
        for number, header in enumerate(headers):
            self._match_index(number, header)
            for row, key in enumerate(header.keys):
                self._collect(collected, number, header, row, key)
        self._check_nothing_is_missing(headers)
        tables, parts, blocks = collected.build()
        fingerprint = xxhash.xxh3_128()
        for file, header in zip(self.files, headers, strict=True):
            fingerprint.update(msgspec.json.encode([file.name, file.size, file.version, header.keys]))
            fingerprint.update(header.begins.tobytes())
        for name in sorted(self._raw):
            fingerprint.update(self._raw[name])
        checkpoint = Checkpoint(
            format="recis",
            directory=self.directory,
            files=self.files,
            tables=tables,
            parts=parts,
            blocks=blocks,
            dense=tuple(collected.dense),
            fingerprint=f"xxh3:{fingerprint.hexdigest()}",
            copy_hindrances=(
                *_list_hindrances(self.files, headers, tables, parts),
                *(f"RecIS cannot read {name!r} under the key that its writer gave it" for name in collected.bare_dense),
            ),
            verbatim=(INDEX, TENSORKEY),
            warnings=self._warnings,
        )
        self._check_merged(headers)
        return checkpoint

    def _stat(self, name: str) -> SourceFile:
        found = self.directory.stat(name)
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

    def _collect(self, collected: _Collected, number: int, header: Header, row: int, key: str) -> None:
        internal = self._internal.get(key)
        is_dense = internal is None and (key.endswith(DENSE_SUFFIX) or key + DENSE_SUFFIX in self._file_of_key)
        if is_dense:
            begin, end = int(header.begins[row]), int(header.ends[row])
            if not key.endswith(DENSE_SUFFIX):
                collected.bare_dense.append(key)
            collected.dense.append(
                DenseTensor(
                    name=key.removesuffix(DENSE_SUFFIX),
                    dtype=int(header.dtypes[row]),
                    shape=header.shapes[row],
                    file=number,
                    offset=begin,
                    num_bytes=end - begin,
                )
            )
            return
        if internal is None and "^" not in key:
            raise CheckpointError(
                f"{self.directory.describe(self.files[number].name)} holds {key!r}, which {TENSORKEY} does not name; "
                "RecIS's loader would lose its rows without a word"
            )
        collected.add(internal or key, key, number, header, row)

    def _check_merged(self, headers: list[Header]) -> None:
        """Compare the merged manifest with the headers, in both of its styles. RecIS never reads it; serving does."""
        raw = self._raw.get(MERGED)
        if raw is None or raw.strip() == b"null":  # some versions write null where a rank had nothing to save
            return
        where = self.directory.describe(MERGED)
        shapes = {
            key: (header.shapes[row], int(header.dtypes[row]))
            for header in headers
            for row, key in enumerate(header.keys)
        }
        for key, entry in decode_object(raw, what=where).items():
            if not isinstance(entry, dict):
                raise CheckpointError(f"{where}: the entry {key!r} should be an object")
            if key not in shapes:
                if entry.get("is_hashmap"):
                    raise CheckpointError(f"{where} names {key!r}, which no file of the checkpoint holds")
                continue  # a parameter of model.pt, or a dense tensor saved under its bare name
            shape, code = shapes[key]
            if entry.get("shape") != list(shape):
                raise CheckpointError(
                    f"{where}: {key!r} has shape {entry.get('shape')}, its file says {list(shape)}; "
                    "they are not of the same save"
                )
            named = entry.get("dtype")
            if named and named not in (DTYPES[code].name, DTYPES[code].torch, "bool"):
                raise CheckpointError(f"{where}: {key!r} is {named}, its file says {DTYPES[code].name}")


class _Collected:
    """Blocks as they are met, file by file, and the checks that they make whole parts and tables."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self.dense: list[DenseTensor] = []
        self.bare_dense: list[str] = []
        self._slots: dict[str, dict[str, tuple[int, tuple[int, ...]]]] = {}
        self._parts: dict[tuple[str, Slice, str], dict[str, tuple[int, int, int, str]]] = {}
        self._names: dict[str, tuple[str, str, Slice, str]] = {}

    def add(self, internal: str, key: str, number: int, header: Header, row: int) -> None:
        """Take in one sparse block; ``internal`` is ``<table>@<slot>^<slice>``."""
        names = self._names.get(internal)
        if names is None:
            block = split_internal(internal)
            if block is None:
                raise self._error(key, f"has the internal name {internal!r}; expected <table>@<slot>^BEGIN@END@SIZE")
            names = self._names[internal] = (*block, key_stem(block.table, block.slot))
        table, slot, part_slice, stem = names
        shape = header.shapes[row]
        if not shape:
            raise self._error(key, "is a scalar, but a block of a table has a row for each id")
        kind = (int(header.dtypes[row]), shape[1:])
        if slot == ID_SLOT and kind != (I64, ()):
            raise self._error(key, f"is {DTYPES[kind[0]].name} {list(shape)}; ids are I64 [rows]")
        known = self._slots.setdefault(table, {}).setdefault(slot, kind)
        if known != kind:
            raise self._error(
                key,
                f"is {DTYPES[kind[0]].name} with rows of {list(kind[1])}; other parts of the table have "
                f"{DTYPES[known[0]].name} with rows of {list(known[1])}",
            )
        # Two parts of a table may carry one slice; the suffix of their keys then tells their blocks apart.
        suffix = key[len(stem) :] if key.startswith(stem) else ""
        blocks = self._parts.setdefault((table, part_slice, suffix), {})
        if slot in blocks:
            raise self._error(key, f"is the second block of {internal}; which one counts cannot be told")
        blocks[slot] = (number, int(header.begins[row]), shape[0], key)

    def build(self) -> tuple[tuple[TableMeta, ...], Parts, Blocks]:
        """Return tables in order of appearance, their parts by slice, and the matrix of blocks."""
        tables = tuple(
            TableMeta(name=table, slots=tuple(_order_slots(table, slots))) for table, slots in self._slots.items()
        )
        place = {table.name: i for i, table in enumerate(tables)}
        keys = sorted(self._parts, key=lambda key: (place[key[0]], key[1], _natural(key[2])))
        num_slots = max((len(table.slots) for table in tables), default=0)
        file = np.full((len(keys), num_slots), -1, np.int32)
        offset = np.zeros((len(keys), num_slots), np.int64)
        names = np.full((len(keys), num_slots), None, object)
        columns = np.zeros((5, len(keys)), np.int64)
        for part, key in enumerate(keys):
            table = tables[place[key[0]]]
            blocks = self._parts[key]
            rows = self._check_part(key, blocks, table)
            columns[:, part] = (place[key[0]], *key[1], rows)
            for slot in table.slots:
                if slot.name in blocks:
                    column = slot.column
                    file[part, column], offset[part, column], _, names[part, column] = blocks[slot.name]
        parts = Parts(table=columns[0], begin=columns[1], end=columns[2], size=columns[3], rows=columns[4])
        for number, table in enumerate(tables):
            sizes = np.unique(parts.size[parts.table == number])
            if len(sizes) > 1:
                raise CheckpointError(
                    f"{self._directory.url}: table {table.name!r} has parts with slice sizes "
                    f"{', '.join(map(str, sizes))}; RecIS's loader takes rows of one size only"
                )
        return tables, parts, Blocks(file=file, offset=offset, key=names)

    def _check_part(
        self, key: tuple[str, Slice, str], blocks: dict[str, tuple[int, int, int, str]], table: TableMeta
    ) -> int:
        where = f"{self._directory.url}: part {key[2].lstrip('/') or tuple(key[1])} of table {key[0]!r}"
        for needed in (ID_SLOT, EMBEDDING_SLOT):
            if needed not in blocks:
                raise CheckpointError(f"{where} has no {needed} block")
        rows = blocks[ID_SLOT][2]
        for slot, (_, _, slot_rows, _) in blocks.items():
            if slot_rows != rows:
                raise CheckpointError(
                    f"{where} has {rows:,} ids but {slot_rows:,} rows of {slot}; RecIS's reader would run on into the "
                    "next block"
                )
        absent = [slot.name for slot in table.slots if slot.name not in blocks]
        if absent and rows:
            raise CheckpointError(f"{where} has {rows:,} rows but no {absent[0]}, which other parts have")
        return rows

    def _error(self, key: str, text: str) -> CheckpointError:
        return CheckpointError(f"{self._directory.url}: block {key!r} {text}")


def _order_slots(table: str, slots: dict[str, tuple[int, tuple[int, ...]]]) -> Iterable[SlotMeta]:
    missing = [name for name in (ID_SLOT, EMBEDDING_SLOT) if name not in slots]
    if missing:
        raise CheckpointError(f"table {table!r} has no {' and no '.join(missing)} block in any file")
    names = [ID_SLOT, EMBEDDING_SLOT, *(name for name in slots if name not in (ID_SLOT, EMBEDDING_SLOT))]
    for column, name in enumerate(names):
        dtype, inner = slots[name]
        row_bytes = int(np.prod(inner, dtype=np.int64)) * DTYPES[dtype].itemsize
        yield SlotMeta(name=name, dtype=dtype, inner_shape=inner, row_bytes=row_bytes, column=column)


def _natural(suffix: str) -> tuple[list[int], str]:
    return [int(number) for number in _LAST_NUMBERS.findall(suffix)], suffix


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
