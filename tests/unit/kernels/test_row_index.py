"""Keys, slots and searches of the row index are those of numpy, also in indexes that are damaged or made to deceive."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dist_export.formats.row_index import EMPTY, MOST_PROBES, count_buckets
from dist_export.kernels.protocol import DamagedIndexError
from dist_export.package.columns import map_column
from tests.support.kernels import TWIN, open_kernels
from tests.support.properties import examples

PROPERTY = examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
INT64 = st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-3, 3)


class OnStore:
    """A column of which values can be taken, and nothing else."""

    def __init__(self, values):
        self._values = values

    def take(self, rows):
        return self._values.take(rows)


def unaligned(values, dtype):
    data = np.zeros(1 + values.nbytes, np.uint8)
    data[1:] = values.view(np.uint8)
    return map_column(data, 1, len(values), np.dtype(dtype))


def build(kernels, ids, seed=0, runs=1):
    keys = np.sort(kernels.encode_keys(ids, 0, seed))
    slots, longest, buckets = [], 0, count_buckets(len(ids))
    for run in np.array_split(keys, runs):
        if len(run):
            more, probe = kernels.fill_slots(run, num_buckets=buckets, num_slots=sum(map(len, slots)))
            slots.append(more)
            longest = max(longest, probe)
    rest = np.full(max(0, buckets - sum(map(len, slots))) + 1, EMPTY, np.uint32)
    return np.concatenate([*slots, rest]), longest


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("first_row", [0, 5, (1 << 32) - 101])
def test_keys_are_hash_and_row(kernels, seed, first_row):
    ids = np.random.default_rng(3).integers(-(1 << 63), (1 << 63) - 1, 100)
    keys = kernels.encode_keys(ids, first_row, seed)
    assert keys.tolist() == TWIN.encode_keys(ids, first_row, seed).tolist()
    assert (keys & np.uint64(0xFFFFFFFF)).tolist() == list(range(first_row, first_row + 100))


@PROPERTY
@given(st.lists(INT64, min_size=1, max_size=200, unique=True), st.integers(1, 7), st.integers(0, 7))
def test_slots_are_those_of_numpy(kernels, held, runs, seed):
    ids = np.array(held, np.int64)
    expected, longest = build(TWIN, ids, seed, runs)
    slots, probe = build(kernels, ids, seed, runs)
    assert (slots.dtype, slots.tolist(), probe) == (expected.dtype, expected.tolist(), longest)


@pytest.mark.parametrize("num_buckets", [1, 7, 1 << 20, (1 << 32) + 5, 6_135_667_563])
def test_parts_of_any_size_have_their_keys_in_order(kernels, num_buckets):
    hashed = np.array([0, 0, 0, 1, 9, (1 << 32) - 1, (1 << 32) - 1], np.uint64)
    keys = hashed << np.uint64(32) | np.arange(7, dtype=np.uint64)
    first = num_buckets * (int(hashed[0])) >> 32
    for chosen in (keys[:5], keys[5:]):
        start = first if chosen[0] == keys[0] else max(5, (num_buckets * ((1 << 32) - 1) >> 32) - 2)
        slots, longest = kernels.fill_slots(chosen, num_buckets=num_buckets, num_slots=start)
        expected, probe = TWIN.fill_slots(chosen, num_buckets=num_buckets, num_slots=start)
        assert (slots.tolist(), longest) == (expected.tolist(), probe)


@PROPERTY
@given(
    st.lists(INT64, min_size=1, max_size=300, unique=True),
    st.lists(INT64, max_size=50),
    st.sampled_from(["aligned", "unaligned", "store"]),
)
def test_a_dict_gives_the_same_rows(kernels, held, others, kind):
    ids = np.array(held, np.int64)
    slots, longest = build(kernels, ids)
    truth = {number: row for row, number in enumerate(held)}
    sought = [*held, *others]
    wrap = {
        "aligned": lambda values: values,
        "unaligned": lambda values: unaligned(values, values.dtype),
        "store": OnStore,
    }[kind]
    sizes = {"num_slots": len(slots), "num_buckets": count_buckets(len(ids)), "seed": 0, "longest_probe": longest}
    found = kernels.find_rows(wrap(slots), wrap(ids), np.array(sought, np.int64), num_rows=len(ids), **sizes)
    assert found.tolist() == [truth.get(number, -1) for number in sought]
    assert kernels.count_rows_at(wrap(slots), ids, 0, **sizes) == len(ids)
    for first in range(0, len(ids), 7):
        assert kernels.count_rows_at(wrap(slots), ids[first : first + 7], first, **sizes) == len(ids[first : first + 7])


@pytest.mark.parametrize("count", [1, 511, 512, 513, 5000])
def test_many_ids_are_found_in_any_order(kernels, count):
    random = np.random.default_rng(count)
    ids = random.permutation(np.unique(random.integers(-(1 << 63), (1 << 63) - 1, 20_000)))
    slots, longest = build(kernels, ids)
    sought = random.choice(ids, count)
    sought[::3] = random.integers(0, 1 << 40, len(sought[::3]))
    sizes = {"num_slots": len(slots), "num_rows": len(ids), "num_buckets": count_buckets(len(ids)), "seed": 0}
    for probe in (longest, 1, 0, MOST_PROBES):
        found = kernels.find_rows(slots, ids, sought, longest_probe=probe, **sizes)
        assert found.tolist() == TWIN.find_rows(slots, ids, sought, longest_probe=probe, **sizes).tolist()
    assert np.array_equal(ids[found[found >= 0]], sought[found >= 0])


@PROPERTY
@given(st.data())
def test_a_damaged_index_is_refused_as_numpy_refuses_it(kernels, data):
    ids = np.array(data.draw(st.lists(INT64, min_size=1, max_size=60, unique=True)), np.int64)
    slots, longest = build(TWIN, ids)
    slots = slots[: data.draw(st.integers(0, len(slots)))].copy()
    for place in data.draw(st.lists(st.integers(0, max(0, len(slots) - 1)), max_size=10)) if len(slots) else []:
        slots[place] = data.draw(st.sampled_from([0, len(ids) - 1, len(ids), 0xFFFFFFFE, 0xFFFFFFFF]))
    sizes = {"num_slots": len(slots), "num_buckets": count_buckets(len(ids)), "seed": 0}
    sizes["longest_probe"] = data.draw(st.sampled_from([0, longest, MOST_PROBES]))

    def outcome(one):
        try:
            return one.find_rows(slots, ids, ids, num_rows=len(ids), **sizes).tolist()
        except DamagedIndexError as error:
            return str(error)

    assert outcome(kernels) == outcome(TWIN)
    assert kernels.count_rows_at(slots, ids, 0, **sizes) == TWIN.count_rows_at(slots, ids, 0, **sizes)


@pytest.mark.parametrize("width", [1, 4, 7, 32, 64, 72, 128, 256, 1000])
def test_rows_are_taken(kernels, width):
    random = np.random.default_rng(width)
    block = random.integers(0, 255, (300, width), np.uint8)
    found = random.integers(-1, 300, 1000)
    targets = random.permutation(1500)[:1000]
    results = []
    for one in (kernels, TWIN):
        rows, has_row = np.zeros((1500, width), np.uint8), np.zeros(1500, bool)
        one.take_rows(block, found, targets, rows=rows, has_row=has_row)
        results.append((rows, has_row))
    assert np.array_equal(results[0][0], results[1][0])
    assert np.array_equal(results[0][1], results[1][1])
    assert np.array_equal(results[0][0][targets[found >= 0]], block[found[found >= 0]])


@pytest.mark.parametrize("level", ["plain C", "AVX2"])
def test_arrays_that_do_not_fit_are_refused(level):
    kernels = open_kernels(level)
    block, rows, has_row = np.zeros((5, 8), np.uint8), np.zeros((4, 8), np.uint8), np.zeros(4, bool)
    for found, targets, into, match in (
        ([5], [0], rows, "cannot become rows"),
        ([4], [4], rows, "not all targets are below 4"),
        ([4], [-1], rows, "not all targets are below 4"),
        ([4], [0], np.zeros((4, 9), np.uint8), "cannot become rows"),
        ([4], [0, 1], rows, "2 values instead of 1"),
    ):
        with pytest.raises(ValueError, match=match):
            kernels.take_rows(block, np.array(found), np.array(targets), rows=into, has_row=has_row)
    with pytest.raises(ValueError, match="0 keys are to go into 5 buckets"):
        kernels.fill_slots(np.zeros(0, np.uint64), num_buckets=5, num_slots=0)
