"""The file of deleted ids: what is written is found sound, and each fault is told."""

from __future__ import annotations

import numpy as np
import pytest

from dist_export.formats.deleted_ids import ID, deleted_name, encode_deleted, find_fault


def test_each_part_is_read_back_from_its_offset() -> None:
    parts = [np.array([-5, 0, 9]), np.array([], np.int64), np.array([7])]
    content, offsets = encode_deleted(parts)
    for ids, offset in zip(parts, offsets, strict=True):
        assert offset % 64 == 0
        assert find_fault(content, offset, len(ids)) is None
        assert np.frombuffer(content, ID, len(ids), offset).tolist() == ids.tolist()
    assert deleted_name("model-000000-of-000002.safetensors") == "model-000000-of-000002.deleted_ids"


@pytest.mark.parametrize(
    ("ids", "offset", "num_ids", "told"),
    [
        ([1, 2], 64, 3, "3 ids from byte 64 on do not lie in its 80 bytes"),
        ([1, 2], 0, 2, "do not lie in"),
        ([1, 2], 8, 2, "do not lie in"),
        ([2, 1], 64, 2, "are not in ascending order"),
        ([1, 1], 64, 2, "are not in ascending order"),
    ],
)
def test_a_fault_is_told(ids: list[int], offset: int, num_ids: int, told: str) -> None:
    content, _ = encode_deleted([np.array(ids)])
    assert told in str(find_fault(content, offset, num_ids))
    assert "which no file of deleted ids does" in str(find_fault(b"other" + content[5:], offset, num_ids))
