"""The row index as arrays: every id is found at its row, nothing else is, and crafted ids cannot make it slow."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.formats.row_index import (
    EMPTY,
    MOST_PROBES,
    SlotFiller,
    count_buckets,
    count_rows_at,
    encode_keys,
    find_fault,
    find_rows,
)
from dist_export.kernels.numpy_row_index import find_buckets, hash_ids
from dist_export.kernels.protocol import DamagedIndexError


def build(ids: np.ndarray, seed: int = 0, runs: int = 1) -> tuple[np.ndarray, int]:
    """Return slots and longest probe, from sorted keys that are divided into ``runs``."""
    keys = np.sort(encode_keys(ids, 0, seed))
    filler = SlotFiller(len(ids))
    slots = [piece for run in np.array_split(keys, runs) for piece in filler.add(run)]
    return np.concatenate([*slots, filler.finish()]), filler.longest_probe


def search(slots: np.ndarray, longest: int, ids: np.ndarray, sought: np.ndarray) -> list[int]:
    return find_rows(
        slots, ids, sought, num_slots=len(slots), num_rows=len(ids), seed=0, longest_probe=longest
    ).tolist()


def ids_with_hash(hashed: int, num_ids: int) -> np.ndarray:
    """Return different ids with this hash for seed 0: the steps of its definition, each undone."""
    inverse = np.uint64(pow(0xD6E8FEB86659FD93, -1, 1 << 64))
    mixed = np.uint64(hashed << 32) | np.arange(num_ids, dtype=np.uint64)
    mixed ^= (mixed >> np.uint64(29)) ^ (mixed >> np.uint64(58))
    for _ in range(2):
        mixed *= inverse
        mixed ^= mixed >> np.uint64(32)
    ids: np.ndarray = mixed.view(np.int64)
    return ids


INT64 = st.integers(-(1 << 63), (1 << 63) - 1)


@given(st.lists(INT64, min_size=1, max_size=300, unique=True), st.lists(INT64, max_size=50), st.integers(1, 9))
def test_a_dict_gives_the_same_rows(held: list[int], others: list[int], runs: int) -> None:
    ids = np.array(held, np.int64)
    slots, longest = build(ids, runs=runs)
    truth = {number: row for row, number in enumerate(held)}
    sought = [*held, *others]
    assert search(slots, longest, ids, np.array(sought, np.int64)) == [truth.get(number, -1) for number in sought]
    assert sorted(slots[slots != EMPTY].tolist()) == list(range(len(ids)))
    assert slots[-1] == EMPTY


@pytest.mark.parametrize("runs", [2, 3, 100])
def test_the_slots_do_not_depend_on_how_the_ids_are_divided(runs: int) -> None:
    ids = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, 200_000)
    whole, longest = build(ids)
    divided, again = build(ids, runs=runs)
    assert np.array_equal(whole, divided)
    assert longest == again


def test_rows_are_in_the_order_of_hash_and_row() -> None:
    ids = np.concatenate([np.arange(5_000), ids_with_hash(77_777, 50), np.arange(5_000, 6_000)])
    slots, _ = build(ids)
    full = slots[slots != EMPTY].astype(np.int64)
    assert full.tolist() == np.lexsort((np.arange(len(ids)), hash_ids(ids, 0))).tolist()
    assert np.flatnonzero(hash_ids(ids, 0) == 77_777).tolist() == list(range(5_000, 5_050))


@pytest.mark.parametrize(
    "ids",
    [
        np.arange(100_000),
        -np.arange(100_000),
        np.arange(100_000) * 65_536 + 7,
        (np.arange(100_000) << 40) | 5,
        np.arange(100_000) << 44,
    ],
    ids=["counted", "negative", "one slice", "field in the upper bits", "upper bits alone"],
)
def test_regular_ids_have_short_probes_and_few_bytes(ids: np.ndarray) -> None:
    slots, longest = build(ids)
    assert longest < 40
    assert slots.nbytes / len(ids) < 6


def test_a_part_of_any_size_has_buckets_in_order() -> None:
    hashed = np.array([0, 1, 1 << 31, (1 << 32) - 1], np.uint64)
    for num_rows in (1, 7, 1 << 20, (1 << 32) - 1):
        buckets = count_buckets(num_rows)
        assert find_buckets(hashed.copy(), buckets).tolist() == [
            int(number) * buckets >> 32 for number in hashed.tolist()
        ]


def test_crafted_ids_have_a_long_probe_for_one_seed_and_a_short_one_for_the_next() -> None:
    ids = ids_with_hash(77_777, 50_000)
    assert len(set(ids.tolist())) == 50_000
    _, longest = build(ids)
    assert longest == 49_999
    _, longest = build(ids, seed=1)
    assert longest < 40


def test_a_damaged_index_is_no_answer() -> None:
    ids = np.arange(1_000) * 7
    slots, longest = build(ids)
    beyond = np.where(slots != EMPTY, 1_000, slots).astype(np.uint32)
    with pytest.raises(DamagedIndexError, match="holds row 1,000, and the part has 1,000 rows"):
        search(beyond, longest, ids, ids)
    full = np.zeros(len(slots), np.uint32)  # no search ends at an empty slot
    with pytest.raises(DamagedIndexError, match="a search goes beyond them"):
        search(full, MOST_PROBES, ids, ids)
    cut = slots[: len(slots) // 2]
    with pytest.raises(DamagedIndexError, match="a search goes beyond them"):
        search(cut, longest, ids, ids)


def test_a_search_ends_after_the_longest_probe() -> None:
    ids = np.arange(1_000)
    slots = np.zeros(1_000_000, np.uint32)
    assert search(slots, 3, ids, np.array([5_000])) == [-1]


def test_rows_at_their_place_are_counted() -> None:
    ids = np.random.default_rng(1).permutation(10_000)
    slots, longest = build(ids)

    def count(slots: np.ndarray, longest: int) -> int:
        return sum(
            count_rows_at(
                slots,
                ids[first : first + 999],
                first,
                num_slots=len(slots),
                num_rows=10_000,
                seed=0,
                longest_probe=longest,
            )
            for first in range(0, 10_000, 999)
        )

    assert count(slots, longest) == 10_000
    gone = slots.copy()
    gone[np.flatnonzero(slots == 77)] = EMPTY
    assert count(gone, longest) < 10_000
    exchanged = slots.copy()
    first, second = np.flatnonzero(slots == 5)[0], np.flatnonzero(slots == 6)[0]
    exchanged[[first, second]] = exchanged[[second, first]]
    assert count(exchanged, longest) == 9_998
    assert count(slots, longest - 1) < 10_000
    assert count(slots[:100], longest) < 100


GOOD = {"offset": 64, "num_slots": 11, "seed": 0, "longest_probe": 3, "num_rows": 7, "file_size": 108}


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"offset": 65}, "begin at byte 65"),
        ({"offset": 0}, "begin at byte 0"),
        ({"num_slots": 12}, "do not lie in a file of 108 bytes"),
        ({"num_slots": 7}, "7 slots for 7 rows"),
        ({"seed": 8}, "seed is 8"),
        ({"longest_probe": 1025}, "longest probe is 1,025"),
    ],
)
def test_impossible_numbers_are_refused(change: dict[str, int], fault: str) -> None:
    assert find_fault(**GOOD) is None
    found = find_fault(**GOOD | change)
    assert found is not None
    assert fault in found
