"""The figures of drift: against the definition over all pairs, and by hand."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch

from dist_export.dense.drift import OutputDrift, count_inversions, count_pairs, refuse_drift
from dist_export.errors import DriftError

NAN, INF = float("nan"), float("inf")


def by_definition(one, other) -> tuple[int, int]:
    pairs = swapped = 0
    for i, j in itertools.combinations(range(len(one)), 2):
        if one[i] == one[j] or other[i] == other[j] or any(math.isnan(x) for x in (one[i], one[j], other[i], other[j])):
            continue
        pairs += 1
        swapped += (one[i] < one[j]) != (other[i] < other[j])
    return pairs, swapped


def test_pairs_are_those_of_the_definition_for_every_small_case() -> None:
    for num in range(5):
        for one in itertools.product((0.0, 1.0, 2.0), repeat=num):
            for other in itertools.product((-1.0, 0.5, 2.0), repeat=num):
                assert count_pairs(np.array(one), np.array(other)) == by_definition(one, other), (one, other)


def test_pairs_are_those_of_the_definition_for_permutations() -> None:
    for other in itertools.permutations(range(6)):
        found = count_pairs(np.arange(6.0), np.array(other, float))
        assert found == by_definition(range(6), other)


@pytest.mark.parametrize("seed", range(30))
def test_pairs_are_those_of_the_definition_for_random_ones(seed: int) -> None:
    random.seed(seed)
    values = [NAN, INF, -INF, 0.0, -0.0, 1e-300, 1.0, 1.5] if seed % 2 else [random.gauss(0, 1) for _ in range(40)]
    one, other = ([random.choice(values) for _ in range(60)] for _ in range(2))
    assert count_pairs(np.array(one), np.array(other)) == by_definition(one, other)


def test_pairs_of_many_rows_fit() -> None:
    num = 200_000
    one = np.arange(num, dtype=float)
    assert count_pairs(one, one) == (math.comb(num, 2), 0)
    assert count_pairs(one, -one) == (math.comb(num, 2), math.comb(num, 2))
    assert count_pairs(one, np.zeros(num)) == (0, 0)
    assert count_inversions(np.array([], np.int64), 3) == 0
    assert count_pairs(np.zeros((0, 3)), np.zeros((0, 3))) == count_pairs(np.zeros((3, 0)), np.zeros((3, 0))) == (0, 0)


@pytest.mark.parametrize("values", [7, 40, 1 << 15])
@pytest.mark.parametrize("seed", range(6))
def test_columns_that_are_counted_together_give_what_each_gives(seed: int, values: int) -> None:
    """Pairs of two columns are none; columns of few values, of one, of NaN alone, and of ties lie side by side."""
    random = np.random.default_rng(seed)
    one, other = (random.integers(0, 4, (9, 13)).astype(float) for _ in range(2))
    one[:, 2], other[:, 4] = NAN, NAN
    one[1:, 6], one[:, 8], one[0, :], other[5, 9] = NAN, 3.0, INF, -INF
    expected = [by_definition(one[:, c], other[:, c]) for c in range(13)]
    assert count_pairs(one, other, most_values=values) == tuple(map(sum, zip(*expected, strict=True)))


def test_a_wide_output_is_no_call_for_each_column(monkeypatch) -> None:
    calls = []

    def count(keys: np.ndarray, bits: int) -> int:
        calls.append(len(keys))
        return count_inversions(keys, bits)

    monkeypatch.setattr("dist_export.dense.drift.count_inversions", count)
    one = np.random.default_rng(1).normal(size=(5, 4096))
    assert count_pairs(one, -one) == (4096 * 10, 4096 * 10)
    assert sum(calls) == one.size
    assert len(calls) <= 2


def figures(*batches):
    drift = OutputDrift()
    for one, other in batches:
        drift.add(torch.as_tensor(one), torch.as_tensor(other))
    return drift.entry()


def test_figures_are_over_all_batches_and_columns() -> None:
    first = [[1.0, 5.0], [2.0, 4.0], [3.0, 3.0]], [[1.0, 5.0], [2.5, 4.0], [2.25, 3.0]]
    second = [[0.0, 0.0]], [[0.0, 1.0]]
    entry = figures(first, second)
    assert entry.max_abs == 1.0
    assert entry.mean_abs == pytest.approx((0.5 + 0.75 + 1.0) / 8, abs=0)
    # one column swaps rows 1 and 2; rows of two batches are no pair
    assert (entry.pairs, entry.pairs_swapped, entry.not_finite) == (6, 1, 0)


def test_ties_on_either_side_are_left_out() -> None:
    assert figures(([1.0, 1.0, 2.0], [1.0, 2.0, 2.0])).pairs == 1
    assert figures(([1.0, 1.0], [2.0, 1.0])).pairs_swapped == 0


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([NAN, INF, -INF, 1.0], [NAN, INF, -INF, 1.5], (0.5, 0.125, 0)),
        ([NAN, INF, INF, 1.0], [1.0, -INF, 2.0, 1.5], (0.5, 0.5, 3)),
        ([NAN], [1.0], (0.0, 0.0, 1)),
        ([True, False], [True, True], (1.0, 0.5, 0)),
        ([3, 1 << 40], [3, (1 << 40) + 2], (2.0, 1.0, 0)),
        ([1 + 1j], [1 - 2j], (3.0, 3.0, 0)),
        (0.5, 0.75, (0.25, 0.25, 0)),
    ],
)
def test_values_of_any_kind(one, other, expected) -> None:
    entry = figures((one, other))
    assert (entry.max_abs, entry.mean_abs, entry.not_finite) == expected


def test_no_rows_no_drift() -> None:
    entry = figures((torch.zeros(0, 3), torch.zeros(0, 3)))
    assert (entry.max_abs, entry.mean_abs, entry.pairs) == (0.0, 0.0, 0)
    assert OutputDrift().entry().mean_abs == 0.0


def test_dtypes_may_differ() -> None:
    one = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)
    assert figures((one, torch.tensor([1.0, 2.5]))).max_abs == 0.5


@pytest.mark.parametrize(
    ("limit", "told"),
    [
        (None, ""),
        (0.5, ""),
        (0.49, "'ctr' by up to 0.5 .allowed 0.49"),
        ({"like": 0.0}, ""),
        ({"ctr": 0.5}, ""),
        ({"ctr": 0.4, "like": 0.0}, "'ctr' by up to 0.5 .allowed 0.4"),
        ({"wide": 1e9}, "'wide' is not finite on one side alone in 1 scores"),
    ],
)
def test_a_bound_is_for_all_outputs_or_for_one(limit, told) -> None:
    outputs = {"ctr": figures(([1.0], [1.5])), "like": figures(([1.0], [1.0]))}
    if isinstance(limit, dict) and "wide" in limit:
        outputs["wide"] = figures(([1.0], [INF]))
    if not told:
        refuse_drift(outputs, limit)
        return
    with pytest.raises(DriftError, match=told) as caught:
        refuse_drift(outputs, limit)
    assert caught.value.exit_code == 1
