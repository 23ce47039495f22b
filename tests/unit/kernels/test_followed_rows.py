"""Rows of a base for ids in its order, and bits of rows: those of numpy, whatever is left out, added or in another order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dist_export.package.columns import map_column
from tests.support.kernels import TWIN
from tests.support.properties import examples

PROPERTY = examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])


def unaligned(values: np.ndarray):
    data = np.zeros(1 + values.nbytes, np.uint8)
    data[1:] = values.view(np.uint8)
    return map_column(data, 1, len(values), np.dtype(np.int64))


def follow(kernels, ids, sought, first_row=0, most_missed=1 << 40):
    found, after = kernels.follow_ids(
        ids, sought, num_rows=len(ids) if isinstance(ids, np.ndarray) else len(ids.raw_bytes) // 8,
        first_row=first_row, most_missed=most_missed,
    )  # fmt: skip
    return found.tolist(), after


def test_ids_in_the_same_order_are_all_found(kernels):
    ids = np.random.default_rng(1).integers(-(1 << 63), (1 << 63) - 1, 5000)
    assert follow(kernels, ids, ids.copy()) == (list(range(5000)), 5000)
    assert follow(kernels, unaligned(ids), ids[40:4000], 40) == (list(range(40, 4000)), 4000)


def test_rows_that_are_gone_are_passed_over_and_new_ids_are_not_found(kernels):
    ids = np.arange(100) * 7
    sought = np.concatenate(
        [ids[:10], ids[18:40], [-5], ids[40:60], ids[69:]]
    )  # 8 rows are passed over, 9 are too many
    found, after = follow(kernels, ids, sought)
    assert found[:53] == [*range(10), *range(18, 40), -1, *range(40, 60)]
    assert found[53:] == [-1] * 31
    assert after == 60


def test_after_too_many_misses_the_rest_is_not_looked_for(kernels):
    ids = np.arange(50)
    sought = np.concatenate([ids[:5], [-1, -2], ids[5:]])
    assert follow(kernels, ids, sought, most_missed=2)[1] == 50
    assert follow(kernels, ids, sought, most_missed=1) == ([0, 1, 2, 3, 4, *[-1] * 47], 5)
    assert follow(kernels, ids, sought, most_missed=0) == ([0, 1, 2, 3, 4, *[-1] * 47], 5)


@pytest.mark.parametrize("first_row", [0, 3, 7])
def test_there_may_be_nothing(kernels, first_row):
    none = np.zeros(0, np.int64)
    assert follow(kernels, none, np.arange(3), 0) == ([-1] * 3, 0)
    assert follow(kernels, np.arange(7), none, first_row) == ([], first_row)
    assert follow(kernels, np.arange(7), np.arange(7), 7) == ([-1] * 7, 7)


@PROPERTY
@given(st.integers(0, 2**32), st.integers(0, 300), st.integers(0, 12), st.integers(0, 12), st.integers(0, 40))
def test_whatever_is_found_is_there_and_the_same_as_in_numpy(kernels, seed, num_rows, gone, new, most_missed):
    random = np.random.default_rng(seed)
    ids = random.permutation(num_rows)
    sought = np.delete(ids, random.integers(0, max(num_rows, 1), gone) if num_rows else [])
    sought = np.insert(sought, random.integers(0, len(sought) + 1, new), -1 - np.arange(new))
    if seed % 3 == 0:
        sought = random.permutation(sought)
    first_row = int(random.integers(0, num_rows + 1))
    for column in (ids, unaligned(ids)):
        found, after = follow(kernels, column, sought, first_row, most_missed)
        assert (found, after) == follow(TWIN, ids, sought, first_row, most_missed)
        assert all(row == -1 or ids[row] == its for row, its in zip(found, sought.tolist(), strict=True))


@PROPERTY
@given(st.lists(st.integers(0, 99), max_size=60))
def test_the_bits_of_rows_are_set_and_no_others(kernels, rows):
    bits = np.zeros(13, np.uint8)
    bits[12] = 1
    kernels.mark_rows(bits, np.array(rows, np.int64))
    assert np.flatnonzero(np.unpackbits(bits)).tolist() == sorted({*rows, 103})


def test_a_row_outside_of_the_bits_is_refused(kernels):
    with pytest.raises(IndexError):
        kernels.mark_rows(np.zeros(2, np.uint8), np.array([16]))
