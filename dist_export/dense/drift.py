"""How far scores of the package are from those of the unmodified model: by how much, and how many pairs change their order.

Pure: tensors in, figures out. A cast, a pruned row or a default row changes scores, and nobody's parity shows it, since both
sides of that comparison have the change.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np
import torch

from dist_export.errors import DriftError
from dist_export.humanize import few
from dist_export.manifest import DriftOutputEntry


class OutputDrift:
    """The figures of one output, over batches."""

    def __init__(self) -> None:
        self._max_abs = 0.0
        self._sums: list[float] = []
        self._num_values = 0
        self._num_compared = 0
        self._num_not_finite = 0
        self._pairs = 0
        self._swapped = 0

    def add(self, unmodified: torch.Tensor, package: torch.Tensor) -> None:
        """Take in one batch.

        Args:
            unmodified: what the unmodified model gave; (rows, ...) of any dtype.
            package: what the package gave, of the same shape.

        Pairs are those of two rows within a column, which is one element of the dimensions behind the first. Left out are
        pairs that are equal on either side, and those with a NaN; complex values have no order.
        """
        one, other = unmodified.detach().cpu(), package.detach().cpu()
        wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
        one, other = one.to(wide), other.to(wide)
        apart = torch.where(_is_same(one, other), torch.zeros((), dtype=torch.float64), (one - other).abs())
        finite = apart.isfinite()
        self._num_values += apart.numel()
        self._num_compared += int((one.isfinite() & other.isfinite()).sum())
        self._num_not_finite += int((~finite).sum())
        apart = torch.where(finite, apart, torch.zeros_like(apart))
        if apart.numel():
            self._max_abs = max(self._max_abs, float(apart.max()))
            self._sums.append(float(apart.sum()))
        if one.is_complex() or not one.dim() or not one.numel():
            return
        pairs, swapped = count_pairs(*(tensor.reshape(tensor.shape[0], -1).numpy() for tensor in (one, other)))
        self._pairs += pairs
        self._swapped += swapped

    @property
    def is_blank(self) -> bool:
        """Whether there were scores, and none of them was finite in both the package and the model."""
        return bool(self._num_values) and not self._num_compared

    def entry(self) -> DriftOutputEntry:
        """Return the figures as the manifest has them."""
        num = self._num_values - self._num_not_finite
        return DriftOutputEntry(
            max_abs=self._max_abs,
            mean_abs=math.fsum(self._sums) / num if num else 0.0,
            pairs=self._pairs,
            pairs_swapped=self._swapped,
            not_finite=self._num_not_finite,
        )


_VALUES = 1 << 15
"""That are counted at once: what numpy makes of them stays in a core's cache."""


def count_pairs(one: np.ndarray, other: np.ndarray, *, most_values: int = _VALUES) -> tuple[int, int]:
    """Return how many pairs of rows within a column differ on both sides, and of how many of these the order is another one.

    Args:
        one: float64, (rows, columns) or (rows,); NaN has no order.
        other: the same of the other side.
        most_values: how many are counted at once.

    O(n log n) a column: sorted by the first side, a pair is swapped where the second side has an inversion (W. R. Knight, 1966).
    Many columns go in one call of numpy.
    """
    if not one.size:
        return 0, 0
    sides = [side.reshape(len(side), -1).T for side in (one, other)]
    num_columns, num_rows = sides[0].shape
    step = max(1, most_values // max(1, num_rows))
    pairs, swapped = 0, 0
    for first in range(0, num_columns, step):
        found = _count_columns(*(side[first : first + step] for side in sides))
        pairs, swapped = pairs + found[0], swapped + found[1]
    return pairs, swapped


def _count_columns(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Return the figures of several columns together: (columns, rows)."""
    has_order = ~(np.isnan(one) | np.isnan(other))
    column = np.nonzero(has_order)[0]
    sizes = np.bincount(column)
    ranks = [_rank_within(column, sizes, side[has_order]) for side in (one, other)]
    # no pair of two columns is swapped: the column is the higher part of what is sorted
    bits = int(one.shape[1]).bit_length()
    keys = [(column << bits) | rank for rank in ranks]
    order = np.lexsort((keys[1], keys[0]))
    both = (keys[0] << bits) | ranks[1]
    pairs = _count_same(sizes) - sum(_count_ties(key) for key in keys) + _count_ties(both)
    return pairs, count_inversions(keys[1][order], bits)


def _rank_within(column: np.ndarray, sizes: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return each value's rank within its column (int64, from 0 up, without gaps); equal values have one rank.

    ``column`` (int64, (n,)) rises, and ``sizes`` says how often each column is there.
    """
    if not len(values):
        return np.zeros(0, np.int64)
    order = np.lexsort((values, column))
    ordered = values[order]
    is_further = np.concatenate([[False], ordered[1:] != ordered[:-1]])
    starts = (np.cumsum(sizes) - sizes)[sizes > 0]
    is_further[starts] = False
    rank = np.cumsum(is_further)
    ranks = np.empty(len(values), np.int64)
    ranks[order] = rank - np.repeat(rank[starts], sizes[sizes > 0])
    return ranks


def count_inversions(keys: np.ndarray, bits: int) -> int:
    """Return how many pairs of places have the larger number in front.

    Args:
        keys: numbers from 0 up (int64, (n,)). Above their lowest ``bits`` bits they rise, so that these tell no inversion.
        bits: how many bits are looked at.

    Goes through these bits from the highest: two numbers are told apart at the first bit in which they differ, and until then
    they lie in one group. O(n) a bit.
    """
    values = keys.astype(np.int64)
    found = 0
    for bit in reversed(range(bits if len(values) else 0)):
        ones = (values >> bit) & 1
        ones_before = np.cumsum(ones) - ones
        groups = values >> (bit + 1)
        starts = np.flatnonzero(np.diff(groups, prepend=-1))
        sizes = np.diff(starts, append=len(values))
        first = np.repeat(starts, sizes)
        ones_in_front = ones_before - np.repeat(ones_before[starts], sizes)
        found += int(ones_in_front[ones == 0].sum())
        zeros = np.repeat(np.add.reduceat(1 - ones, starts), sizes)
        place = np.where(ones == 1, first + zeros + ones_in_front, np.arange(len(values)) - ones_in_front)
        moved = np.empty_like(values)
        moved[place] = values
        values = moved
    return found


def refuse_drift(
    outputs: Mapping[str, DriftOutputEntry],
    max_drift: float | Mapping[str, float] | None,
    blank: Collection[str] = (),
) -> None:
    """Raise DriftError where an output drifts by more than ``max_drift`` allows, one number for all or one by output.

    Of the outputs in ``blank`` no score is finite, so that there is nothing to bound.
    """
    if max_drift is None:
        return
    told = []
    for name, entry in outputs.items():
        limit = max_drift.get(name) if isinstance(max_drift, Mapping) else max_drift
        if limit is None:
            continue
        if name in blank:
            told.append(f"{name!r} has no finite score in any batch, so its drift cannot be bounded")
        elif entry.not_finite:
            told.append(f"{name!r} is not finite on one side alone in {entry.not_finite:,} scores")
        elif entry.max_abs > limit:
            told.append(f"{name!r} by up to {entry.max_abs:.3g} (allowed {limit:g})")
    if told:
        raise DriftError(
            f"max_drift: scores of the package differ from the unmodified model's: {few(told)}. No manifest was written, so "
            "there is no package. Cast or prune less, or raise max_drift"
        )


def _is_same(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one == other) | (one.isnan() & other.isnan())


def _count_ties(keys: np.ndarray) -> int:
    """Return how many pairs of places have the same number."""
    return _count_same(np.unique(keys, return_counts=True)[1])


def _count_same(counts: np.ndarray) -> int:
    """Return how many pairs there are within groups of so many."""
    return int(sum(n * (n - 1) // 2 for n in counts[counts > 1].astype(object)))
