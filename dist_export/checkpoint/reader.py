"""What an export asks of a source checkpoint, and the metadata that every format answers with. No outputs, no plans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from dist_export.layout.recis import Slice
from dist_export.storage import Directory

Share = TypeVar("Share")
"""What a reader makes of the headers of some files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One payload file of the checkpoint."""

    name: str
    size: int
    """In bytes."""
    version: str
    """Changes when the content does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTensor:
    """A dense tensor among the sparse files."""

    name: str
    dtype: int
    """Index into ``layout.dtypes.DTYPES``."""
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

    def __len__(self) -> int:
        return len(self.table)

    def slice_of(self, part: int) -> Slice:
        """Return the slice that a part claims."""
        return Slice(int(self.begin[part]), int(self.end[part]), int(self.size[part]))

    def of_table(self, table: int) -> range:
        """Return the parts of one table; they are consecutive."""
        first, last = np.searchsorted(self.table, [table, table + 1])
        return range(int(first), int(last))


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """Where the payload of each (part, slot) lies, as matrices of shape (P, S); -1 in ``file`` where there is none.

    ``file`` is int32, ``offset`` int64 and an absolute position in bytes, ``key`` object: the block's name in its file.
    """

    file: np.ndarray
    offset: np.ndarray
    key: np.ndarray


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TableMeta:
    """One embedding table: its slots, ``id`` first and ``embedding`` second, then in the order of the files."""

    name: str
    slots: tuple[SlotMeta, ...]


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

    @property
    def num_bytes(self) -> int:
        """The size of all payload files."""
        return sum(file.size for file in self.files)

    def table_index(self, name: str) -> int | None:
        """Return the place of a table, None where there is no such table."""
        return next((i for i, table in enumerate(self.tables) if table.name == name), None)


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
