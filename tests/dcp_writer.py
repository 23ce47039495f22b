"""Small DCP checkpoints, written by torch itself in this process, and ways to spoil them."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp


def save(path: Path, state: dict[str, Any]) -> Path:
    """Write a state_dict as one process does."""
    dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def make_state() -> dict[str, Any]:
    """A model with one table and one dense layer, and its optimizer."""
    table = torch.arange(40, dtype=torch.float32).reshape(10, 4)
    return {
        "model": {"ebc.embedding_bags.user.weight": table, "mlp.weight": torch.ones(3, 4)},
        "optim": {
            "state": {"ebc.embedding_bags.user.weight": {"user.momentum1": torch.ones(10)}, "mlp.weight": {"step": 1}},
            "param_groups": [{"lr": 0.1}],
        },
    }


def change_metadata(path: Path, change: Callable[[Any], None]) -> None:
    """Read the metadata with torch's own classes, change them, and write them back."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    change(metadata)
    file.write_bytes(pickle.dumps(metadata))
