"""Which elements of two tensors are the same bytes: found as writing into one and looking at the other finds it."""

from __future__ import annotations

import itertools

import pytest
import torch

from dist_export.dense.overlaps import find_common, find_overlaps

BASE = torch.zeros(8, 6)
VIEWS = {
    "whole": BASE,
    "transposed": BASE.t(),
    "rows": BASE[2:5],
    "columns": BASE[:, 1:3],
    "other columns": BASE[:, 4:],
    "every other row": BASE[1::2],
    "diagonal": BASE.diagonal(),
    "flat": BASE.view(-1)[3:40],
    "cube": BASE.view(2, 4, 6).permute(2, 0, 1)[1:],
    "one": BASE[3, 3],
    "spread": BASE[0].expand(3, 6),
}


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(VIEWS, 2)))
@pytest.mark.parametrize("step", [100, 1])
def test_the_common_elements_are_those_that_a_write_reaches(one: str, other: str, step: int) -> None:
    BASE.copy_(torch.arange(1, 49).view(8, 6))
    tensors = {0: VIEWS[one], 1: VIEWS[other]}
    truth = set(VIEWS[one].reshape(-1).tolist()) & set(VIEWS[other].reshape(-1).tolist())
    found: set[float] = set()
    for first, second, mine, theirs in find_overlaps(tensors):
        values = [tensors[key] if tensors[key].dim() else tensors[key].reshape(1) for key in (first, second)]
        rows = mine.rows_within(theirs.begin, theirs.end)
        for begin in range(rows.start, rows.stop, step):
            piece = range(begin, min(begin + step, rows.stop))
            at_one, other_rows, at_other = find_common(mine, piece, theirs)
            left = values[0][piece.start : piece.stop].reshape(-1)[torch.from_numpy(at_one)]
            right = values[1][other_rows.start : other_rows.stop].reshape(-1)[torch.from_numpy(at_other)]
            assert torch.equal(left, right)
            found |= set(left.tolist())
    assert found == truth


def test_what_lies_beside_another_one_is_no_overlap() -> None:
    flat = torch.zeros(20)
    assert not list(find_overlaps({0: flat[:10], 1: flat[10:15], 2: flat[15:], 3: torch.zeros(4)}))
    pairs = {(one, other) for one, other, *_ in find_overlaps({0: flat[:11], 1: flat[10:], 2: flat[:2], 3: flat[19:]})}
    assert {tuple(sorted(pair)) for pair in pairs} == {(0, 1), (0, 2), (1, 3)}
