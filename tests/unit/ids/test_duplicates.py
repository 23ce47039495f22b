"""Ids that arrive in runs are searched for duplicates, whatever the runs are."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.ids import duplicates
from dist_export.ids.duplicates import HeldIds
from dist_export.kernels import compiled_duplicates, numpy_duplicates
from tests.support.kernels import IMPLEMENTATIONS, open_kernels


def unique_ids(count: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.permutation(np.unique(random.integers(-(1 << 63), (1 << 63) - 1, 2 * count, np.int64)))[:count]


@pytest.fixture(params=IMPLEMENTATIONS, autouse=True)
def kernels(request, monkeypatch):
    chosen = open_kernels(request.param)
    monkeypatch.setattr(duplicates, "select_kernels", lambda: chosen)
    for module in (numpy_duplicates, compiled_duplicates):
        monkeypatch.setattr(module, "_BUCKET_IDS", 50)


def deal_from(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    for module in (numpy_duplicates, compiled_duplicates):
        monkeypatch.setattr(module, "_DIRECT_IDS", count)


@pytest.mark.parametrize("run", [1, 7, 100, 1000])
@pytest.mark.parametrize("direct", [1 << 17, 10])
@pytest.mark.parametrize("deal", [1 << 16, 90])
def test_held_ids_are_searched_whatever_runs_they_came_in(monkeypatch, direct, run, deal):
    deal_from(monkeypatch, direct)
    monkeypatch.setattr(duplicates, "_DEAL_IDS", deal)
    ids = unique_ids(700)
    for twice in (False, True):
        if twice:
            ids[650] = ids[3]
        held = HeldIds(len(ids))
        assert all(held.add(ids[first : first + run]) for first in range(0, len(ids), run))
        assert held.has_duplicates() == twice
        assert not held.add(ids[:1]), "there is no room left"
        assert held.sorted_ids().tolist() == sorted(ids.tolist())


def test_nothing_held_has_no_duplicates(monkeypatch):
    deal_from(monkeypatch, 10)
    assert not HeldIds(100).has_duplicates()
    assert not HeldIds(0).has_duplicates()
