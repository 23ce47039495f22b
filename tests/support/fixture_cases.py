"""The reference checkpoints, and the shard counts that each is exported to."""

from __future__ import annotations

from collections.abc import Sequence

CASES = (
    "small2",
    "small4x2",
    "small2_v1",
    "adam2_v1",
    "adamwtf2",
    "noopt2",
    "stepfilter2",
    "fp16_noopt",
    "dense_types",
    "emptyshard",
    "hostile_misplaced2",
    "hostile_bool_dense",
    "fullckpt/ckpt_3",
)
NUM_SHARDS = (1, 2, 3, 4, 8, "source")

TORCHREC_CASES: dict[str, list[str]] = {
    "row_wise": [],
    "column_wise": [],
    "dtensor_adam": ["t_*.weight"],
    "hostile_lossy_adam": [],
}
"""DCP checkpoints, each with the ``tables`` that it needs."""


def share_pairs(cases: Sequence[str], numbers: Sequence[int | str], world_size: int) -> list[tuple[str, int | str]]:
    """Return pairs of case and number of shards: all for one rank; for 2, 3 and 4 ranks a third each, all pairs together.

    Each world has every case, and every number if there are three cases.
    """
    return [
        (case, number)
        for row, case in enumerate(cases)
        for column, number in enumerate(numbers)
        if world_size == 1 or (row + column) % 3 == world_size % 3
    ]
