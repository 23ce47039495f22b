"""The rows that are moved row by row, as columns: a fleet's plan has hundreds of thousands of gathers. Pure."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


class Gather(NamedTuple):
    """Rows ``first_row`` to ``first_row + num_rows`` of a part that are moved row by row.

    They go to several targets, or some rows are dropped or pruned, or some slots are not stored as they are written.

    ``targets``, ``counts`` and ``first_target_rows`` (int64) are parallel: how many rows each target gets, and the row
    of the target's block where they begin. The other rows are in ``SparsePlan.dropped`` or pruned by
    ``SparsePlan.pruning``.
    """

    part: int
    first_row: int
    num_rows: int
    targets: np.ndarray
    counts: np.ndarray
    first_target_rows: np.ndarray
    columns: tuple[int, ...]
    """The slots that are gathered, as in ``SlotMeta.column``. The other slots of these rows are copied as byte ranges."""

    @property
    def num_kept(self) -> int:
        """The number of rows that are moved."""
        return int(self.counts.sum())


@dataclass(frozen=True, eq=False, kw_only=True)
class Gathers:
    """The gathers of a plan, in the order of their tables. An index gives one as a :class:`Gather`, whose arrays are views.

    A run is the rows of one gather that go to one target. All arrays are int64.
    """

    part: np.ndarray
    first_row: np.ndarray
    num_rows: np.ndarray
    columns: tuple[tuple[int, ...], ...]
    """The different values of ``Gather.columns``."""
    columns_of: np.ndarray
    """For each gather, the index in ``columns``."""
    bounds: np.ndarray
    """The runs of gather ``n`` are ``bounds[n]`` to ``bounds[n + 1]``."""
    targets: np.ndarray
    counts: np.ndarray
    first_target_rows: np.ndarray
    """As in :class:`Gather`, by run."""

    def __len__(self) -> int:
        """Return the number of gathers."""
        return len(self.part)

    def __getitem__(self, number: int) -> Gather:
        """Return one gather. IndexError beyond the last."""
        part = int(self.part[number])
        runs = slice(int(self.bounds[number]), int(self.bounds[number + 1]))
        return Gather(
            part=part,
            first_row=int(self.first_row[number]),
            num_rows=int(self.num_rows[number]),
            targets=self.targets[runs],
            counts=self.counts[runs],
            first_target_rows=self.first_target_rows[runs],
            columns=self.columns[self.columns_of[number]],
        )

    def __iter__(self) -> Iterator[Gather]:
        """Yield the gathers in order."""
        return map(self.__getitem__, range(len(self)))

    @functools.cached_property
    def of_run(self) -> np.ndarray:
        """The gather (int64) of each run."""
        return np.repeat(np.arange(len(self)), np.diff(self.bounds))

    def sum_runs(self, values: np.ndarray) -> np.ndarray:
        """Return for each gather (int64) the sum of ``values``, int64 by run."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(values)])
        found: np.ndarray = before[self.bounds[1:]] - before[self.bounds[:-1]]
        return found


def join_gathers(pieces: Sequence[Gathers]) -> Gathers:
    """Return all gathers of the pieces, in their order."""
    columns = tuple(dict.fromkeys(chosen for piece in pieces for chosen in piece.columns))
    place = {chosen: number for number, chosen in enumerate(columns)}
    renumbered = [np.array([place[chosen] for chosen in piece.columns], np.int64)[piece.columns_of] for piece in pieces]
    lengths = [np.diff(piece.bounds) for piece in pieces]

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.zeros(0, np.int64), *arrays])

    return Gathers(
        part=join([piece.part for piece in pieces]),
        first_row=join([piece.first_row for piece in pieces]),
        num_rows=join([piece.num_rows for piece in pieces]),
        columns=columns,
        columns_of=join(renumbered),
        bounds=np.concatenate([np.zeros(1, np.int64), np.cumsum(join(lengths))]),
        targets=join([piece.targets for piece in pieces]),
        counts=join([piece.counts for piece in pieces]),
        first_target_rows=join([piece.first_target_rows for piece in pieces]),
    )
