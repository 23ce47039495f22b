"""Rows are found where the row index would find them, in whatever order ids come; ids in order need no index."""

from __future__ import annotations

import contextlib
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.formats.recis import Slice, is_in_slice
from dist_export.package.row_follower import RowFollower
from dist_export.package.slice_edges import find_edges
from tests.support.properties import examples


class Parts:
    """What a SlotReader says of a hash table of which each part has some ids, and which ids were looked up in row indexes."""

    def __init__(self, ids: np.ndarray, slices: list[Slice]) -> None:
        self.ids = [ids[is_in_slice(ids, its)] for its in slices]
        self.table = SimpleNamespace(is_row_indexed=False, parts=[SimpleNamespace(rows=len(its)) for its in self.ids])
        self._edges = find_edges(slices)
        self.deal = self._edges.deal
        self.looked_up = 0

    @contextlib.contextmanager
    def open_ids(self, number: int):
        yield self.ids[number]

    def find_in(self, number: int, sought: np.ndarray) -> np.ndarray:
        self.looked_up += len(sought)
        row_of = {its: row for row, its in enumerate(self.ids[number].tolist())}
        return np.array([row_of.get(its, -1) for its in sought.tolist()], np.int64)


def slices_of(num: int, size: int = 65536) -> list[Slice]:
    edges = [size * number // num for number in range(num + 1)]
    return [Slice(begin, end, size) for begin, end in itertools.pairwise(edges)]


def found_of(parts: Parts, follower: RowFollower, ids: np.ndarray) -> dict[int, tuple[int, int]]:
    found = {}
    for number, wanted, rows in follower.find(ids):
        for place, row in zip(wanted.tolist(), rows.tolist(), strict=True):
            if row >= 0:
                assert int(ids[place]) not in found
                found[int(ids[place])] = number, row
    return found


@examples(150)
@given(st.integers(0, 2**32), st.integers(1, 600), st.integers(1, 4), st.sampled_from(["same", "few moved", "any"]))
def test_each_id_is_found_in_its_part_at_its_row(seed: int, count: int, num_parts: int, order: str) -> None:
    random = np.random.default_rng(seed)
    held = random.choice(1 << 40, count, replace=False)
    parts = Parts(held, slices_of(num_parts))
    follower = RowFollower(parts)
    later = np.delete(held, random.integers(0, count, 5))
    later = np.insert(later, random.integers(0, len(later) + 1, 5), (1 << 41) + np.arange(5))
    if order == "any":
        later = random.permutation(later)
    elif order == "few moved":
        one, other = random.integers(0, len(later), 2)
        later[[one, other]] = later[[other, one]]
    expected = {int(its): (number, row) for number, ids in enumerate(parts.ids) for row, its in enumerate(ids)}
    found: dict[int, tuple[int, int]] = {}
    for first in range(0, len(later), 97):
        found |= found_of(parts, follower, later[first : first + 97])
    assert found == {int(its): expected[int(its)] for its in later if int(its) in expected}


@pytest.mark.parametrize("num_parts", [1, 3])
def test_ids_in_order_are_not_looked_up(num_parts: int) -> None:
    """After the first run, which finds where the ids are, only new ids are, and what comes directly behind too many of them."""
    held = np.random.default_rng(1).choice(1 << 40, 6000, replace=False)
    parts = Parts(held, slices_of(num_parts))
    follower, later = RowFollower(parts), np.insert(np.delete(held, [40, 41, 2000]), [3000], [1 << 41])
    for first in range(0, len(later), 500):
        found_of(parts, follower, later[first : first + 500])
    assert parts.looked_up == 1


@examples(200)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True), st.integers(40, 100), st.integers(0, 2**32))
def test_ids_are_dealt_to_the_slices_that_own_them(edges: list[int], size: int, seed: int) -> None:
    """Also where slices leave gaps, and where the size is no power of two."""
    random, bounds = np.random.default_rng(seed), sorted(edges)
    slices = [Slice(begin, end, size) for begin, end in zip(bounds[:-1:2], bounds[1::2], strict=True)]
    random.shuffle(slices)
    dealt = find_edges(slices) if slices else None
    if dealt is None:
        assert not any(its.end > its.begin for its in slices)
        return
    ids = random.integers(-(1 << 62), 1 << 62, 300)
    found = {number: wanted.tolist() for number, wanted in dealt.deal(ids)}
    expected = {number: np.flatnonzero(is_in_slice(ids, its)).tolist() for number, its in enumerate(slices)}
    assert found == {number: wanted for number, wanted in expected.items() if wanted}


@pytest.mark.parametrize(
    "slices",
    [
        [Slice(0, 8, 16), Slice(4, 16, 16)],
        [Slice(0, 8, 16), Slice(8, 17, 16)],
        [Slice(0, 8, 16), Slice(8, 32, 32)],
        [Slice(0, 1 << 62, 1 << 62)],
        [Slice(3, 3, 16)],
    ],
)
def test_slices_that_overlap_or_cannot_be_have_no_edges(slices: list[Slice]) -> None:
    assert find_edges(slices) is None
