"""Figures of parity: absolute, relative, and units in the last place."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_export.archive.output_diff import compare

NAN, INF = float("nan"), float("inf")


def differ(expected, found, dtype=torch.float32, **settings):
    tensors = [torch.tensor(values, dtype=dtype) for values in (expected, found)]
    return compare(*tensors, **{"atol": 1e-6, "rtol": 1e-5, **settings})


@pytest.mark.parametrize(
    ("eager", "written", "largest", "is_close"),
    [
        (torch.tensor([True, False]), torch.tensor([True, True]), 1.0, False),
        (torch.tensor([5]), torch.tensor([7]), 2.0, False),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), 0.0, True),
        (torch.tensor([0.0]), torch.tensor([1e-7]), 1e-7, True),
        (torch.ones(0), torch.ones(0), 0.0, True),
        (torch.tensor(2.0), torch.tensor(3.0), 1.0, False),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), 1.0, False),
    ],
)
def test_comparisons(eager, written, largest, is_close) -> None:
    worst = compare(eager, written, atol=1e-6, rtol=1e-5)
    assert worst.max_abs == pytest.approx(largest)
    assert worst.max_rel <= max(1.0, worst.max_abs)
    assert worst.is_close is is_close


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_neighbours_are_one_unit_apart(dtype) -> None:
    one = torch.ones(1, dtype=dtype)
    for value in (one, -one, torch.zeros_like(one), torch.full_like(one, torch.finfo(dtype).tiny)):
        up = torch.nextafter(value.float(), value.float() + 1).to(dtype) if dtype == torch.float32 else None
        if up is None:
            bits = {torch.float64: torch.int64, torch.float16: torch.int16, torch.bfloat16: torch.int16}[dtype]
            up = (value.view(bits) + 1).view(dtype)
        assert compare(value, up, atol=0, rtol=0).max_ulp == 1


def test_zeros_of_both_signs_are_one_and_the_smallest_numbers_two_apart() -> None:
    assert differ([0.0], [-0.0]).max_ulp == 0
    tiny = math.ulp(0.0)
    assert differ([tiny], [-tiny], torch.float64).max_ulp == 2


def test_numbers_far_apart_do_not_overflow() -> None:
    largest = torch.finfo(torch.float64).max
    found = differ([1.0, -largest], [1.0, largest], torch.float64)
    assert found.max_ulp == 2 * 0x7FEFFFFFFFFFFFFF
    assert found.row == 1


def test_a_nan_beside_a_number_is_as_far_as_can_be() -> None:
    found = differ([1.0, 2.0], [1.0, NAN])
    assert found.max_ulp == 1 << 32
    assert not found.is_close
    assert found.row == 1
    assert differ([INF, -INF, NAN], [INF, -INF, NAN]).max_ulp == 0
    assert not differ([INF], [-INF]).is_close


@given(st.lists(st.tuples(st.floats(), st.floats()), min_size=1, max_size=20))
def test_units_are_those_that_numpy_counts(pairs) -> None:
    """By the definition: bits as sign and magnitude, one pair at a time."""

    def place(value: float) -> int:
        bits = int(np.float64(value).view(np.int64))
        return bits if bits >= 0 else -(bits & 0x7FFFFFFFFFFFFFFF)

    expected = 0
    for one, other in pairs:
        if math.isnan(one) and math.isnan(other):
            continue
        expected = max(expected, 1 << 64 if math.isnan(one) or math.isnan(other) else abs(place(one) - place(other)))
    assert differ([one for one, _ in pairs], [other for _, other in pairs], torch.float64).max_ulp == expected
