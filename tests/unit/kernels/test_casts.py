"""Casts have the bits, the counts and the errors of numpy, whatever the values are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from tests.support.kernels import TWIN, open_kernels
from tests.support.properties import examples

PROPERTY = examples(300, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    65504.0,
    65519.9,
    65520.0,
    -65520.0,
    6e-8,
    2.9e-8,
    3e-8,
    1e-45,
    -1e-40,
    3.3895e38,
    3.39e38,
]
SPECIAL += [1.7e38, 1.8e38, -1.8e38, float("inf"), float("-inf"), float("nan"), 2049.0, 2051.0, 1.00390625, 1.01171875]
VALUE = st.floats(width=32) | st.sampled_from(SPECIAL) | st.floats(-1, 1, width=32)
OUT = {"F16": np.float16, "BF16": np.uint16, "F32": np.float32}
IN = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def all_halves() -> np.ndarray:
    """Return float32 around every float16 and between each two: the neighbours in float32 of each tie, too."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    bits = halves.view(np.uint32)
    steps = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x7FFF, 0x8000, 0x8001], np.uint32)
    return (bits[:, None] + steps).reshape(-1).view(np.float32)


def cast(kernels, values, source, target, dim):
    out = np.empty(len(values), OUT[target])
    outcome = kernels.cast_floats(out, values, source=source, target=target, dim=dim)
    return out.view(np.uint8).tobytes(), outcome


def encode(kernels, values, source, dim):
    out = np.empty((len(values) // dim, dim + 8), np.uint8)
    return (
        out.tobytes() if not len(out) else None,
        kernels.encode_int8(out, values, source=source, dim=dim),
        out.tobytes(),
    )


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_every_pattern_is_cast_as_numpy_casts_it(kernels, target):
    values = all_halves()
    with np.errstate(all="ignore"):
        assert cast(kernels, values, "F32", target, 1) == cast(TWIN, values, "F32", target, 1)
        finite = values[np.isfinite(values)]
        small = finite[np.abs(finite) < 60_000]
        assert cast(kernels, small, "F32", target, 1) == cast(TWIN, small, "F32", target, 1)


@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_random_bits_are_cast_as_numpy_casts_them(kernels, target):
    bits = np.random.default_rng(5).integers(0, 1 << 32, 300_001, np.uint32)
    assert cast(kernels, bits.view(np.float32), "F32", target, 7) == cast(TWIN, bits.view(np.float32), "F32", target, 7)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 15, 127, 128, 129, 136, 200, 255, 256, 257, 1000, 4099, 32_768])
@pytest.mark.parametrize("target", ["F16", "BF16"])
def test_sums_of_errors_are_numpys_for_any_number_of_values(kernels, count, target):
    values = np.random.default_rng(count).normal(size=count).astype(np.float32)
    found, expected = cast(kernels, values, "F32", target, 1), cast(TWIN, values, "F32", target, 1)
    assert found == expected
    errors = found[1]
    assert errors.total > 0 or count == 0


@PROPERTY
@given(st.lists(VALUE, max_size=300), st.sampled_from(sorted(IN)), st.sampled_from(sorted(OUT)), st.integers(1, 9))
def test_hostile_values_are_cast_as_numpy_casts_them(kernels, numbers, source, target, dim):
    with np.errstate(all="ignore"):
        values = np.array(numbers, np.float64)
        values = (
            values.astype(np.float32).view(np.uint16)[1::2].copy() if source == "BF16" else values.astype(IN[source])
        )
        assert cast(kernels, values, source, target, dim) == cast(TWIN, values, source, target, dim)


@PROPERTY
@given(st.data(), st.integers(1, 20), st.integers(0, 5), st.sampled_from(sorted(IN)))
def test_hostile_rows_become_int8_as_numpy_makes_them(kernels, data, dim, rows, source):
    numbers = data.draw(st.lists(VALUE, min_size=rows * dim, max_size=rows * dim))
    with np.errstate(all="ignore"):
        values = np.array(numbers, np.float64)
        values = (
            values.astype(np.float32).view(np.uint16)[1::2].copy() if source == "BF16" else values.astype(IN[source])
        )
        assert encode(kernels, values, source, dim) == encode(TWIN, values, source, dim)


@pytest.mark.parametrize("dim", [1, 2, 7, 8, 9, 16, 31, 64, 200])
@pytest.mark.parametrize("rows", [1, 7, 9, 130, 1000])
def test_rows_of_any_size_become_int8(kernels, dim, rows):
    values = np.random.default_rng(dim * rows).normal(size=rows * dim).astype(np.float32)
    values[:: 3 * dim + 1] = 0
    assert encode(kernels, values, "F32", dim) == encode(TWIN, values, "F32", dim)


def test_a_minimum_of_zero_has_the_sign_of_the_first_zero(kernels):
    zero, minus = [0.0], [-0.0]
    for row, bias in (
        ((zero + minus) * 8, 0),
        ((minus + zero) * 8, 1),
        (zero * 8 + minus * 8, 0),
        (minus * 8 + zero * 8, 1),
        (zero + minus * 9, 0),
        ([3.0, -0.0, 0.0] * 5, 1),
        ([3.0, 0.0, -0.0] * 5, 0),
    ):
        values = np.array(row, np.float32)
        out = np.empty((1, len(row) + 8), np.uint8)
        kernels.encode_int8(out, values, source="F32", dim=len(row))
        assert np.signbit(out[0, -4:].view(np.float32))[0] == bias
        assert not np.signbit(out[0, -8:-4].view(np.float32))[0], "the scale is never -0"


@pytest.mark.parametrize("dim", [0, 1, 3, 8, 33, 64])
def test_int8_rows_are_decoded(kernels, dim):
    random = np.random.default_rng(dim)
    rows = random.integers(0, 256, (500, dim + 8), np.uint8)
    found, expected = kernels.decode_int8(rows), TWIN.decode_int8(rows)
    assert (found.dtype, found.shape) == (np.float32, (500, dim))
    is_nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), is_nan)
    assert np.array_equal(found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))
    assert np.array_equal(kernels.decode_int8(rows[::2]), TWIN.decode_int8(rows[::2]), equal_nan=True)


@pytest.mark.parametrize("level", ["plain C", "AVX2"])
def test_arrays_that_do_not_fit_are_refused(level):
    kernels = open_kernels(level)
    values = np.zeros(16, np.float32)
    with pytest.raises(ValueError, match="16 values of 2 bytes do not fit into"):
        kernels.cast_floats(np.empty(15, np.float16), values, source="F32", target="F16", dim=4)
    with pytest.raises(ValueError, match="48 values of 1 bytes do not fit into"):
        kernels.encode_int8(np.empty((4, 11), np.uint8), values, source="F32", dim=4)
    with pytest.raises(ValueError, match="16 values instead of 20"):
        kernels.encode_int8(np.empty((5, 12), np.uint8), values, source="F32", dim=4)
    with pytest.raises(ValueError, match="rows of int8 have 7 bytes"):
        kernels.decode_int8(np.empty((5, 7), np.uint8))
