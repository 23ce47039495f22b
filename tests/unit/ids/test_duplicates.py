from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.ids import duplicates
from dist_export.ids.duplicates import HeldIds, has_duplicates
from tests.support.properties import examples

PROPERTY = examples(150)


def unique_ids(count, seed=0):
    random = np.random.default_rng(seed)
    return random.permutation(np.unique(random.integers(-(1 << 63), (1 << 63) - 1, 2 * count + 8, np.int64)))[:count]


KINDS = {
    "random": unique_ids,
    "counted": lambda count: np.arange(count, dtype=np.int64),
    "multiples of 65536": lambda count: np.arange(count, dtype=np.int64) << 16,
    "high bits": lambda count: np.arange(count, dtype=np.int64) << (63 - max(1, count.bit_length())),
}


@pytest.fixture(autouse=True)
def sweep_small_inputs(monkeypatch):
    monkeypatch.setattr(duplicates, "_FEW", 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 64, 1000, 5000])
def test_unique_ids_have_no_repeats(kind, count):
    assert not has_duplicates(KINDS[kind](count))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 5, 64, 1000])
def test_one_repeat_anywhere_is_found(kind, count):
    ids = KINDS[kind](count)
    random = np.random.default_rng(1)
    for _ in range(40):
        first, second = random.choice(count, 2, replace=False)
        twice = ids.copy()
        twice[second] = twice[first]
        assert has_duplicates(twice)


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4)), max_size=30))
def test_groups_are_searched_apart(pairs):
    groups, ids = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    assert has_duplicates(ids, groups) == (len(set(pairs)) < len(pairs))
    assert has_duplicates(ids) == (len(set(ids.tolist())) < len(ids))


def test_many_small_tables_with_the_same_ids_do_not_meet():
    ids = np.tile(np.arange(50, dtype=np.int64), 200)
    groups = np.repeat(np.arange(200), 50)
    assert not has_duplicates(ids, groups)
    ids[-1] = ids[-2]
    assert has_duplicates(ids, groups)


def test_ids_crafted_to_share_every_hash_are_sorted(monkeypatch):
    monkeypatch.setattr(duplicates, "_MULTIPLIERS", (np.uint64(0),) * 6)  # all ids have one hash
    ids = unique_ids(3000)
    assert not has_duplicates(ids)
    ids[17] = ids[2999]
    assert has_duplicates(ids)
    assert has_duplicates(ids, np.zeros(3000, np.int64))


@pytest.mark.parametrize("run", [1, 7, 100, 1000])
@pytest.mark.parametrize("direct", [1 << 17, 10])
def test_held_ids_are_searched_whatever_runs_they_came_in(monkeypatch, direct, run):
    monkeypatch.setattr(duplicates, "_DIRECT_IDS", direct)
    monkeypatch.setattr(duplicates, "_BUCKET_IDS", 50)
    ids = unique_ids(700)
    for twice in (False, True):
        if twice:
            ids[650] = ids[3]
        held = HeldIds(len(ids))
        assert all(held.add(ids[first : first + run]) for first in range(0, len(ids), run))
        assert held.has_duplicates() == twice
        assert not held.add(ids[:1]), "there is no room left"
        assert held.sorted_ids().tolist() == sorted(ids.tolist())


def test_nothing_held_has_no_repeats(monkeypatch):
    monkeypatch.setattr(duplicates, "_DIRECT_IDS", 10)
    assert not HeldIds(100).has_duplicates()
    assert not HeldIds(0).has_duplicates()
