"""Casts of rows against torch, over all bit patterns where there are few enough, and FBGEMM's own layout of int8 rows."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dist_export.formats.dtypes import DTYPES
from dist_export.formats.row_encodings import (
    BF16,
    F16,
    F32,
    F64,
    INT8_ROWWISE,
    LARGEST,
    U8,
    RowCast,
    decode_int8,
    encode_values,
    widen_bfloat16,
)
from tests.support.properties import examples

NUMPY = {F64: np.float64, F32: np.float32, F16: np.float16, BF16: np.uint16}
TORCH = {F64: torch.float64, F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
PAIRS = [(F32, F16), (F32, BF16), (F16, BF16), (BF16, F16), (F64, F32), (F16, F32), (BF16, F32)]


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Return the bits of a 16-bit tensor, or the bytes of another."""
    flat = tensor.contiguous().reshape(-1)
    return (flat.view(torch.int16) if tensor.element_size() == 2 else flat).numpy().view(np.uint8)


def cast_flat(values: np.ndarray, source: int, target: int) -> tuple[np.ndarray, object]:
    """Cast flat values as rows of one; return what was written, as bits where numpy lacks the dtype, and the outcome."""
    cast = RowCast(source, target, "", 1)
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), cast.source_bytes)
    out = np.empty((len(values), cast.target_bytes), np.uint8)
    outcome = cast.encode_into(out, rows)
    return out.reshape(-1).view(DTYPES[target].numpy), outcome


def every_float32_that_matters() -> np.ndarray:
    """All signs and exponents with the fractions on which rounding turns, and a million random patterns."""
    edges = [0, 1, 2, 3, 0x7FFFFF, 0x7FFFFE]
    for bit in range(23):
        edges += [1 << bit, (1 << bit) - 1, (1 << bit) + 1, 0x7FFFFF ^ (1 << bit), 3 << bit & 0x7FFFFF]
    fractions = np.unique(np.array(edges, np.uint32))
    upper = np.arange(512, dtype=np.uint32) << 23
    random = np.random.default_rng(0).integers(0, 1 << 32, 1_000_000, np.uint32)
    return np.concatenate([(upper[:, None] | fractions).reshape(-1), random]).view(np.float32)


def all_values(code: int) -> np.ndarray:
    if code in (F16, BF16):
        return np.arange(1 << 16, dtype=np.uint16).view(NUMPY[code])
    singles = every_float32_that_matters()
    with np.errstate(invalid="ignore", over="ignore"):
        return singles if code == F32 else np.concatenate([singles.astype(np.float64), singles * 1e30, singles / 3e7])


def as_torch(values: np.ndarray, code: int) -> torch.Tensor:
    if code == BF16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(values)


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_all_patterns_are_cast_as_torch_casts_them(source: int, target: int) -> None:
    values = all_values(source)
    tensor = as_torch(values, source)
    expected = tensor.to(TORCH[target])
    found, outcome = cast_flat(values, source, target)
    is_nan = torch.isnan(tensor).numpy()
    is_beyond = torch.isinf(expected).numpy()
    fits = ~is_nan & ~is_beyond
    width = found.itemsize
    found_bits, expected_bits = (b.view(np.uint8).reshape(-1, width) for b in (found, bits_of(expected)))
    assert (found_bits[fits] == expected_bits[fits]).all()
    written = as_torch(np.ascontiguousarray(found), target)
    assert (torch.isnan(written).numpy() == is_nan).all()
    assert (np.signbit(written.double().numpy()) == np.signbit(tensor.double().numpy())).all()
    clamped = written[torch.from_numpy(is_beyond)].double().abs()
    assert (clamped == LARGEST[target]).all()
    assert (outcome.nans, outcome.out_of_range) == (is_nan.sum(), is_beyond.sum())
    assert outcome.first == (-1 if fits.all() else np.flatnonzero(~fits)[0])
    errors = np.abs(written.double().numpy() - tensor.double().numpy())[fits]
    assert outcome.worst == errors.max()
    assert outcome.total == pytest.approx(math.fsum(errors.tolist()), rel=1e-12)


def test_float64_is_rounded_once() -> None:
    """By way of float32 these would come out one too high, as torch has them."""
    tie = 1 + 2.0**-11
    values = np.array([tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40, tie, 1 + 3 * 2.0**-11], np.float64)
    found, _ = cast_flat(values, F64, F16)
    assert found.tolist() == values.astype(np.float16).tolist()
    assert found[0] == 1 + 2.0**-10
    assert found[1] == 1.0
    random = np.random.default_rng(1)
    many = random.standard_normal(300_000) * 10.0 ** random.integers(-9, 5, 300_000)
    many = many[np.abs(many) < 65000]
    found, outcome = cast_flat(many, F64, F16)
    assert found.tobytes() == many.astype(np.float16).tobytes()
    assert outcome.worst == np.abs(many - found.astype(np.float64)).max()
    lower = many.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    tie = lower.view(np.float32).astype(np.float64)
    half = np.abs((lower + np.uint32(0x8000)).view(np.float32).astype(np.float64) - tie)
    above = tie + np.copysign(half * (1 + 1e-12), tie)
    found, _ = cast_flat(above, F64, BF16)
    assert (found == (lower >> 16) + 1).all()
    below = tie + np.copysign(half * (1 - 1e-12), tie)
    found, _ = cast_flat(below, F64, BF16)
    assert (found == lower >> 16).all()


@pytest.mark.parametrize(("source", "target"), [*PAIRS, (F64, F16), (F64, BF16)])
def test_what_is_cast_back_is_what_was_written(source: int, target: int) -> None:
    random = np.random.default_rng(2)
    values = random.standard_normal((50, 3)) * 100
    cast = RowCast(source, target, "", 3)
    tensor = torch.from_numpy(values).to(TORCH[source])
    rows = bits_of(tensor).reshape(50, cast.source_bytes)
    back = cast.decode(cast.encode(rows))
    expected = tensor.to(TORCH[target]).to(TORCH[source])
    assert back.tobytes() == bits_of(expected).tobytes()
    again = cast.decode(cast.encode(back)).tobytes() == back.tobytes()
    assert again


def prepack(rows: np.ndarray) -> np.ndarray:
    """FBGEMM's rows, as plain torch makes them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(rows)).numpy()


def reference(row: np.ndarray) -> bytes:
    """One row of the layout, value by value."""
    low, high = np.float32(min(row.tolist())), np.float32(max(row.tolist()))
    spread = np.float32(high - low)
    inverse = np.float32(255) / np.float32(spread + np.float32(1e-8))
    q = bytes(round(float(np.float32(np.float32(v - low) * inverse))) for v in row)
    return q + np.array([np.float32(spread / np.float32(255)), low], "<f4").tobytes()


INT8_ROWS = {
    "normal": np.random.default_rng(3).standard_normal((200, 16)) * 0.05,
    "odd width": np.random.default_rng(4).standard_normal((50, 7)),
    "one value": np.random.default_rng(5).standard_normal((50, 1)),
    "constant": np.full((3, 5), 0.25),
    "zeros": np.zeros((2, 9)),
    "tiny": np.random.default_rng(6).standard_normal((20, 8)) * 1e-8,
    "large": np.random.default_rng(7).standard_normal((20, 8)) * 1e30,
    "wide": np.random.default_rng(8).standard_normal((3, 300)),
    "subnormal": np.random.default_rng(9).standard_normal((5, 8)) * 1e-40,
    "very wide": np.random.default_rng(10).standard_normal((2, 40_000)),
    "skewed": np.linspace(-1, 1000, 40).reshape(4, 10) ** 3,
}


@pytest.mark.parametrize("case", INT8_ROWS)
def test_int8_rows_are_fbgemms_bit_for_bit(case: str) -> None:
    values = INT8_ROWS[case].astype(np.float32)
    cast = RowCast(F32, U8, INT8_ROWWISE, values.shape[1])
    found = cast.encode(values.view(np.uint8))
    assert found.shape == (len(values), values.shape[1] + 8)
    assert found.tobytes() == prepack(values).tobytes()
    assert found.tobytes() == b"".join(reference(row) for row in values)
    decoded = decode_int8(found)
    unpacked = torch.ops.quantized.embedding_bag_byte_unpack(torch.from_numpy(found)).numpy()
    # a reader may multiply and add with one rounding or two
    np.testing.assert_allclose(decoded, unpacked, rtol=1e-6, atol=2e-7 * np.abs(values).max())
    assert cast.decode(found).tobytes() == decoded.tobytes()


def test_the_documented_row_of_fbgemm() -> None:
    """The example in words: 4 values, then scale (max - min) / 255, then min."""
    row = np.array([[-1.0, 0.0, 0.5, 1.0]], np.float32)
    found = RowCast(F32, U8, INT8_ROWWISE, 4).encode(row.view(np.uint8))[0]
    assert found[:4].tolist() == [0, 128, 191, 255]
    assert found[4:].view("<f4").tolist() == [np.float32(2) / np.float32(255), -1.0]


@pytest.mark.parametrize("source", [F64, F16, BF16])
def test_int8_from_other_floats_goes_by_way_of_float32(source: int) -> None:
    tensor = torch.from_numpy(INT8_ROWS["normal"]).to(TORCH[source])
    cast = RowCast(source, U8, INT8_ROWWISE, 16)
    rows = bits_of(tensor).reshape(len(tensor), cast.source_bytes)
    out = np.empty((len(tensor), cast.target_bytes), np.uint8)
    outcome = cast.encode_into(out, rows)
    assert out.tobytes() == prepack(tensor.float().numpy()).tobytes()
    errors = np.abs(tensor.double().numpy() - decode_int8(out).astype(np.float64))
    assert outcome.worst == errors.max()
    assert outcome.total == pytest.approx(errors.sum(), rel=1e-12)
    back = cast.decode(out)
    assert back.tobytes() == bits_of(torch.from_numpy(decode_int8(out)).to(TORCH[source])).tobytes()


def test_what_int8_cannot_hold_is_counted_and_clamped() -> None:
    values = np.ones((6, 4), np.float32)
    values[1, 2] = np.nan
    values[2] = [np.inf, 1, 2, 3]
    values[3] = [-3e38, 3e38, 0, 1]
    values[5] = np.nan
    cast = RowCast(F32, U8, INT8_ROWWISE, 4)
    out = np.empty((6, 12), np.uint8)
    outcome = cast.encode_into(out, values.view(np.uint8))
    assert (outcome.nans, outcome.out_of_range, outcome.first) == (5, 3, 1)
    assert math.isfinite(outcome.worst)
    decoded = decode_int8(out)
    assert np.isfinite(decoded).all()
    assert decoded[0].tolist() == [1, 1, 1, 1]
    assert decoded[1, 2] == 0
    assert decoded[5].tolist() == [0, 0, 0, 0]
    assert decoded[2, 0] == pytest.approx(1.7e38)
    assert decoded[3, :2].tolist() == pytest.approx([-1.7e38, 1.7e38])


def test_rows_wider_than_a_block() -> None:
    values = np.random.default_rng(0).standard_normal((2, 70_000)).astype(np.float32)
    found = RowCast(F32, F16, "", 70_000).encode(values.view(np.uint8))
    assert found.tobytes() == values.astype(np.float16).tobytes()


def test_special_values_of_halves() -> None:
    values = np.array(
        [65504, 65519.996, 65520, -65520, 2.0**-24, 2.0**-25, 2.0**-25 * 1.0001, -0.0, np.inf], np.float32
    )
    found, outcome = cast_flat(values, F32, F16)
    assert found.tolist() == [65504, 65504, 65504, -65504, 2.0**-24, 0, 2.0**-24, 0, 65504]
    assert np.signbit(found[7])
    assert (outcome.nans, outcome.out_of_range, outcome.first) == (0, 3, 2)
    found, _ = cast_flat(np.array([-np.nan, np.nan], np.float32), F32, F16)
    assert np.isnan(found).all()
    assert np.signbit(found).tolist() == np.signbit(np.array([-np.nan, np.nan], np.float32)).tolist()


@examples(200)
@given(
    values=arrays.arrays(np.float32, st.tuples(st.integers(1, 20), st.integers(1, 9)), elements=st.floats(width=32)),
    target=st.sampled_from([(F16, ""), (BF16, ""), (U8, INT8_ROWWISE)]),
    cut=st.integers(0, 20),
)
def test_rows_are_cast_each_for_itself(values: np.ndarray, target: tuple[int, str], cut: int) -> None:
    cast = RowCast(F32, *target, values.shape[1])
    rows = values.view(np.uint8)
    whole = cast.encode(rows)
    assert np.concatenate([cast.encode(rows[:cut]), cast.encode(rows[cut:])]).tobytes() == whole.tobytes()
    out = np.empty_like(whole)
    outcome = cast.encode_into(out, rows)
    largest = 1.7e38 if target[1] else LARGEST[target[0]]
    fits = np.abs(values.astype(np.float64)) <= largest
    assert outcome.nans == np.isnan(values).sum()
    assert (
        outcome.out_of_range
        >= (np.abs(values.astype(np.float64)) > 65520 if target[0] == F16 else np.isinf(values)).sum()
    )
    decoded = cast.decode(out).view(np.float32).reshape(values.shape)
    clear = fits.all(axis=1)
    low, high = values[clear].min(axis=1, keepdims=True, initial=0), values[clear].max(axis=1, keepdims=True, initial=0)
    if target[1] and clear.any():
        step = (high.astype(np.float64) - low) / 255 + 1e-7 * np.maximum(np.abs(low), np.abs(high)) + 1e-8
        assert (np.abs(decoded[clear].astype(np.float64) - values[clear]) <= step).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_default_row_in_bfloat16_is_rounded_once(sign: int) -> None:
    """Just above the middle of two bfloat16; float32 has only the middle itself, which would go to the even one."""
    (bits,) = encode_values([sign * (1 + 2**-8 + 2**-40)], BF16).view("<u2").tolist()
    assert widen_bfloat16(np.array([bits], np.uint16)).tolist() == [sign * (1 + 2**-7)]
