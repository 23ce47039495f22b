"""Share the payload among the ranks and threads of a verification, by bytes. Pure: columns in, columns out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from dist_export.errors import UserError
from dist_export.formats.row_fingerprints import PartSlots
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.manifest import RowFingerprintsEntry, RowIndexEntry

MIN_THREAD_BYTES = 8 << 20
DEFAULT_MEMORY = 512 << 20


def _no_numbers() -> np.ndarray:
    return np.zeros(0, np.int64)


class IndexedPart(NamedTuple):
    """A part with a row index."""

    entry: RowIndexEntry
    key: str
    """The key of its id block."""
    file: str
    """The shard with its ids."""
    offset: int
    """The absolute position of its ids in the shard, in bytes."""
    num_rows: int


class FingerprintedPart(NamedTuple):
    """A part with row fingerprints."""

    entry: RowFingerprintsEntry
    key: str
    """The key of its first block."""
    slots: PartSlots
    """Files are those of ``Work.shards``."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Work:
    """The payload to read, the same on every rank. Each group of columns is parallel."""

    digest_files: tuple[tuple[str, int, str], ...] = ()
    """Path, bytes and digest of the files to compare. The digest may be empty."""
    digest_parts: dict[int, tuple[tuple[int, bytes], ...]] = field(default_factory=dict)
    """Index into ``digest_files`` -> bytes and SHA-256 of each part, for files that an S3 store assembled from parts."""
    shards: tuple[str, ...] = ()
    id_file: np.ndarray = field(default_factory=_no_numbers)
    id_offset: np.ndarray = field(default_factory=_no_numbers)
    id_rows: np.ndarray = field(default_factory=_no_numbers)
    id_table: np.ndarray = field(default_factory=_no_numbers)
    """int64: file, offset, rows and table of each id column."""
    id_slice: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """int64 (n, 3): begin, end and size."""
    is_disjoint: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool by table: whether the slices of its parts are disjoint, so that an id in its own slice is in one part only."""
    value_file: np.ndarray = field(default_factory=_no_numbers)
    value_offset: np.ndarray = field(default_factory=_no_numbers)
    value_bytes: np.ndarray = field(default_factory=_no_numbers)
    value_dtype: np.ndarray = field(default_factory=_no_numbers)
    """int64: file, offset, bytes, and dtype (an index into ``DTYPES``) of each block of floats that should be finite."""
    value_width: np.ndarray = field(default_factory=_no_numbers)
    """int64: the bytes of a row of ``int8_rowwise``, whose scale and bias should be finite; 0 for plain floats."""
    indexes: tuple[IndexedPart, ...] = ()
    fingerprints: tuple[FingerprintedPart, ...] = ()


@dataclass(frozen=True, slots=True)
class Bounds:
    """The memory budget of a rank."""

    max_memory: int
    """Bytes for all threads of a rank together."""
    threads: int
    tuning: Tuning = STANDARD
    """The sizes of pieces."""

    def __post_init__(self) -> None:
        """Raise UserError if there is no thread, or if a thread gets less than 8 MiB."""
        if self.threads < 1:
            raise UserError(f"threads is {self.threads}; give a number from 1 up")
        if self.max_memory // self.threads < MIN_THREAD_BYTES:
            raise UserError(
                f"max_memory leaves {self.max_memory // self.threads:,} bytes to each of {self.threads} threads, which need "
                f"{MIN_THREAD_BYTES >> 20} MiB; raise max_memory or lower threads"
            )

    @property
    def held_ids(self) -> int:
        """Ids (8 bytes each) that a thread holds at once. Its results from them take at most as much again."""
        most = self.max_memory // self.threads // 2 // 8
        return most if self.tuning.held_ids is None else min(most, self.tuning.held_ids)


def share_out(costs: np.ndarray, num_shares: int) -> list[slice]:
    """Return ``num_shares`` runs of the items, in order, with costs (int64, at least 0) that are as equal as possible."""
    costs = costs + 1  # an empty item also has a cost
    middles = np.cumsum(costs) - costs / 2
    share = np.minimum(middles * num_shares / max(int(costs.sum()), 1), num_shares - 1).astype(np.int64)
    edges = np.searchsorted(share, np.arange(num_shares + 1)).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def cut(sizes: np.ndarray, piece: int, *, most_whole: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut items of these sizes (int64) into pieces, and return the item, begin and size of each piece.

    Items of up to ``most_whole`` stay whole. An empty item is one empty piece.
    """
    count = np.where(sizes <= most_whole, 1, np.maximum(-(-sizes // piece), 1))
    item = np.repeat(np.arange(len(sizes)), count)
    number = np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
    first = number * piece
    is_last = number == count[item] - 1
    return item, first, np.where(is_last, sizes[item] - first, piece)
