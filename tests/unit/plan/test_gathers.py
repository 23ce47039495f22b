"""Gathers as columns: what one index gives, and what joining keeps."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.plan.gathers import Gathers, join_gathers


def make(part: int, columns: list[tuple[int, ...]], runs: list[list[int]]) -> Gathers:
    """Return one gather for each list of counts; their columns are dealt out in turn."""
    counts = [count for run in runs for count in run]
    return Gathers(
        part=np.full(len(runs), part),
        first_row=np.arange(len(runs)) * 100,
        num_rows=np.full(len(runs), 100),
        columns=tuple(columns),
        columns_of=np.arange(len(runs)) % len(columns),
        bounds=np.cumsum([0, *(len(run) for run in runs)]),
        targets=np.arange(len(counts)),
        counts=np.array(counts),
        first_target_rows=np.arange(len(counts)) * 7,
    )


def test_joined_gathers_are_those_of_the_pieces() -> None:
    """Each keeps its runs and its columns, though the pieces number columns in their own way."""
    pieces = [make(3, [(0, 1), (1,)], [[5, 6], [7], [8]]), make(4, [(1,), (0,)], [[1], [2, 3, 4]])]
    joined = join_gathers(pieces)
    assert len(joined) == 5
    assert [str(gather) for gather in joined] == [str(gather) for piece in pieces for gather in piece]
    assert [gather.columns for gather in joined] == [(0, 1), (1,), (0, 1), (1,), (0,)]
    assert [gather.num_kept for gather in joined] == [11, 7, 8, 1, 9] == joined.sum_runs(joined.counts).tolist()
    assert joined.of_run.tolist() == [0, 0, 1, 2, 3, 4, 4, 4]
    with pytest.raises(IndexError):
        joined[5]


def test_no_pieces_are_no_gathers() -> None:
    """It is false, and has no runs."""
    none = join_gathers([])
    assert not none
    assert list(none) == []
    assert none.sum_runs(none.counts).tolist() == []
