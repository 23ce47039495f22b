"""Rows are sorted by target and keep their order within one; rows that are dropped go nowhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.support.kernels import open_kernels
from tests.support.properties import examples

PROPERTY = examples(200, suppress_health_check=[HealthCheck.function_scoped_fixture])
WIDTHS = [1, 2, 3, 4, 8, 16, 24, 31, 32, 33, 64, 72, 128, 200, 256, 1000, 1024, 1025, 2048]


def move(kernels, owners, kept, num_targets, width):
    rows = np.random.default_rng(width).integers(0, 256, (len(owners), width), np.uint8)
    order, counts = kernels.order_rows(owners, kept, num_targets)
    out = np.full(int(counts.sum()) * width, 7, np.uint8)
    kernels.move_rows(order, rows.reshape(-1), width, out)
    return rows, counts, out.reshape(-1, width)


@PROPERTY
@given(st.data(), st.sampled_from([np.uint8, np.uint16, np.int32]), st.sampled_from(WIDTHS))
def test_rows_go_to_their_targets_in_their_order(kernels, data, dtype, width):
    num_targets = data.draw(st.integers(1, 250 if dtype == np.uint8 else 300))
    owners = np.array(data.draw(st.lists(st.integers(0, num_targets - 1), max_size=50)), dtype)
    kept = None
    if data.draw(st.booleans()):
        kept = np.array(
            sorted(data.draw(st.sets(st.sampled_from(range(len(owners)))))) if len(owners) else [], np.int64
        )
    rows, counts, out = move(kernels, owners, kept, num_targets, width)
    chosen = list(range(len(owners))) if kept is None else kept.tolist()
    expected = sorted(chosen, key=lambda row: int(owners[row]))  # a stable sort
    assert counts.tolist() == [sum(int(owners[row]) == target for row in chosen) for target in range(num_targets)]
    assert np.array_equal(out, rows[np.array(expected, np.int64)])


@pytest.mark.parametrize("width", WIDTHS)
def test_many_rows_of_any_width_are_moved(kernels, width):
    random = np.random.default_rng(0)
    owners = random.integers(0, 5, 3000).astype(np.uint8)
    for kept in (None, np.flatnonzero(random.random(3000) < 0.7)):
        rows, counts, out = move(kernels, owners, kept, 6, width)
        chosen = np.arange(3000) if kept is None else kept
        expected = chosen[np.argsort(owners[chosen], kind="stable")]
        assert counts.tolist() == np.bincount(owners[chosen], minlength=6).tolist()
        assert np.array_equal(out, rows[expected])


@pytest.mark.parametrize("level", ["plain C", "AVX2"])
def test_arrays_that_do_not_fit_are_refused(level):
    kernels = open_kernels(level)
    owners = np.array([0, 2, 1], np.uint8)
    with pytest.raises(ValueError, match="not all are below 2"):
        kernels.order_rows(owners, None, 2)
    with pytest.raises(ValueError, match="rows that are kept are below 3"):
        kernels.order_rows(owners, np.array([3]), 3)
    order, _ = kernels.order_rows(owners, None, 3)
    with pytest.raises(ValueError, match="3 rows of 4 bytes do not fit into 11 bytes"):
        kernels.move_rows(order, np.zeros(12, np.uint8), 4, np.zeros(11, np.uint8))
    with pytest.raises(ValueError, match="11 values instead of 12"):
        kernels.move_rows(order, np.zeros(11, np.uint8), 4, np.zeros(12, np.uint8))
