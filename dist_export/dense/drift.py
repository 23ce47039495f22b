"""How far scores of the package are from those of the unmodified model: by how much, and how many pairs change their order.

Pure: tensors in, figures out. A cast, a pruned row or a default row changes scores, and nobody's parity shows it, since both
sides of that comparison have the change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from dist_export.amounts import few
from dist_export.errors import DriftError
from dist_export.manifest import DriftOutputEntry


class OutputDrift:
    """The figures of one output, over batches."""

    def __init__(self) -> None:
        self._max_abs = 0.0
        self._sums: list[float] = []
        self._num_values = 0
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
        self._num_not_finite += int((~finite).sum())
        apart = torch.where(finite, apart, torch.zeros_like(apart))
        if apart.numel():
            self._max_abs = max(self._max_abs, float(apart.max()))
            self._sums.append(float(apart.sum()))
        if one.is_complex() or not one.dim() or not one.numel():
            return
        columns = [tensor.reshape(tensor.shape[0], -1).numpy() for tensor in (one, other)]
        for place in range(columns[0].shape[1]):
            pairs, swapped = count_pairs(columns[0][:, place], columns[1][:, place])
            self._pairs += pairs
            self._swapped += swapped

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


def count_pairs(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """Return how many pairs of places differ on both sides, and of how many of these the order is another one.

    Args:
        one: float64, (n,); NaN has no order.
        other: float64, (n,).

    O(n log n): sorted by the first side, a pair is swapped where the second side has an inversion (W. R. Knight, 1966).
    """
    has_order = ~(np.isnan(one) | np.isnan(other))
    one, other = one[has_order], other[has_order]
    ranks = [np.unique(side, return_inverse=True)[1].reshape(-1) for side in (one, other)]
    order = np.lexsort((ranks[1], ranks[0]))
    num = len(one)
    if num < 2:
        return 0, 0
    both = np.unique(ranks[0].astype(np.int64) * num + ranks[1], return_inverse=True)[1]
    pairs = math.comb(num, 2) - _count_ties(ranks[0]) - _count_ties(ranks[1]) + _count_ties(both)
    return pairs, count_inversions(ranks[1][order])


def count_inversions(ranks: np.ndarray) -> int:
    """Return how many pairs of places have the larger number in front. Numbers from 0 up, below the count of places.

    Goes through the bits from the highest: two numbers are told apart at the first bit in which they differ, and until then
    they lie in one group. O(n) a bit.
    """
    values = ranks.astype(np.int64)
    found = 0
    for bit in reversed(range(max(1, int(values.max(initial=0)).bit_length()))):
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


def refuse_drift(outputs: Mapping[str, DriftOutputEntry], max_drift: float | Mapping[str, float] | None) -> None:
    """Raise DriftError where an output drifts by more than ``max_drift`` allows, one number for all or one by output."""
    if max_drift is None:
        return
    told = []
    for name, entry in outputs.items():
        limit = max_drift.get(name) if isinstance(max_drift, Mapping) else max_drift
        if limit is None:
            continue
        if entry.not_finite:
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


def _count_ties(ranks: np.ndarray) -> int:
    """Return how many pairs of places have the same number."""
    counts = np.bincount(ranks.reshape(-1)).astype(object)
    return int(sum(n * (n - 1) // 2 for n in counts if n > 1))
