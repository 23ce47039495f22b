"""Duplicate ids are found, whatever the ids are, by each implementation of the kernels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dist_export.kernels import numpy_duplicates
from dist_export.kernels.protocol import Kernels
from tests.support.kernels import IMPLEMENTATIONS, open_kernels
from tests.support.properties import examples

PROPERTY = examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
BIGGEST, LEAST = (1 << 63) - 1, -(1 << 63)


def unique_ids(count, seed=0):
    random = np.random.default_rng(seed)
    return random.permutation(np.unique(random.integers(LEAST, BIGGEST, 2 * count + 8, np.int64)))[:count]


KINDS = {
    "random": unique_ids,
    "counted": lambda count: np.arange(count, dtype=np.int64),
    "around zero": lambda count: np.arange(count, dtype=np.int64) - count // 2,
    "multiples of 65536": lambda count: np.arange(count, dtype=np.int64) << 16,
    "high bits": lambda count: np.arange(count, dtype=np.int64) << (63 - max(1, count.bit_length())),
    "from the least": lambda count: LEAST + np.arange(count, dtype=np.int64),
}


def open_small(name: str, **sizes: int) -> Kernels:
    """Return an implementation that also sweeps small inputs."""
    return open_kernels(name, **({"few": 2} if name == "numpy" else {}), **sizes)


@pytest.fixture(params=IMPLEMENTATIONS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return open_small(request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 64, 1000, 5000])
def test_unique_ids_have_no_duplicates(kernels, kind, count):
    ids = KINDS[kind](count)
    assert not kernels.has_duplicates(ids)
    assert not kernels.has_duplicates(ids, np.zeros(count, np.int64))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 3, 5, 64, 1000])
def test_one_duplicate_anywhere_is_found(kernels, kind, count):
    ids = KINDS[kind](count)
    random = np.random.default_rng(1)
    for _ in range(40):
        first, second = random.choice(count, 2, replace=False)
        twice = ids.copy()
        twice[second] = twice[first]
        assert kernels.has_duplicates(twice)
        assert kernels.has_duplicates(twice, np.full(count, 7, np.int64))


@pytest.mark.parametrize("number", [0, -1, 1, LEAST, BIGGEST])
def test_no_id_is_taken_for_an_empty_slot(kernels, number):
    others = unique_ids(500)
    others = others[others != number]
    assert not kernels.has_duplicates(np.append(others, number))
    assert kernels.has_duplicates(np.concatenate([[number], others, [number]]))


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-4, 4)), max_size=30))
def test_groups_are_searched_apart(kernels, pairs):
    groups, ids = (np.array([pair[i] for pair in pairs], np.int64) for i in (0, 1))
    assert kernels.has_duplicates(ids, groups) == (len(set(pairs)) < len(pairs))
    assert kernels.has_duplicates(ids) == (len(set(ids.tolist())) < len(ids))


def test_many_small_tables_with_the_same_ids_do_not_meet(kernels):
    ids = np.tile(np.arange(50, dtype=np.int64), 200)
    groups = np.repeat(np.arange(200), 50)
    assert not kernels.has_duplicates(ids, groups)
    ids[-1] = ids[-2]
    assert kernels.has_duplicates(ids, groups)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_dealt_ids_are_the_same_ids_in_the_order_of_their_buckets(kernels, bits):
    ids = unique_ids(3000)
    dealt = ids.copy()
    edges = kernels.deal_ids(dealt, bits)
    assert sorted(dealt.tolist()) == sorted(ids.tolist())
    assert (edges[0], edges[-1], len(edges)) == (0, len(ids), (1 << bits) + 1)
    assert (np.diff(edges) >= 0).all()
    bucket_of = {number: bucket for bucket in range(1 << bits) for number in dealt[edges[bucket] : edges[bucket + 1]]}
    again = ids[::-1].copy()
    edges = kernels.deal_ids(again, bits)
    for bucket in range(1 << bits):
        assert all(bucket_of[number] == bucket for number in again[edges[bucket] : edges[bucket + 1]])


@pytest.mark.parametrize("bits", [1, 4])
def test_duplicates_among_several_deals_are_found(kernels, bits):
    ids = unique_ids(4000)
    for twice in (None, (3, 3900), (0, 1), (1000, 1999)):
        whole = ids.copy()
        if twice is not None:
            whole[twice[1]] = whole[twice[0]]
        edges = [first + kernels.deal_ids(whole[first : first + 1000], bits) for first in range(0, 4000, 1000)]
        assert kernels.has_duplicates_dealt(whole, np.stack(edges)) == (twice is not None)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_many_ids_are_dealt_and_searched(name):
    kernels = open_small(name, direct_ids=1000, bucket_ids=100)
    ids = unique_ids(5000)
    assert not kernels.has_duplicates(ids)
    ids[4999] = ids[17]
    assert kernels.has_duplicates(ids)


def test_ids_crafted_to_share_every_hash_are_sorted(monkeypatch):
    monkeypatch.setattr(numpy_duplicates, "_MULTIPLIERS", (np.uint64(0),) * 6)  # all ids have one hash
    kernels, ids = open_small("numpy"), unique_ids(3000)
    assert not kernels.has_duplicates(ids)
    ids[17] = ids[2999]
    assert kernels.has_duplicates(ids)
    assert kernels.has_duplicates(ids, np.zeros(3000, np.int64))


@pytest.mark.parametrize("level", ["plain C", "AVX2"])
def test_ids_crafted_for_a_known_seed_cost_one_more_sweep(level):
    kernels = open_kernels(level)
    inverse = np.uint64(pow(kernels.first_multiplier(), -1, 1 << 64))
    crafted = (np.arange(50_000, dtype=np.uint64) * inverse).view(
        np.int64
    )  # mixed, they are 0, 1, 2 ...: all in slot 0
    found, num_swept = kernels.search(crafted, None)
    assert not found
    assert 2 * len(crafted) - 10 < num_swept < 4 * len(crafted), "one sweep for nothing, then those of random ids"
    found, num_swept = kernels.search(unique_ids(50_000), None)
    assert not found
    assert num_swept < 2 * len(crafted)
    crafted[-1] = crafted[5]
    assert kernels.has_duplicates(crafted)


@pytest.mark.parametrize("level", ["plain C", "AVX2"])
def test_arrays_that_do_not_fit_are_refused(level):
    kernels = open_kernels(level)
    ids = unique_ids(10)
    with pytest.raises(TypeError, match="float64 instead of int64"):
        kernels.has_duplicates(ids.astype(float))
    with pytest.raises(ValueError, match="9 values instead of 10"):
        kernels.has_duplicates(ids, np.zeros(9, np.int64))
    with pytest.raises(ValueError, match="edges of the buckets are not in order"):
        kernels.has_duplicates_dealt(ids, np.array([[0, 5, 11]]))
    with pytest.raises(ValueError, match="edges of the buckets are not in order"):
        kernels.has_duplicates_dealt(ids, np.array([[0, 5, 3]]))
    for bits in (0, -1, 17, 64):
        with pytest.raises(ValueError, match="cannot be dealt into"):
            kernels.deal_ids(ids, bits)
    with pytest.raises(TypeError, match="contiguous"):
        kernels.deal_ids(ids[::2], 2)
