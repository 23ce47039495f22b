"""What the tests of plain checkpoints share: packages read back as tensors, by the names in the format alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.detect import detect_format, open_dense
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.storage.urls import open_place
from tests.support.package_reader import read_row_tables

MERGED = "torch_rank_weights_embs_table_multi_shard.json"
NUM_SHARDS = (1, 2, 3, 4)


def make_model(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state_dict with two tables, one of them in a collection of torchrec's, and a dense layer."""
    torch.manual_seed(seed)
    return {
        "sparse_arch.ebc.embedding_bags.user.weight": torch.randn(103, 8),
        "sparse_arch.item.weight": torch.randn(61, 4),
        "dense_arch.mlp.weight": torch.randn(3, 12),
        "dense_arch.mlp.bias": torch.randn(3),
    }


USER, ITEM = list(make_model())[:2]
TABLES = ["*item.weight"]


def dense_of(place: Any, tables: Sequence[str] = ()) -> DenseParameters:
    """Return the dense parameters of what is at a path or URL."""
    directory = open_place(place)
    return open_dense(directory, detect_format(directory), TensorSettings(tuple(tables)))


def read_numbered(target: Path) -> dict[str, torch.Tensor]:
    """Return the tables of a package by name, and their other slots by ``<table>.<slot>``; merged and shards agree."""
    found = read_row_tables(target)
    merged = json.loads((target / MERGED).read_bytes())
    for table in json.loads((target / "manifest.json").read_bytes())["tables"]:
        for part in table["parts"]:
            entry = merged[part["keys"]["embedding"]]
            assert entry["is_hashmap"] is False
            assert entry["shape"] == [part["rows"], *found[table["name"], "embedding"].shape[1:]]
    return {table if slot == "embedding" else f"{table}.{slot}": rows for (table, slot), rows in found.items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are alike bit for bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    bits = (tensor.reshape(-1).contiguous().view(torch.uint8) for tensor in (left, right))
    return torch.equal(*bits)


def assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """Compare tensors by name, bit for bit."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert same(found[name], tensor), name
