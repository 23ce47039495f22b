"""Sums, slices and owners of ids are those of Python's own integers, on each implementation of the kernels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.support.kernels import TWIN, open_kernels
from tests.support.properties import examples

PROPERTY = examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
MASK = (1 << 64) - 1
INT64 = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from([0, 1, -1, (1 << 63) - 1, -(1 << 63)])
SIZE = st.integers(1, (1 << 62) - 1) | st.integers(1, 100) | st.integers(0, 61).map(lambda bits: 1 << bits)


def mix(number: int) -> int:
    mixed = (number & MASK) * 0x9E3779B97F4A7C15 & MASK
    return mixed ^ mixed >> 32


@PROPERTY
@given(st.lists(st.lists(INT64, min_size=1, max_size=20), min_size=1, max_size=6), SIZE, st.data())
def test_each_block_has_its_sum_its_edges_and_its_misplaced_rows(kernels, blocks, size, data):
    edge = st.integers(0, size)
    slices = [sorted(data.draw(st.tuples(edge, edge))) for _ in blocks]
    ids = np.array([number for block in blocks for number in block], np.int64)
    lengths = [len(block) for block in blocks]
    sweep = kernels.sweep_ids(
        ids,
        np.cumsum([0, *lengths[:-1]]),
        size=size,
        begins=np.array([begin for begin, _ in slices], np.int64),
        ends=np.array([end for _, end in slices], np.int64),
    )
    positions = [[(number & MASK) % size for number in block] for block in blocks]
    assert sweep.id_sums.tolist() == [sum(map(mix, block)) & MASK for block in blocks]
    assert sweep.lowest.tolist() == [min(block) for block in positions]
    assert sweep.highest.tolist() == [max(block) for block in positions]
    assert sweep.outside.tolist() == [
        sum(not begin <= position < end for position in block)
        for block, (begin, end) in zip(positions, slices, strict=True)
    ]
    assert [column.dtype for column in sweep] == [np.uint64, np.int64, np.int64, np.int64]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 1023, 100_003])
@pytest.mark.parametrize("size", [65536, 1 << 40, 30_000, (1 << 61) + 12345])
def test_long_blocks_are_those_of_numpy(kernels, count, size):
    ids = np.random.default_rng(count).integers(-(1 << 63), (1 << 63) - 1, count)
    given_ = {"size": size, "begins": np.array([size // 3]), "ends": np.array([size // 2])}
    for found, expected in zip(
        kernels.sweep_ids(ids, np.zeros(1, np.int64), **given_),
        TWIN.sweep_ids(ids, np.zeros(1, np.int64), **given_),
        strict=True,
    ):
        assert found.tolist() == expected.tolist()


@PROPERTY
@given(st.lists(INT64, max_size=50), SIZE, st.data(), st.sampled_from([np.uint8, np.uint16, np.int32]))
def test_each_id_has_the_owner_of_its_position(kernels, numbers, size, data, dtype):
    later = data.draw(st.lists(st.integers(1, size - 1), max_size=5, unique=True)) if size > 1 else []
    breaks = np.array([0, *sorted(later)], np.int64)
    num_targets = data.draw(st.integers(1, 300 if dtype != np.uint8 else 256))
    owners = np.array(
        data.draw(st.lists(st.integers(0, num_targets - 1), min_size=len(breaks), max_size=len(breaks))), dtype
    )
    ids = np.array(numbers, np.int64)
    expected = [int(owners[np.searchsorted(breaks, (number & MASK) % size, "right") - 1]) for number in numbers]
    lookups = [None]
    if size <= 1 << 16:
        lookups.append(np.repeat(owners, np.diff(np.append(breaks, size))))
    for lookup in lookups:
        found, counts = kernels.find_owners(
            ids, size=size, breaks=breaks, owners=owners, lookup=lookup, num_targets=num_targets
        )
        assert found.dtype == dtype
        assert found.tolist() == expected
        assert (
            counts.tolist() == np.bincount(expected, minlength=num_targets).tolist() if expected else not counts.any()
        )


@pytest.mark.parametrize("level", ["plain C", "AVX2"])
def test_arrays_that_do_not_fit_are_refused(level):
    kernels = open_kernels(level)
    ids, one = np.arange(10), np.zeros(1, np.int64)
    with pytest.raises(ValueError, match="blocks of the ids are empty or not in order"):
        kernels.sweep_ids(ids, np.array([0, 3, 3]), size=8, begins=np.zeros(3, np.int64), ends=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="blocks of the ids are empty or not in order"):
        kernels.sweep_ids(ids, np.array([10]), size=8, begins=one, ends=one)
    with pytest.raises(ValueError, match="1 values instead of 2"):
        kernels.sweep_ids(ids, np.array([0, 3]), size=8, begins=one, ends=one)
    with pytest.raises(ValueError, match="the slices have 0 positions"):
        kernels.sweep_ids(ids, one, size=0, begins=one, ends=one)
    owners = {"breaks": one, "owners": np.array([3], np.uint8), "lookup": None}
    with pytest.raises(ValueError, match="not all are below 3"):
        kernels.find_owners(ids, size=8, num_targets=3, **owners)
    with pytest.raises(ValueError, match="7 values instead of 8"):
        kernels.find_owners(ids, size=8, num_targets=4, **{**owners, "lookup": np.zeros(7, np.uint8)})
