"""Bags pooled with plain operators give what torch's own operator gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_export.package.dense_inputs import IdLists, pool_rows
from dist_export.score.bags import MISFIT, pool_bags
from dist_export.score.decompositions import _KNOWN

WEIGHT = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


def pool(ids, offsets=None, **settings):
    named = {"mode": "mean", "per_sample_weights": None, "include_last_offset": False, "padding_idx": None} | settings
    return pool_bags(lambda its: WEIGHT[its], ids, offsets, **named), F.embedding_bag(ids, WEIGHT, offsets, **named)


@pytest.mark.parametrize(("mode", "padding_idx"), list(itertools.product(["sum", "mean", "max"], [None, 5])))
def test_bags_with_offsets_with_empty_ones_at_all_positions(mode: str, padding_idx: int | None) -> None:
    ids = torch.tensor([5, 1, 2, 5, 11, 0, 7])
    for offsets in ([0, 0, 3, 3, 4, 7], [0], [0, 7], [0, 3]):
        found, expected = pool(ids, torch.tensor(offsets), mode=mode, padding_idx=padding_idx)
        torch.testing.assert_close(found, expected)
    for offsets in ([0, 0, 3, 4, 4, 7], [0, 7]):
        bounds = torch.tensor(offsets)
        found, expected = pool(ids, bounds, mode=mode, padding_idx=padding_idx, include_last_offset=True)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize(
    ("offsets", "include_last_offset"),
    [([0, 4, 3], False), ([0, 8], False), ([0, -1], False), ([0, 2, 3], True), ([0, 9], True), ([0, 5, 4, 7], True)],
)
def test_offsets_that_do_not_cut_the_ids_into_bags_are_refused(
    mode: str, offsets: list[int], include_last_offset: bool
) -> None:
    """Of ids behind the last bag, torch makes different things by mode, dtype, padding and device."""
    for ids in (torch.arange(7), torch.arange(7)[:0]):
        with pytest.raises(RuntimeError, match=MISFIT):
            pool(ids, torch.tensor(offsets), mode=mode, include_last_offset=include_last_offset)


def test_a_maximum_over_a_row_with_nan_is_nan_as_the_serving_contract_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own maximum is that of the other rows, unless the first row has it."""
    with_nan = WEIGHT.clone()
    with_nan[4, 1] = float("nan")
    monkeypatch.setitem(globals(), "WEIGHT", with_nan)
    for ids, is_first in ([4, 2, 3], True), ([2, 4, 3], False):
        flat = pool(torch.tensor(ids), torch.tensor([0]), mode="max")
        for found, of_torch in (flat, pool(torch.tensor([ids]), mode="max")):
            assert found.isnan().tolist() == [[False, True, False]]
            assert of_torch.isnan().any() == is_first
        lists = IdLists(np.array(ids), np.zeros(3, np.int64), np.arange(3), 1, 3)
        served = pool_rows(with_nan[ids].numpy(), lists, "max")
        np.testing.assert_array_equal(served, flat[0].numpy())


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_no_ids_at_all(mode: str) -> None:
    found, expected = pool(torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]), mode=mode)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("mode", "padding_idx"), list(itertools.product(["sum", "mean", "max"], [None, 5])))
def test_bags_of_one_length(mode: str, padding_idx: int | None) -> None:
    ids = torch.tensor([[5, 1, 2], [5, 5, 5], [0, 0, 7]])
    for its in (ids, ids[:0]):
        found, expected = pool(its, mode=mode, padding_idx=padding_idx)
        torch.testing.assert_close(found, expected)


def test_weights_of_ids() -> None:
    weights = torch.tensor([0.5, -1.0, 2.0, 0.25, 3.0])
    found, expected = pool(
        torch.tensor([5, 1, 2, 5, 11]), torch.tensor([0, 2, 2]), mode="sum", per_sample_weights=weights
    )
    torch.testing.assert_close(found, expected)


def test_sums_of_lengths_are_as_fbgemm_has_them() -> None:
    lengths = torch.tensor([2, 0, 3])
    for name, expected in (("complete", [0, 2, 2, 5]), ("inclusive", [2, 2, 5]), ("exclusive", [0, 2, 2])):
        assert _KNOWN[f"fbgemm.asynchronous_{name}_cumsum.default"](lengths).tolist() == expected


@pytest.mark.parametrize("longest", [2, 4])
def test_lists_are_padded_and_cut_as_fbgemm_does_it(longest: int) -> None:
    values = torch.arange(1.0, 11.0).reshape(5, 2)
    offsets = torch.tensor([0, 2, 2, 5])
    found = _KNOWN["fbgemm.jagged_to_padded_dense.default"](values, [offsets], [longest], -1.0)
    expected = torch.full((3, longest, 2), -1.0)
    for row, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        its = values[begin:end][:longest]
        expected[row, : len(its)] = its
    assert torch.equal(found, expected)
