"""Reader of DynamicEmb dumps: raw files of keys, values, scores and optimizer state, one of each for a rank and table.

Source: ``DynamicEmbDump`` of NVIDIA's recsys-examples (corelib/dynamicemb, ``dump_load.py`` and, in its second version,
``batched_dynamicemb_tables.py``), and TorchEasyRec, which keeps a dump in ``dynamicemb/`` of its checkpoints. Below the
dump's directory is one for each embedding collection, called as its path in the model, with files named
``<table>_emb_<what>.rank_<r>.world_size_<w>``: int64 keys, float32 values (n, dim), int64 scores (where rows are not evicted
by age, or two a key), float32 optimizer state (n, k), which the first version calls ``<table>_opt_values``. Nothing else tells
n or dim: ``dump_widths.py`` judges what the sizes of files say. A row is on rank ``key mod w``, or elsewhere in newer versions;
loaders sort that out, and so does an export, by key.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from dist_export.checkpoint.dcp_files import find_metadata
from dist_export.checkpoint.dynamicemb_widths import Stated, find_score_words, find_width, read_stated
from dist_export.checkpoint.metadata import ABSENT, Blocks, Checkpoint, Parts, SlotMeta, SourceFile, TableMeta
from dist_export.checkpoint.payload import OtherTensor, Payload
from dist_export.checkpoint.tensors.common import stat_files
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES, I64
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.formats.strict_json import decode_object
from dist_export.storage.directory import Directory

FOLDER = "dynamicemb"
"""What TorchEasyRec calls the dump in its checkpoints."""
SCORE_SLOT = "score"
OPTIMIZER_SLOT = "opt_values"
_SIZE = 65536
"""Of the slices that rows are sorted into, as RecIS has it. Every part may hold any of them."""
_KEYS = re.compile(r"(.+)_emb_keys\.rank_(\d{1,9})\.world_size_(\d{1,9})", re.DOTALL)
_FILE = re.compile(r"(.+)\.rank_(\d{1,9})\.world_size_(\d{1,9})", re.DOTALL)
_F32 = CODE_BY_NAME["F32"]


class _Files(NamedTuple):
    """The files of one table, by rank."""

    name: str
    world_size: int
    stated: Stated
    """What its json files state."""
    keys: list[str]
    values: list[str]
    scores: list[str]
    """Empty where the dump has none; also ``opt_values``."""
    opt_values: list[str]


class DumpedTable(NamedTuple):
    """A table of a dump, as far as names of files tell."""

    table: str
    folder: str
    """Of its files, relative to the checkpoint."""
    world_sizes: frozenset[int]
    """Of the ranks that wrote it; several where files of several dumps lie there."""

    @property
    def pattern(self) -> str:
        """The files of its keys, for messages."""
        return f"{self.folder}/{self.table}_emb_keys.rank_*".lstrip("/")


class DynamicEmbReader:
    """Reads one dump. See :class:`~dist_export.checkpoint.metadata.CheckpointReader`; there are no headers."""

    def __init__(self, directory: Directory, *, with_dcp: bool = False) -> None:
        """Find the files. CheckpointError where there is none, or those of a rank are missing.

        ``with_dcp``: whether the DCP checkpoint beside it is exported with it; then no table need have a row.
        """
        self.directory = directory
        self._with_dcp = with_dcp
        folders = find_dumps(directory)
        if not folders:
            raise CheckpointError(
                f"{directory.url}: no <table>_emb_keys.rank_<r>.world_size_<w> in it, in its directories or in {FOLDER}/; "
                "ckpt_dir must be the path that DynamicEmbDump was given"
            )
        self._warnings: list[str] = []
        found = [(folder, table) for folder in folders for table in self._list_tables(folder)]
        names = [table.name for _, table in found]
        # in two collections of one model a table may have the same name
        self._tables = [
            table._replace(name=table.name if names.count(table.name) == 1 else f"{_module(folder)}.{table.name}")
            for folder, table in found
        ]
        self._tables.sort(key=lambda table: table.name)
        every = [name for table in self._tables for names in table[3:] for name in names]
        self.files: tuple[SourceFile, ...] = stat_files(directory, sorted(every))
        self._sizes = {file.name: file.size for file in self.files}

    def read_headers(self, files: range) -> tuple[SourceFile, ...]:
        """Return the files as this rank sees them: names and sizes are all that they say without being read."""
        return self.files[files.start : files.stop]

    def assemble(self, shares: Sequence[tuple[SourceFile, ...]]) -> Checkpoint:
        """Tell rows and dimensions by the sizes of the files. CheckpointError where these do not fit each other."""
        everywhere = [(file.name, file.size, file.version) for share in shares for file in share]
        mine = [(file.name, file.size, file.version) for file in self.files]
        if everywhere != mine:
            raise CheckpointError(
                f"{self.directory.url} is not the same on all ranks; it must be one shared directory whose files no longer "
                "change"
            )
        number = {file.name: place for place, file in enumerate(self.files)}
        tables: list[TableMeta] = []
        rows: list[np.ndarray] = []
        placed: list[list[list[str]]] = []
        warnings = list(self._warnings)
        if not self._with_dcp and find_metadata(self.directory):
            warnings.append(
                f"{self.directory.url} also holds a DCP checkpoint, which stays behind, for format is dynamicemb; format: "
                "auto takes both"
            )
        for table in self._tables:
            counted = np.array([self._count(name, 8, "keys") for name in table.keys], np.int64)
            if not counted.any():
                warnings.append(f"table {table.name!r} has no row, so its dimension is not told; it is left out")
                continue
            described, columns = self._describe(table, counted)
            tables.append(described)
            rows.append(counted)
            placed.append(columns)
        if not tables and not self._with_dcp:
            raise CheckpointError(
                f"{self.directory.url}: no table of the dump has a row. Dump the tables when they have rows"
            )
        parts = np.concatenate([np.zeros(0, np.int64), *rows])
        of_table = np.repeat(np.arange(len(rows)), np.array([len(its) for its in rows], np.int64))
        width = max((len(table.slots) for table in tables), default=2)
        file = np.full((len(parts), width), ABSENT, np.int32)
        key = np.full((len(parts), width), "", object)
        first = 0
        for its in placed:
            for column, names in enumerate(its):
                for rank, name in enumerate(names):
                    file[first + rank, column], key[first + rank, column] = number[name], name
            first += len(its[0])
        zeros = np.zeros(len(parts), np.int64)
        sizes = np.full(len(parts), _SIZE, np.int64)
        return Checkpoint(
            format="dynamicemb",
            directory=self.directory,
            files=self.files,
            tables=tuple(tables),
            parts=Parts(table=of_table, begin=zeros, end=sizes, size=sizes, rows=parts),
            blocks=Blocks(file=file, offset=np.zeros((len(parts), width), np.int64), key=key),
            dense=(),
            fingerprint=f"xxh3:{xxhash.xxh3_128_hexdigest(repr(mine).encode('utf-8', 'surrogatepass'))}",
            copy_hindrances=("a dump is raw files, which RecIS and serving cannot read",),
            verbatim={},
            warnings=tuple(warnings),
            payload=self._list_payload({table.name for table in tables}),
        )

    def _list_payload(self, known: set[str]) -> Payload:
        """Return all files as tensors, a kind of files of a table each; those of tables without a row are in no table.

        A kind whose files are all empty is no tensor: an optimizer without state leaves such files.
        """
        kinds = [
            (table.name, filled)
            for table in self._tables
            for names in table[3:]
            if (filled := [name for name in names if self._sizes[name]])
        ]
        others = tuple(
            OtherTensor(name.rpartition(".rank_")[0], "", (), self._sizes[name], "of a table without a row")
            for table, names in kinds
            if table not in known
            for name in names
        )
        return Payload(
            tensors=sum(table in known for table, _ in kinds) + len(others),
            num_bytes=sum(file.size for file in self.files),
            others=others,
        )

    def _list_tables(self, folder: str) -> Iterator[_Files]:
        prefix = f"{folder}/" if folder else ""
        names = (self.directory.child(folder) if folder else self.directory).names()
        ranks: dict[str, set[tuple[int, int]]] = {}
        for name in names:
            if (found := _KEYS.fullmatch(name)) is not None:
                ranks.setdefault(found[1], set()).add((int(found[2]), int(found[3])))
        others = {found[1] for name in names if (found := _FILE.fullmatch(name)) is not None}
        states = {stem for stem in others if stem.endswith("_opt_values")}
        # the first version has no _emb before _opt_values, and a table may be called "x_emb"
        is_first = all(stem.removesuffix("_opt_values") in ranks for stem in states)
        known: set[str] = set()
        for table, its in ranks.items():
            sizes = {world_size for _, world_size in its}
            where = self.directory.describe(f"{prefix}{table}_emb_keys.rank_*")
            if len(sizes) > 1:
                raise CheckpointError(
                    f"{where}: files of dumps on {' and '.join(map(str, sorted(sizes)))} ranks, and nothing says "
                    "which of them are valid. Dump into an empty directory"
                )
            (world_size,) = sizes
            if len(its) != world_size or any(rank >= world_size for rank, _ in its):
                missing = next(rank for rank in range(world_size) if (rank, world_size) not in its)
                raise CheckpointError(
                    f"{where}: the file of rank {missing} of {world_size} is missing; the dump did not finish, or was "
                    "copied in part. Copy the whole dump again, or take an earlier one"
                )
            state = f"{table}_opt_values" if is_first else f"{table}_emb_opt_values"
            stems = {
                "keys": f"{table}_emb_keys",
                "values": f"{table}_emb_values",
                "scores": f"{table}_emb_scores",
                "opt_values": state,
            }
            files = {
                what: self._all_ranks(prefix, names, stem, world_size, is_needed=what in ("keys", "values"))
                for what, stem in stems.items()
            }
            known.update(stems.values())
            yield _Files(table, world_size, self._read_stated(prefix, names, table, ranks), **files)
        strays = sorted(others - known)
        if strays:
            self._warnings.append(
                f"{self.directory.describe(folder)}: {len(strays)} kinds of files are of no table and stay behind, first "
                f"{strays[0]}"
            )

    def _read_stated(self, prefix: str, names: Sequence[str], table: str, tables: Iterable[str]) -> Stated:
        """Return what json files state of a table: those called as the table, and ``<table>_<what>.json``."""
        longer = tuple(f"{other}_" for other in tables if other.startswith(f"{table}_"))
        documents = []
        for name in sorted(names):
            stem = name.removesuffix(".json")
            if stem == name or not f"{stem}_".startswith(f"{table}_") or f"{stem}_".startswith(longer):
                continue
            where = self.directory.describe(prefix + name)
            try:
                documents.append((name, decode_object(self.directory.read_text(prefix + name), what=where)))
            except OSError as error:
                raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error
        return read_stated(documents)

    def _all_ranks(
        self, prefix: str, names: Sequence[str], stem: str, world_size: int, *, is_needed: bool
    ) -> list[str]:
        expected = [f"{stem}.rank_{rank}.world_size_{world_size}" for rank in range(world_size)]
        there = set(names).intersection(expected)
        if not there and not is_needed:
            return []
        absent = [name for name in expected if name not in there]
        if absent:
            raise CheckpointError(
                f"{self.directory.describe(prefix + absent[0])} is missing; the dump did not finish, or was copied in part"
                ". Copy the checkpoint again, or take an earlier one"
            )
        return [prefix + name for name in expected]

    def _count(self, name: str, row_bytes: int, what: str) -> int:
        size = self._sizes[name]
        if size % row_bytes:
            raise CheckpointError(
                f"{self.directory.describe(name)} has {size:,} bytes, no multiple of {row_bytes} for {what}; it is cut short"
                ". Copy the whole dump again, or take an earlier one"
            )
        return size // row_bytes

    def _describe(self, table: _Files, rows: np.ndarray) -> tuple[TableMeta, list[list[str]]]:
        """Return a table with ``rows`` keys on each rank, and the files of each of its slots."""
        stated = table.stated
        state = self._row_bytes(table.opt_values, rows, OPTIMIZER_SLOT, 4)
        width = find_width(
            self._row_bytes(table.values, rows, EMBEDDING_SLOT, 2), state // 4 if table.opt_values else None, stated
        )
        words = self._row_bytes(table.scores, rows, SCORE_SLOT, 8) // 8
        wrong_scores = find_score_words(words, stated) if table.scores else ""
        slots = [SlotMeta(name=ID_SLOT, dtype=I64, inner_shape=(), row_bytes=8, column=0)]
        columns = [table.keys]
        for names, slot, code, shape in (
            (table.values, EMBEDDING_SLOT, width.dtype, (width.dim,)),
            (table.scores, SCORE_SLOT, I64, () if words == 1 else (words,)),
            (table.opt_values if state else [], OPTIMIZER_SLOT, _F32, (state // 4,)),
        ):
            if names:
                slots.append(
                    SlotMeta(
                        name=slot,
                        dtype=code,
                        inner_shape=shape,
                        row_bytes=math.prod(shape) * DTYPES[code].itemsize,
                        column=len(slots),
                        is_optimizer=slot == OPTIMIZER_SLOT,
                    )
                )
                columns.append(names)
        meta = TableMeta(
            name=table.name,
            slots=tuple(slots),
            width_confirmed_by=width.confirmed_by,
            contradiction=width.contradiction or wrong_scores,
            width_missing=width.missing,
        )
        return meta, columns

    def _row_bytes(self, names: Sequence[str], rows: np.ndarray, slot: str, itemsize: int) -> int:
        """Return the bytes that each key has in the files of a slot; 0 where all of these are empty, or there are none."""
        if not names:
            return 0
        longest = int(np.argmax(rows))
        count, size = int(rows[longest]), self._sizes[names[longest]]
        row_bytes = max(round(size / count / itemsize), 1) * itemsize
        # an optimizer without state leaves empty files
        if slot == OPTIMIZER_SLOT and not any(self._sizes[name] for name in names):
            return 0
        for name, count in zip(names, rows.tolist(), strict=True):
            size = self._count(name, itemsize, slot) * itemsize
            if size != count * row_bytes:
                raise CheckpointError(
                    f"{self.directory.describe(name)} has {size:,} bytes, expected {count * row_bytes:,}: {count:,} keys "
                    f"of {row_bytes:,} bytes each. The files are not of one dump"
                    ". Copy the whole dump again, or take an earlier one"
                )
        return row_bytes


def find_dumps(directory: Directory) -> list[str]:
    """Return the directories with files of a dump, relative to ``directory``: itself (empty), those in it or in dynamicemb/."""
    found = [""] if _has_keys(directory) else []
    for folder in directory.folders():
        if folder == FOLDER:
            inner = directory.child(folder)
            found += [folder] if _has_keys(inner) else []
            found += [f"{folder}/{name}" for name in inner.folders() if _has_keys(inner.child(name))]
        elif not folder.startswith(".") and _has_keys(directory.child(folder)):
            found.append(folder)
    return found


def list_dumped(directory: Directory) -> tuple[DumpedTable, ...]:
    """Return the tables of the dumps in ``directory``, whole or not, also those without a row; empty where there is none."""
    found: dict[tuple[str, str], set[int]] = {}
    for folder in find_dumps(directory):
        for name in (directory.child(folder) if folder else directory).names():
            if (match := _KEYS.fullmatch(name)) is not None:
                found.setdefault((folder, match[1]), set()).add(int(match[3]))
    return tuple(DumpedTable(table, folder, frozenset(sizes)) for (folder, table), sizes in found.items())


def _has_keys(directory: Directory) -> bool:
    return any(map(_KEYS.fullmatch, directory.names()))


def _module(folder: str) -> str:
    return folder.rpartition("/")[2] or "dump"
