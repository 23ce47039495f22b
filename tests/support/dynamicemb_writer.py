"""DynamicEmb dumps, from the description of the format alone: raw files, one of each kind for a rank and table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

Rows = Mapping[str, np.ndarray]
"""``keys`` (n,) int64, ``values`` (n, dim) float32, and perhaps ``scores`` (n,) int64 and ``opt_values`` (n, k) float32."""


def make_table(keys: list[int] | np.ndarray, dim: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random rows with all that a dump can have."""
    random = np.random.default_rng(seed)
    keys = np.array(keys, np.int64)
    return {
        "keys": keys,
        "values": random.standard_normal((len(keys), dim)).astype(np.float32),
        "scores": random.integers(0, 1 << 62, len(keys)),
        "opt_values": random.random((len(keys), 2 * dim), np.float32),
    }


def write_dump(
    folder: Path, table: str, rows: Rows, world_size: int, *, version: int = 2, ranks: np.ndarray | None = None
) -> Path:
    """Write one table of one collection into ``folder``; ``ranks`` says which rank has which row, by default its key does."""
    folder.mkdir(parents=True, exist_ok=True)
    ranks = rows["keys"] % world_size if ranks is None else ranks
    for rank in range(world_size):
        for what, column in rows.items():
            name = f"{table}_{what}" if what == "opt_values" and version == 1 else f"{table}_emb_{what}"
            path = folder / f"{name}.rank_{rank}.world_size_{world_size}"
            path.write_bytes(np.ascontiguousarray(column[ranks == rank]).tobytes())
    (folder / f"{table}_opt_args.json").write_text(json.dumps({"opt_type": "adam", "lr": 0.1}))
    return folder


def truth_of(rows: Rows, *slots: str) -> dict[str, np.ndarray]:
    """Return the rows by the names that they have in a package, sorted by key."""
    names = {"keys": "id", "values": "embedding", "scores": "score", "opt_values": "opt_values"}
    order = np.argsort(rows["keys"])
    return {names[what]: column[order] for what, column in rows.items() if names[what] in slots}
