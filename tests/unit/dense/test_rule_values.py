"""What the second decision on rows reads, where a rank has no row to judge."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.checkpoint.metadata import SlotMeta
from dist_export.dense.rule_check import _numbers

VALUES = np.arange(20, dtype=np.float32).reshape(4, 5)


@pytest.mark.parametrize("num_rows", [0, 1, 4])
def test_columns_that_lie_apart_are_read_whatever_their_number(num_rows: int) -> None:
    """torch refuses such bytes as floats, which ended the export of a rank that had none of the sample's rows."""
    slot = SlotMeta(name="embedding", dtype=1, inner_shape=(2,), row_bytes=8, column=1)
    rows = np.empty((num_rows, 20), np.uint8)
    rows[:] = VALUES.view(np.uint8)[:num_rows]
    assert _numbers(rows[:, 4:12], slot) == VALUES[:num_rows, 1:3].tolist()
