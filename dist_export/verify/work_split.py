"""What the ranks and threads of a verification read, shared out by bytes. Pure: columns in, columns out."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from dist_export.errors import UserError

MIN_THREAD_BYTES = 8 << 20
DEFAULT_MEMORY = 512 << 20


def _no_numbers() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Work:
    """All that is to be read, the same on every rank. Each group of columns is parallel."""

    digest_files: tuple[tuple[str, int, str], ...] = ()
    """Path, bytes and digest of the files whose digest is to be compared."""
    digest_parts: dict[int, tuple[tuple[int, bytes], ...]] = field(default_factory=dict)
    """Bytes and SHA-256 of each part of those of them that were put together within an S3 store, by place above."""
    shards: tuple[str, ...] = ()
    id_file: np.ndarray = field(default_factory=_no_numbers)
    id_offset: np.ndarray = field(default_factory=_no_numbers)
    id_rows: np.ndarray = field(default_factory=_no_numbers)
    id_table: np.ndarray = field(default_factory=_no_numbers)
    """int64: where each column of ids lies, and whose it is."""
    id_slice: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))
    """int64 (n, 3): begin, end and size."""
    is_disjoint: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    """bool by table: no id can be in two of its parts, where each lies in the slice of its own."""
    value_file: np.ndarray = field(default_factory=_no_numbers)
    value_offset: np.ndarray = field(default_factory=_no_numbers)
    value_bytes: np.ndarray = field(default_factory=_no_numbers)
    value_dtype: np.ndarray = field(default_factory=_no_numbers)
    """int64: where the floats are that should be finite, and their dtype as a place in ``DTYPES``."""
    value_width: np.ndarray = field(default_factory=_no_numbers)
    """int64: the bytes of a row of ``int8_rowwise``, of which scale and bias should be finite; 0 for plain floats."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much a rank may hold at once."""

    max_memory: int
    """Bytes, for all threads of a rank together."""
    threads: int

    def __post_init__(self) -> None:
        """Refuse more threads than the memory has room for."""
        if self.threads < 1:
            raise UserError(f"threads is {self.threads}; give a number from 1 up")
        if self.max_memory // self.threads < MIN_THREAD_BYTES:
            raise UserError(
                f"max_memory leaves {self.max_memory // self.threads:,} bytes to each of {self.threads} threads, which need "
                f"{MIN_THREAD_BYTES >> 20} MiB; raise max_memory or lower threads"
            )

    @property
    def held_ids(self) -> int:
        """Ids (8 bytes each) that a thread holds at once; what it computes from them takes as much again at most."""
        return self.max_memory // self.threads // 2 // 8


def share_out(costs: np.ndarray, num_shares: int) -> list[slice]:
    """Return ``num_shares`` runs of the items, in order, whose costs (int64, from 0 up) are as equal as can be."""
    costs = costs + 1  # an empty item costs something too
    middles = np.cumsum(costs) - costs / 2
    share = np.minimum(middles * num_shares / max(int(costs.sum()), 1), num_shares - 1).astype(np.int64)
    edges = np.searchsorted(share, np.arange(num_shares + 1)).tolist()
    return [slice(first, last) for first, last in itertools.pairwise(edges)]


def cut(sizes: np.ndarray, piece: int, *, most_whole: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cut items of these sizes (int64) into pieces; return for each the item, where it begins and its size.

    Items of up to ``most_whole`` stay whole, those without size too.
    """
    count = np.where(sizes <= most_whole, 1, np.maximum(-(-sizes // piece), 1))
    item = np.repeat(np.arange(len(sizes)), count)
    number = np.arange(len(item)) - np.repeat(np.cumsum(count) - count, count)
    first = number * piece
    is_last = number == count[item] - 1
    return item, first, np.where(is_last, sizes[item] - first, piece)
