"""Ids that arrive in runs are searched for duplicates, whatever the runs are."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.ids.duplicates import HeldIds
from tests.support.kernels import IMPLEMENTATIONS, open_kernels


def unique_ids(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.permutation(np.unique(random.integers(-(1 << 63), (1 << 63) - 1, 2 * count, np.int64)))[:count]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("run", [1, 7, 100, 1000])
@pytest.mark.parametrize("direct", [1 << 17, 10])
@pytest.mark.parametrize("deal", [1 << 16, 90])
def test_held_ids_are_searched_whatever_runs_they_came_in(name, direct, run, deal):
    kernels = open_kernels(name, direct_ids=direct, bucket_ids=50)
    ids = unique_ids(700)
    for twice in (False, True):
        if twice:
            ids[650] = ids[3]
        held = HeldIds(len(ids), kernels=kernels, deal_ids=deal)
        assert all(held.add(ids[first : first + run]) for first in range(0, len(ids), run))
        assert held.has_duplicates() == twice
        assert not held.add(ids[:1]), "there is no room left"
        assert held.sorted_ids().tolist() == sorted(ids.tolist())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_nothing_held_has_no_duplicates(name):
    kernels = open_kernels(name, direct_ids=10, bucket_ids=50)
    assert not HeldIds(100, kernels=kernels).has_duplicates()
    assert not HeldIds(0, kernels=kernels).has_duplicates()
