"""The reference checkpoints, and the shard counts that each is exported to."""

from __future__ import annotations

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
