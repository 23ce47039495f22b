"""Define the slices of the output shards, and find the slice that owns a row. Pure.

A row belongs to the slice with ``begin <= uint64(id) mod size < end`` (RecIS's rule). In a row-indexed table, ``size`` is
the number of rows, and a slice is a range of rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.errors import PlanError
from dist_export.formats.recis import Slice, hash_slots, is_place_in, split_evenly
from dist_export.kernels.selection import select_kernels

_MAX_LOOKUP = 1 << 20
"""Up to this size (RecIS uses 65536), owners are looked up in an array, which is faster than a binary search."""


@dataclass(frozen=True, slots=True, eq=False)
class Targets:
    """The target slices of one table, ordered; shard k of the table holds ``slices[k]``. Equal slices share one object."""

    slices: tuple[Slice, ...]
    breaks: np.ndarray
    """int64, sorted: the places (``id mod size``) at which the owner may change. The first is 0."""
    owners: np.ndarray
    """The target that owns the places from ``breaks[i]`` on: uint8, uint16 or int32, the smallest that fits."""
    lookup: np.ndarray | None
    """The owner of each place, of length ``size``; None if ``size`` is too large."""
    number_of: Mapping[Slice, int]
    has_overlap: bool
    """Whether a place may be in several slices. This is possible with ``source``."""

    @property
    def size(self) -> int:
        """The size of the slice space."""
        return self.slices[0].size

    def owners_of(self, positions: np.ndarray, *, own: int | None) -> np.ndarray:
        """Return the target of each place (uint64, below ``size``): a new array of the dtype of ``owners``.

        Args:
            places: uint64, ``id mod size``.
            own: the target with the slice of the rows' part, if any. If slices overlap, it owns all places in its slice.
        """
        index = positions.view(np.int64)
        if self.lookup is not None:
            found: np.ndarray = self.lookup.take(index)
        else:
            found = self.owners.take(np.searchsorted(self.breaks, index, side="right") - 1)
        if own is not None and self.has_overlap:
            found[is_place_in(positions, self.slices[own])] = own
        return found

    def count_owners(self, ids: np.ndarray, *, own: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the target of each id as :meth:`owners_of` does, and how many ids each target gets (int64)."""
        if not self.has_overlap:
            return select_kernels().find_owners(
                ids,
                size=self.size,
                breaks=self.breaks,
                owners=self.owners,
                lookup=self.lookup,
                num_targets=len(self.slices),
            )
        found = self.owners_of(hash_slots(ids, self.size), own=own)
        return found, np.bincount(found, minlength=len(self.slices))

    def single_owner(self, lowest: int, highest: int, *, own: int | None) -> int | None:
        """Return the target that owns all places from lowest to highest; None if there are several, or possibly several."""
        if own is not None and self.slices[own].begin <= lowest and highest < self.slices[own].end:
            return own
        if own is not None and self.has_overlap:
            return None
        first, last = np.searchsorted(self.breaks, [lowest, highest], side="right") - 1
        return int(self.owners[first]) if first == last else None

    def index_of(self, part: Slice) -> int | None:
        """Return the target with exactly this slice, if there is one."""
        return self.number_of.get(part)


def resolve_num_shards(checkpoint: Checkpoint, num_shards: int | str, *, world_size: int) -> int | None:
    """Return the number of output shards; None for ``source``.

    Raises:
        PlanError: there are more shards than places in the slice space of a table.
    """
    if num_shards == "source":
        return None
    count = world_size if num_shards == "world_size" else int(num_shards)
    for number, table in enumerate(checkpoint.tables):
        parts = checkpoint.parts.of_table(number)
        if table.is_hashed and len(parts) and count > checkpoint.parts.size[parts[0]]:
            raise PlanError(
                f"num_shards is {count:,}, but the ids of table {table.name!r} fall into "
                f"{checkpoint.parts.size[parts[0]]:,} slices; give a number up to that"
            )
    return count


def plan_targets(checkpoint: Checkpoint, num_shards: int | None) -> tuple[Targets, ...]:
    """Return the targets of each table: ``num_shards`` even slices, or for None the slices of the source.

    The source's slices may have gaps, because a rank without rows may not write its part. Each gap becomes a separate
    slice, so that every possible id has an owner.
    """
    planned = []
    known: dict[tuple[Slice, ...], Targets] = {}
    for number in range(len(checkpoint.tables)):
        parts = checkpoint.parts.of_table(number)
        size = int(checkpoint.parts.size[parts[0]])
        if num_shards is None:
            slices = _fill_gaps(sorted({checkpoint.parts.slice_of(part) for part in parts}), size)
        else:
            boundaries = split_evenly(size, num_shards).tolist()
            slices = [Slice(begin, end, size) for begin, end in itertools.pairwise(boundaries)]
        key = tuple(slices)
        if key not in known:
            known[key] = _build(key)
        planned.append(known[key])
    return tuple(planned)


def _fill_gaps(slices: list[Slice], size: int) -> list[Slice]:
    filled, covered = [], 0
    for part in slices:
        if part.begin > covered:
            filled.append(Slice(covered, part.begin, size))
        filled.append(part)
        covered = max(covered, part.end)
    if covered < size:
        filled.append(Slice(covered, size, size))
    return filled


def _build(slices: tuple[Slice, ...]) -> Targets:
    size = slices[0].size
    breaks = np.unique(np.array([0, *(s.begin for s in slices), *(s.end for s in slices)], np.int64))
    breaks = breaks[breaks < size]
    # the smallest dtype, because sorting rows by owner then takes only one or two passes
    dtype = np.uint8 if len(slices) <= 1 << 8 else np.uint16 if len(slices) <= 1 << 16 else np.int32
    owners = np.zeros(len(breaks), dtype)
    for target in reversed(range(len(slices))):  # if slices overlap, the first one owns
        first, last = np.searchsorted(breaks, [slices[target].begin, slices[target].end])
        owners[first:last] = target
    lookup = None
    if size <= _MAX_LOOKUP:
        lookup = np.repeat(owners, np.diff(np.append(breaks, size)))
    return Targets(
        slices=slices,
        breaks=breaks,
        owners=owners,
        lookup=lookup,
        number_of={part: number for number, part in enumerate(slices)},
        has_overlap=any(later.begin < earlier.end for earlier, later in itertools.pairwise(slices)),
    )
