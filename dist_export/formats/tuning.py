"""Into which pieces an export and ``verify`` cut their work: numbers that are passed along.

No user sets them. Code that works in pieces takes a ``Tuning``, or the one number that it needs; the default is ``STANDARD``.
Tests pass small numbers, so that small files meet every edge.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The sizes of pieces. All ranks have the same. No result depends on them, except on ``chunk_bytes`` and ``cast_values``."""

    run_rows: int = 1 << 16
    """Ids in a run, which has less than twice as many: data computed from 1 MiB of ids stays in a core's cache."""

    granule_rows: int = 1 << 20
    """Rows in a granule. Rows are counted by granule, so that several ranks can gather from one part."""

    held_ids: int | None = None
    """The most ids that a thread holds. None: as many as its memory has room for."""

    chunk_bytes: int = 64 << 20
    """A file's digest is made of the digests of its chunks. With other chunks than these it has another digest."""

    unit_bytes: int = 256 << 20
    """The most bytes that one unit moves: small enough to balance the ranks, large enough that claiming a unit costs little."""

    copy_bytes: int = 1 << 20
    """Bytes of one read, hash and write. They fit in a core's own cache, which makes them twice as fast as larger ones."""

    gather_bytes: int = 1 << 20
    """Bytes of rows that a gather reads at once, at least. For few targets they fit in a cache."""

    write_bytes: int = 128 << 10
    """The least that one write of a gather should carry. With fewer bytes, the call costs more than the bytes."""

    cast_values: int = 1 << 15
    """Values in a block of rows that is cast at once, about. Intermediate results take at most 3 MB. They stay in a core's cache
    and fit in the half of a thread's share that a gather leaves free. The sums of errors are rounded block by block."""

    rule_bytes: int = 256 << 10
    """Bytes of a slot that a rule of ``prune`` reads at once. As 64-bit numbers they take several times as much, and must fit a
    core's cache."""

    fingerprint_bytes: int = 1 << 20
    """Bytes of rows that are read at once for their fingerprints, and stay in a core's cache."""

    fingerprint_rows: int = 1 << 17
    """Rows that are read at once for their fingerprints: narrow rows have more bytes of fingerprints than of slots."""

    base_rows: int = 1 << 20
    """Ids of a base that are read at once, to list those that are deleted."""

    compared_bytes: int = 2 << 20
    """Bytes of a slot that are read at once to compare rows with those of a base."""

    json_bytes: int = 4 << 20
    """A long object of JSON is decoded in pieces of about this size, so that memory never holds a complete second copy of it."""

    verified_ids: int = 1 << 22
    """``verify``: ids in a piece. Columns that do not fit in memory are counted in pieces."""

    verified_fingerprints: int = 1 << 20
    """``verify``: fingerprints in a piece."""

    compared_ids: int = 1 << 20
    """``verify``: ids of a delta in a piece, which is looked up in the base."""

    value_bytes: int = 16 << 20
    """``verify``: bytes of floats in a piece that one thread searches for values that are not finite."""

    scan_bytes: int = 1 << 18
    """``verify``: bytes of floats that are searched at once. Intermediate results for so many stay in a core's cache. A multiple
    of every item size."""


STANDARD = Tuning()
