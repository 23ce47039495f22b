"""Small DCP checkpoints, written by torch itself in this process, and ways to spoil them."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Chunks = Sequence[tuple[tuple[int, ...], torch.Tensor]]
"""(offsets, tensor) of each item."""


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


def write_chunks(path: Path, tensors: dict[str, tuple[torch.Tensor, Chunks]], *, num_files: int = 2) -> Path:
    """Write a checkpoint whose items are just these, as ``torch.save`` writes them: with the strides that they have.

    Args:
        tensors: name -> (a tensor of the whole's shape and dtype, chunks), a chunk being (offsets, tensor).
        num_files: that the chunks are dealt out to.
    """
    path.mkdir(parents=True, exist_ok=True)
    files = [io.BytesIO() for _ in range(num_files)]
    described: dict[str, Any] = {}
    places: dict[Any, Any] = {}
    dealt = 0
    for name, (whole, chunks) in tensors.items():
        sizes = []
        for offsets, tensor in chunks:
            number, dealt = dealt % num_files, dealt + 1
            begin = files[number].tell()
            torch.save(tensor, files[number])
            where = MetadataIndex(name, torch.Size(offsets))
            places[where] = _StorageInfo(f"__{number}_0.distcp", begin, files[number].tell() - begin)
            sizes.append(ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=tensor.shape))
        described[name] = TensorStorageMetadata(TensorProperties(dtype=whole.dtype), whole.shape, sizes)
    for number, file in enumerate(files):
        (path / f"__{number}_0.distcp").write_bytes(file.getvalue())
    (path / ".metadata").write_bytes(pickle.dumps(Metadata(described, storage_data=places)))
    return path
