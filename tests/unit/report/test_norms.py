"""Norms, dead rows and rows that are not finite, against torch; and the choice of the rows that are read."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch

from dist_export.report.norms import NormCounter, NormEntry, RowRun, choose_runs


def count(*blocks: np.ndarray) -> NormEntry:
    counter = NormCounter()
    for block in blocks:
        counter.add(block)
    return counter.close()


def edges_of(entry: NormEntry) -> np.ndarray:
    assert entry.low is not None
    assert entry.ratio is not None
    return entry.low * entry.ratio ** np.arange(len(entry.counts) + 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_norms_are_those_of_torch(dtype: str) -> None:
    rows = (np.random.default_rng(0).normal(size=(5000, 24)) * 0.1).astype(dtype)
    norms = torch.linalg.vector_norm(torch.from_numpy(rows).double(), dim=1).numpy()
    entry = count(rows[:1234], rows[1234:])
    assert (entry.rows_read, sum(entry.counts)) == (5000, 5000)
    assert (entry.smallest, entry.largest) == (
        pytest.approx(norms.min(), rel=1e-5),
        pytest.approx(norms.max(), rel=1e-5),
    )
    for name, share in (("p1", 1), ("median", 50), ("p99", 99)):
        assert getattr(entry, name) == pytest.approx(np.percentile(norms, share), rel=0.025), name
    edges = edges_of(entry)
    expected = np.histogram(norms, edges)[0]
    assert 20 <= len(entry.counts) <= 40
    # a norm that is on an edge but for float32's rounding may be in the next column
    assert np.abs(expected - entry.counts).sum() <= 4


def test_dead_rows_and_rows_that_are_not_finite_are_counted_and_in_no_column() -> None:
    rows = np.ones((100, 4), np.float32)
    rows[:7] = 0.0
    rows[3] = -0.0
    rows[10:13, 2] = np.nan
    rows[20:25, 1] = np.inf
    rows[12, 0] = -np.inf  # one row with both
    entry = count(rows[:50], rows[50:])
    assert (entry.dead, entry.nan, entry.inf) == (7, 3, 6)
    assert entry.counts == (100 - 7 - 3 - 5,)
    assert (entry.smallest, entry.largest, entry.median) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e-25, "float32"), (3e37, "float32"), (1e300, "float64"), (1e-300, "float64")]
)
def test_values_whose_squares_overflow_or_vanish_have_their_norm(value: float, dtype: str) -> None:
    entry = count(np.full((3, 9), value, dtype))
    assert (entry.dead, entry.nan, entry.inf, sum(entry.counts)) == (0, 0, 0, 3)
    assert entry.largest == pytest.approx(3 * value, rel=1e-6)


def test_a_norm_beyond_float64_is_the_largest_number() -> None:
    entry = count(np.full((1, 4), np.finfo(np.float64).max))
    assert entry.largest == np.finfo(np.float64).max
    assert entry.inf == 0


def test_norms_far_apart_share_few_columns() -> None:
    norms = 10.0 ** np.arange(-30, 31)
    entry = count(norms.astype(np.float32)[:, None])
    assert len(entry.counts) <= 40
    assert sum(entry.counts) == 61
    assert (np.histogram(norms, edges_of(entry))[0] == entry.counts).all()


@pytest.mark.parametrize("rows", [np.zeros((0, 4), np.float32), np.zeros((5, 4), np.float32)])
def test_without_a_norm_there_is_no_figure(rows: np.ndarray) -> None:
    entry = count(rows) if len(rows) else count()
    assert (entry.rows_read, entry.dead, entry.counts, entry.low, entry.median) == (
        len(rows),
        len(rows),
        (),
        None,
        None,
    )


def test_rows_of_whole_numbers_have_norms_too() -> None:
    assert count(np.array([[3, 4], [0, 0]], np.int8)).largest == 5.0


# ---- which rows are read ----


@pytest.mark.parametrize("sample", [0, 1 << 40])
def test_a_manifest_that_claims_too_many_rows_takes_no_memory(sample: int) -> None:
    """The first block is refused when it is read; the others are never listed."""
    assert next(choose_runs([1 << 62], sample_rows=sample, block_rows=8)).first == 0


def test_pieces_of_a_sample_that_is_nearly_the_whole_table_do_not_overlap() -> None:
    rows = rows_in(choose_runs([199], sample_rows=198, block_rows=50))
    assert 190 <= len(rows) <= 198


def rows_in(runs: Iterable[RowRun]) -> set[tuple[int, int]]:
    listed = [(run.part, row) for run in runs for row in range(run.first, run.last)]
    assert len(listed) == len(set(listed)), "a row is read twice"
    return set(listed)


def test_all_rows_are_read_in_blocks() -> None:
    parts = [10, 0, 7]
    every = {(part, row) for part, rows in enumerate(parts) for row in range(rows)}
    for sample in (0, 17, 1000):
        runs = list(choose_runs(parts, sample_rows=sample, block_rows=4))
        assert rows_in(runs) == every
        assert max(run.last - run.first for run in runs) == 4


@pytest.mark.parametrize("parts", [[1000], [10, 0, 0, 900, 1, 89], [1] * 1000])
@pytest.mark.parametrize("sample", [1, 9, 64, 999])
def test_a_sample_has_as_many_rows_spread_evenly(parts: list[int], sample: int) -> None:
    runs = list(choose_runs(parts, sample_rows=sample, block_rows=50))
    begins = np.cumsum([0, *parts])
    chosen = sorted(int(begins[part]) + row for part, row in rows_in(runs))
    assert all(run.last <= parts[run.part] for run in runs)
    assert 0.8 * sample <= len(chosen) <= sample
    quarters = np.histogram(chosen, [0, 250, 500, 750, 1000])[0]
    assert sample < 16 or (np.abs(quarters - sample / 4) <= 0.1 * sample + 1).all()
