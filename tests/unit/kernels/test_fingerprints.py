"""Fingerprints of rows are those of Python's own integers, and no small change of a row leaves its fingerprint as it was."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from dist_export.kernels.numpy_fingerprints import fold_blocks
from tests.support.kernels import IMPLEMENTATIONS, TWIN, open_kernels
from tests.support.properties import examples

PROPERTY = examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
MASK = (1 << 64) - 1
WIDTHS = [*range(1, 18), 23, 24, 31, 32, 64, 72, 100, 255, 256]


def mix(state: int) -> int:
    state = state * 0xBF58476D1CE4E5B9 & MASK
    return (state ^ state >> 32) * 0x94D049BB133111EB & MASK


def fingerprint_one(slots: list[bytes]) -> int:
    """The definition, for one row."""
    state = 0x9E3779B97F4A7C15
    for slot in slots:
        state = mix(state ^ len(slot))
        for byte in range(0, len(slot), 8):
            state = mix(state ^ int.from_bytes(slot[byte : byte + 8], "little"))
    state = mix(state ^ state >> 32)
    return state ^ state >> 32


def fingerprint(kernels, *slots):
    state = kernels.start_fingerprints(len(slots[0]))
    for slot in slots:
        kernels.fold_slot(state, slot)
    return kernels.finish_fingerprints(state)


def bytes_of(values):
    """The bytes of rows of values, as they are written."""
    return np.ascontiguousarray(values).view(np.uint8)


def random_rows(count, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, width), np.uint8)


def flip(row, bits):
    """Return a row for each row of ``bits``, in which these bits differ from ``row``; the row itself comes first."""
    flips = np.zeros((1 + len(bits), 8 * len(row)), np.uint8)
    np.add.at(flips, (np.arange(1, 1 + len(bits))[:, None], bits), 1)
    return row ^ np.packbits(flips, axis=1, bitorder="little")


def all_differ(fingerprints):
    return len(np.unique(fingerprints)) == len(fingerprints)


def choose(numbers, count):
    return np.array(list(itertools.combinations(numbers, count)))


@PROPERTY
@given(st.lists(st.sampled_from(WIDTHS), max_size=4), st.integers(0, 20), st.integers(0, 1 << 32))
def test_fingerprints_are_those_of_the_definition(kernels, widths, count, seed):
    slots = [random_rows(count, width, seed + number) for number, width in enumerate(widths)]
    state = kernels.start_fingerprints(count)
    for slot in slots:
        kernels.fold_slot(state, slot)
    found = kernels.finish_fingerprints(state)
    assert (found.dtype, found.shape) == (np.uint64, (count,))
    assert found.tolist() == [fingerprint_one([slot[row].tobytes() for slot in slots]) for row in range(count)]


def test_some_fingerprints_are_known(kernels):
    """Packages hold fingerprints, so their definition must stay as it is."""
    assert kernels.finish_fingerprints(kernels.start_fingerprints(1)).tolist() == [6662693382782705028]
    row = np.arange(1, 13, dtype=np.uint8)[None]
    assert fingerprint(kernels, row).tolist() == [3999719009437039500]
    assert fingerprint(kernels, row, row[:, :1].copy()).tolist() == [4150889141465761225]
    assert fingerprint(kernels, bytes_of(np.array([[1.0, -2.5]], np.float32))).tolist() == [5140432216080494128]


@pytest.mark.parametrize("width", [1, 3, 8, 13, 32, 72])
def test_each_bit_counts(kernels, width):
    assert all_differ(fingerprint(kernels, flip(random_rows(1, width)[0], np.arange(8 * width)[:, None])))


@pytest.mark.parametrize("row", [np.zeros(36, np.uint8), random_rows(1, 36)[0]], ids=["zeros", "random"])
def test_two_bits_anywhere_count(kernels, row):
    assert all_differ(fingerprint(kernels, flip(row, choose(range(288), 2))))


@pytest.mark.parametrize("bits", [8, 16, 32, 64])
@pytest.mark.parametrize("row", [np.zeros(128, np.uint8), random_rows(1, 128)[0]], ids=["zeros", "random"])
def test_signs_do_not_cancel_each_other(kernels, bits, row):
    """Of values of each size: one, two, three and four signs change."""
    signs = range(bits - 1, bits * 16, bits)
    flipped = [fingerprint(kernels, flip(row, choose(signs, count))[count > 1 :]) for count in range(1, 5)]
    assert all_differ(np.concatenate(flipped))


def test_all_patterns_of_signs_differ(kernels):
    patterns = np.arange(1 << 14)[:, None] >> np.arange(14) & 1
    assert all_differ(fingerprint(kernels, bytes_of(np.where(patterns, np.float32(-0.0), np.float32(0.0)))))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_equal_columns_in_two_positions_do_not_cancel_each_other(kernels, dtype):
    """The same change in two columns, which hold the same."""
    changes = (1 << np.arange(dtype().itemsize * 8, dtype=np.uint64)).astype(dtype)
    rows = [np.full((1, 12), 7, dtype)]
    for one, other in itertools.combinations(range(12), 2):
        changed = np.full((len(changes), 12), 7, dtype)
        changed[:, one] ^= changes
        changed[:, other] ^= changes
        rows.append(changed)
    assert all_differ(fingerprint(kernels, bytes_of(np.concatenate(rows))))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_positions_in_a_row_count(kernels, dtype):
    """Any two values change places, and the row is rotated."""
    row = np.arange(1, 17, dtype=dtype)
    rows = [np.roll(row, step) for step in range(len(row))]
    for one, other in itertools.combinations(range(16), 2):
        rows.append(row.copy())
        rows[-1][[one, other]] = row[[other, one]]
    assert all_differ(fingerprint(kernels, bytes_of(np.stack(rows))))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_order_of_slots_counts(kernels, width):
    one, other = random_rows(30, width), random_rows(30, width, 1)
    assert not (fingerprint(kernels, one, other) == fingerprint(kernels, other, one)).any()


def test_where_a_slot_ends_counts(kernels):
    """The same bytes in one slot, in two at each boundary, and in three."""
    row = random_rows(1, 40)
    cut = [fingerprint(kernels, row)]
    for first in range(1, 40):
        cut.append(fingerprint(kernels, row[:, :first].copy(), row[:, first:].copy()))
        for second in range(first + 1, 40):
            pieces = (row[:, :first].copy(), row[:, first:second].copy(), row[:, second:].copy())
            cut.append(fingerprint(kernels, *pieces))
    assert all_differ(np.concatenate(cut))


@pytest.mark.parametrize("row", [np.zeros((1, 40), np.uint8), np.pad(random_rows(1, 8), ((0, 0), (0, 32)))])
def test_zeros_at_the_end_count(kernels, row):
    found = [fingerprint(kernels, row[:, :width].copy()) for width in range(1, 41)]
    found += [fingerprint(kernels, row, np.zeros((1, width), np.uint8)) for width in range(1, 41)]
    found += [fingerprint(kernels, *[row] * count) for count in range(3, 9)]
    assert all_differ(np.concatenate(found))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_values_that_compare_as_equal_count_by_their_bits(kernels, dtype):
    zero = np.zeros((1, 8), dtype)
    assert fingerprint(kernels, bytes_of(zero)) != fingerprint(kernels, bytes_of(-zero))
    bits = np.dtype(f"u{dtype().itemsize}").type
    quiet = np.full((1, 8), np.nan, dtype).view(bits)
    payloads = np.repeat(quiet, 100, axis=0)
    payloads[:, 3] |= np.arange(100).astype(bits)
    assert np.isnan(payloads.view(dtype)).all()
    assert all_differ(fingerprint(kernels, bytes_of(payloads)))


@pytest.mark.parametrize("width", [4, 8, 13, 32])
def test_one_bit_changes_half_of_the_fingerprint(kernels, width):
    rows = random_rows(500, width)
    before = fingerprint(kernels, rows)
    for bit in range(8 * width):
        after = rows.copy()
        after[:, bit // 8] ^= 1 << (bit % 8)
        changed = (before ^ fingerprint(kernels, after)).view(np.uint8).reshape(-1, 8)
        shares = np.unpackbits(changed, axis=1).mean(axis=0)
        assert abs(shares.mean() - 0.5) < 0.02
        assert (abs(shares - 0.5) < 0.13).all(), f"bit {bit}: {shares}"


@pytest.mark.parametrize("width", [1, 2, 7, 8, 11, 32, 72])
@pytest.mark.parametrize("offset", [0, 1, 4, 7])
def test_rows_at_any_address_in_chunks_of_any_size_have_the_same_fingerprints(kernels, width, offset):
    count = 45
    memory = random_rows(1, offset + count * width)[0]
    rows = memory[offset:].reshape(count, width)
    memory.flags.writeable = False
    expected = [fingerprint_one([row.tobytes()] * 2) for row in rows]
    for step in (1, 2, 3, 4, 5, 44, 45):
        found = [fingerprint(kernels, *[rows[first : first + step]] * 2) for first in range(0, count, step)]
        assert np.concatenate(found).tolist() == expected


@pytest.mark.parametrize("width", [1, 8, 13])
def test_numpy_folds_blocks_of_rows_as_it_folds_them_at_once(width):
    rows = random_rows(1000, width)
    state = TWIN.start_fingerprints(len(rows))
    fold_blocks(state, rows, step=64)
    assert np.array_equal(TWIN.finish_fingerprints(state), fingerprint(TWIN, rows))


def test_numpy_needs_little_memory_however_many_the_rows_are():
    rows, state = np.ones((200_000, 13), np.uint8), TWIN.start_fingerprints(200_000)
    tracemalloc.start()
    TWIN.fold_slot(state, rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * (1 << 14) * 6, "a few arrays of 16,384 rows"


def test_slots_can_be_folded_in_after_a_fingerprint_was_returned(kernels):
    one, other = random_rows(9, 12), random_rows(9, 5)
    state = kernels.start_fingerprints(9)
    kernels.fold_slot(state, one)
    assert np.array_equal(kernels.finish_fingerprints(state), fingerprint(kernels, one))
    kernels.fold_slot(state, other)
    assert np.array_equal(kernels.finish_fingerprints(state), fingerprint(kernels, one, other))


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_arrays_that_do_not_fit_are_refused(name):
    kernels = open_kernels(name)
    state, rows = kernels.start_fingerprints(4), random_rows(4, 6)
    for wrong in (rows.view(np.int8), rows.astype(np.float32)):
        with pytest.raises(TypeError, match="cannot be folded into a state of uint64"):
            kernels.fold_slot(state, wrong)
    with pytest.raises(TypeError, match="uint8 cannot be folded into a state of int64"):
        kernels.fold_slot(state.view(np.int64), rows)
    with pytest.raises(TypeError, match="one contiguous array"):
        kernels.fold_slot(state, rows[:, ::2])
    with pytest.raises(TypeError, match="contiguous state"):
        kernels.fold_slot(kernels.start_fingerprints(8)[::2], rows)
    for wrong in (rows[:3], rows.reshape(-1), rows[:, :0].copy(), rows.reshape(4, 2, 3)):
        with pytest.raises(ValueError, match=r"cannot be folded into a state of \(4,\)"):
            kernels.fold_slot(state, wrong)
    assert np.array_equal(state, kernels.start_fingerprints(4)), "nothing was changed"
    with pytest.raises(TypeError, match=r"int64 instead of uint64|right_shift"):
        kernels.finish_fingerprints(state.view(np.int64))
