"""What an export asks of a source checkpoint, and the metadata that every format answers with. No outputs, no plans."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec
import numpy as np
import xxhash

from dist_export.checkpoint.payload import Payload
from dist_export.checkpoint.trainer_dump import TrainerDump
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import DENSE_STATE, Slice
from dist_export.formats.row_encodings import TAIL_BYTES
from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.range_reader import RangeReader

if TYPE_CHECKING:
    from dist_export.manifest import CastEntry

Share = TypeVar("Share")
"""What a reader makes of the headers of some files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One payload file of the checkpoint."""

    name: str
    size: int
    """In bytes."""
    version: str
    """Changes when the content does, unless somebody sets it back."""
    trace: tuple[int, ...] = ()
    """Inode and time of the last change on a disk, as far as its file system keeps them: nobody sets these back. They may be
    others on another machine, and are of no fingerprint."""
    links: int = 0
    """Names of the file on a disk."""

    @classmethod
    def of(cls, name: str, found: FileStat) -> SourceFile:
        """Return a file in the state in which it was found."""
        return cls(name=name, size=found.size, version=found.version, trace=found.trace, links=found.links)

    def is_same(self, now: FileStat | SourceFile) -> bool:
        """Whether the file, found again on the same machine, has the content that it had."""
        if (self.size, self.version) != (now.size, now.version):
            return False
        # a link to a file, or one less, changes its inode, and not its content
        is_linked = self.links != now.links and self.trace[:1] == now.trace[:1]
        return not self.trace or not now.trace or self.trace == now.trace or is_linked


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """A dense tensor among the sparse files."""

    name: str
    dtype: int
    """Index into ``formats.dtypes.DTYPES``."""
    shape: tuple[int, ...]
    file: int
    offset: int
    """Absolute position in the file, in bytes."""
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """The parts of all tables, as columns; a part is the rows that one rank of the trainer held of one table.

    Ordered by table, then slice, then key, so that the order depends on the content alone. All int64, length P.
    """

    table: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    size: np.ndarray
    """The slice: ids with ``begin <= uint64(id) mod size < end``."""
    rows: np.ndarray
    first_row: np.ndarray | None = None
    """The number that the part's first row has in its table, where rows go by number; None where no table's do."""
    layer: np.ndarray | None = None
    """Of a delta package with its base: which of both has the part. An id may be in a part of each. None in any other source."""

    def __len__(self) -> int:
        return len(self.table)

    def first_row_of(self, part: int) -> int:
        """Return the number of a part's first row, for a table whose rows go by number."""
        return 0 if self.first_row is None else int(self.first_row[part])

    def layers_of(self, parts: np.ndarray) -> np.ndarray:
        """Return the layer of each part (int64). Among parts of one layer and one table, an id is to be there once."""
        return np.zeros(len(parts), np.int64) if self.layer is None else self.layer[parts]

    def slice_of(self, part: int) -> Slice:
        """Return the slice that a part claims."""
        return Slice(int(self.begin[part]), int(self.end[part]), int(self.size[part]))

    def of_table(self, table: int) -> range:
        """Return the parts of one table; they are consecutive."""
        first, last = np.searchsorted(self.table, [table, table + 1])
        return range(int(first), int(last))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Where the payload of each (part, slot) lies, as matrices of shape (P, S).

    ``file`` is int32: ``ABSENT`` where there is none (or the slot is the ids of a table that stores none), ``IN_STRIPS``
    where the rows are put together from ``Strips``. ``offset`` is int64 and an absolute position in bytes, ``key`` object:
    the block's name in its file, for messages.
    """

    file: np.ndarray
    offset: np.ndarray
    key: np.ndarray


ABSENT = -1
IN_STRIPS = -2
FIRST_MADE = -3
"""This and all below stand for columns of ids that are made: ``Checkpoint.made``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Strips:
    """Pieces of rows that do not lie row behind row: column shards, transposed and padded tensors.

    Parallel int64 columns, ordered by (part, column, first_byte). A strip gives bytes ``first_byte`` to ``first_byte +
    width`` of each row of one (part, slot); those of row r of the part lie at ``offset + r * row_stride`` in ``file``. The
    strips of a (part, slot) cover its rows once.
    """

    part: np.ndarray
    column: np.ndarray
    first_byte: np.ndarray
    width: np.ndarray
    row_stride: np.ndarray
    file: np.ndarray
    offset: np.ndarray

    def of(self, part: int, column: int) -> range:
        """Return the places of the strips of one part and slot."""
        first, last = np.searchsorted(self.part, [part, part + 1])
        begin, end = np.searchsorted(self.column[first:last], [column, column + 1])
        return range(int(first + begin), int(first + end))


def no_strips() -> Strips:
    """Return what most checkpoints have: every block lies row behind row."""
    none = np.zeros(0, np.int64)
    return Strips(part=none, column=none, first_byte=none, width=none, row_stride=none, file=none, offset=none)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotMeta:
    """One slot of one table; the same in all of its parts."""

    name: str
    dtype: int
    """Index into ``layout.dtypes.DTYPES``."""
    inner_shape: tuple[int, ...]
    """The shape of one row: () for ids, (dim,) for an embedding."""
    row_bytes: int
    column: int
    """Of ``Blocks``."""
    is_optimizer: bool = False
    """Whether the source says that this is optimizer state; in RecIS's files the names alone tell."""
    stored_shape: tuple[int, ...] | None = None
    """The whole shape of what does not go with the rows of its table, so that it cannot be kept; None for all else."""

    def num_bytes(self, rows: int) -> int:
        """Return the size in bytes of the slot in a table of so many rows."""
        if self.stored_shape is None:
            return rows * self.row_bytes
        return math.prod(self.stored_shape) * DTYPES[self.dtype].itemsize

    encoding: str = ""
    """How a row is packed where it is not plain values, as ``layout.encodings`` names it: of slots as written and of packages."""
    earlier_casts: tuple[CastEntry, ...] = ()
    """Of a package: the casts that its rows have gone through, oldest first."""
    is_ignored: bool = False
    """Of a package: whether some rows have older values, as :attr:`~dist_export.manifest.SlotEntry.is_ignored` says."""

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Of the values of one row, which an encoding packs into more bytes."""
        return (self.row_bytes - TAIL_BYTES,) if self.encoding else self.inner_shape


class RawIdSource(Protocol):
    """What a managed-collision module of the source knows."""

    empty: int
    """What stands in the place of a raw id where there is none."""
    names: tuple[str, ...]
    """The tensors that raw ids are read from, by their names in the model. All others of their module are for training."""

    def load(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return raw ids (int64, (rows,)) and the row of each (int64, (rows,)); None where entry i is of row i."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMeta:
    """One embedding table: its slots, ``id`` first and ``embedding`` second, then in the order of the files."""

    name: str
    slots: tuple[SlotMeta, ...]
    """``slots[i].column == i``. The ``id`` slot is there also where no ids are stored."""
    is_hashed: bool = True
    """Whether readers of the package find rows by id; else by number, and the package has no ids of this table."""
    has_ids: bool = True
    """Whether the source stores ids; else the id of a row is its number, and its slice one of rows: ``size`` is their number.
    With ``is_hashed`` the numbers are written as ids, and slices are those of hash tables."""
    empty_id: int | None = None
    """What stands in the place of an id where a row has none; such rows stay behind. None where every row has one."""
    raw_ids: RawIdSource | None = None
    """Of a table whose rows go by number in the model, and by raw id here: which raw id has which row in the source."""
    source_name: str | None = None
    """The name in the source, where the package gives the table another one."""
    default_row: tuple[float, ...] | str | None = None
    """What serving takes for an id that it does not find, for the package to say; ``zeros``, or the values of a row."""
    width_confirmed_by: tuple[str, ...] | None = None
    """What agrees with the width of the rows, of a source that does not state it; None where the source states it."""
    contradiction: str = ""
    """Of such a table: why its rows cannot be what they seem, so that it cannot be exported; empty where nothing tells."""
    width_missing: str = ""
    """Of such a table: what would tell its width and is not there, for people; empty where nothing is known to be missing."""

    def stored_slots(self) -> tuple[SlotMeta, ...]:
        """Return the slots that the source stores: numbers that are written as ids are in none of its tensors.

        Raw ids are in tensors of a module, which the account knows under the names of these.
        """
        return self.slots if self.has_ids and self.raw_ids is None else self.slots[1:]

    @property
    def name_in_source(self) -> str:
        """The name that the trainer knows the table by; settings name tables so."""
        return self.name if self.source_name is None else self.source_name


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutTable:
    """A table of the source that the settings leave out."""

    name: str
    rows: int
    reason: str
    """The setting."""
    tensors: int = 0
    """Its slots, as far as they are stored."""
    num_bytes: int = 0


class MadeColumn(Protocol):
    """A column of ids that lies in no file as it is needed, but is made of what files hold. Compared by identity."""

    def __hash__(self) -> int:
        """Tell it from others."""

    @property
    def name(self) -> str:
        """What it is made of, for messages."""

    def moved(self, num_files: int, /) -> MadeColumn:
        """Return the same of a checkpoint in which so many files go before those that it counts in."""

    def load(self, open_file: Callable[[int], RangeReader], /) -> np.ndarray:
        """Return all its ids (int64); ``open_file`` gives the file of a number. CheckpointError for what cannot be."""


class Memory(Protocol):
    """Payload that lies in the memory of the ranks: the "files" are tensors, and a rank reads those that it holds."""

    rank: int
    """This rank."""
    world_size: int
    """The ranks that hold the tensors; the same that export."""
    owner: np.ndarray
    """int64, by file: the rank that moves its rows; the same on all ranks."""

    def holds(self, number: int) -> bool:
        """Whether this rank can read a file, be it that it owns it or that it has a replica."""

    def open(self, number: int) -> RangeReader:
        """Return a reader of a file that this rank holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that a source says of itself, from headers and indexes alone. Nothing later knows the format."""

    format: str
    directory: Directory
    files: tuple[SourceFile, ...]
    tables: tuple[TableMeta, ...]
    parts: Parts
    blocks: Blocks
    dense: tuple[DenseTensor, ...]
    fingerprint: str
    """Of the files' names, sizes, versions and headers, and of the indexes."""
    copy_hindrances: tuple[str, ...]
    """Why a copy byte for byte would not be a sound package, each a sentence; empty where it would."""
    verbatim: Mapping[str, bytes]
    """Small files that go over unchanged when the payload files do."""
    warnings: tuple[str, ...]
    strips: Strips = field(default_factory=no_strips)
    optimizer_patterns: frozenset[str] = frozenset()
    """Patterns of ``optimizer_slots`` that the reader has found tensors for, under the names that they have in the source."""
    left_out: tuple[LeftOutTable, ...] = ()
    """Tables of the source that are not in ``tables``, in its order."""
    made: tuple[MadeColumn, ...] = ()
    """Columns of ids that are made when they are read; ``blocks.file`` is ``FIRST_MADE - i`` for the i-th."""
    memory: Memory | None = None
    """Where the payload is no file; None for all that was saved."""
    disk_state: str = ""
    """What the first rank's disk says of the files besides, as :meth:`digest_traces` has it. By it a rerun knows whether these
    are still the files that an unfinished export has read."""
    dump: TrainerDump | None = None
    """Where the rows come from, of a source that holds only those that were looked up since a base; None for all others."""
    payload: Payload | None = None
    """All tensors of the source, tables that are left out too; None where nobody accounts for them."""

    def digest_traces(self) -> str:
        """Return a digest of what the disk keeps of the files besides size and version; empty where it keeps nothing."""
        if not any(file.trace for file in self.files):
            return ""
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode([(file.name, file.trace) for file in self.files]))

    @property
    def num_bytes(self) -> int:
        """The size of all payload files."""
        return sum(file.size for file in self.files)

    @property
    def is_of_recis(self) -> bool:
        """Whether RecIS holds these tables, on disk or in memory; what is to be told of it concerns nobody else."""
        is_live = self.memory is not None and self.dump is None and any(table.has_ids for table in self.tables)
        return self.format == "recis" or is_live

    @property
    def has_state_tables(self) -> bool:
        """Whether tables of a RecIS checkpoint lie in ``model.pt``; then ``payload`` holds all of that file."""
        return self.format == "recis" and any(file.name == DENSE_STATE for file in self.files)

    def raw_id_tensors(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the tensors that raw ids of tables are read from, and the paths of the modules that have them."""
        names = frozenset(name for table in self.tables if table.raw_ids is not None for name in table.raw_ids.names)
        return names, frozenset(name.rpartition(".")[0] for name in names)


class CheckpointReader(Protocol[Share]):
    """One format. Every rank opens its own, so no method issues a collective.

    Order of calls: ``read_headers`` for a share of ``files`` on each rank, then ``assemble`` with the shares of all
    ranks, in rank order, on every rank. A ``Share`` travels between ranks, so it should be a few columns.
    """

    files: tuple[SourceFile, ...]

    def read_headers(self, files: range) -> Share:
        """Read the headers of the files with these numbers. CheckpointError where one is truncated or untrue."""

    def assemble(self, shares: Sequence[Share]) -> Checkpoint:
        """Build the metadata from the headers of all ``files``, in their order. CheckpointError on contradictions."""
