"""What the tests of plain checkpoints share: packages read back as tensors, by the names in the format alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dist_export.checkpoint.dense_parameters import DenseParameters
from dist_export.checkpoint.formats import detect_format, open_dense
from dist_export.storage import open_place

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
    return open_dense(directory, detect_format(directory), tables=tables)


def read_numbered(target: Path) -> dict[str, torch.Tensor]:
    """Return the tables of a package whose rows go by number, with ``part_<i>_<n>`` in order, as manifest and merged say."""
    blocks: dict[str, torch.Tensor] = {}
    for path in sorted(target.glob("*.safetensors")):
        for key, tensor in load_file(path).items():
            assert key not in blocks
            blocks[key] = tensor
    merged = json.loads((target / MERGED).read_bytes())
    manifest = json.loads((target / "manifest.json").read_bytes())
    found = {}
    for table in manifest["tables"]:
        assert table["is_hashed"] is False
        pieces, rows = [], 0
        for part in table["parts"]:
            key = part["keys"]["embedding"]
            assert part["first_row"] == rows or not table["rows_in"]
            assert merged[key]["is_hashmap"] is False
            assert merged[key]["shape"] == list(blocks[key].shape)
            pieces.append(blocks.pop(key))
            rows += len(pieces[-1])
            for slot, other in part["keys"].items():
                if slot != "embedding":
                    found.setdefault(f"{table['name']}.{slot}", []).append(blocks.pop(other))
        assert [key.rpartition("/")[0] for key in (part["keys"]["embedding"] for part in table["parts"])] == [
            table["name"]
        ] * len(pieces)
        found[table["name"]] = pieces
    assert not blocks
    return {name: torch.cat(pieces) for name, pieces in found.items()}


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are alike bit for bit."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    bits = (tensor.contiguous().view(torch.uint8) if tensor.numel() else tensor for tensor in (left, right))
    return torch.equal(*bits)


def assert_same(found: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """Compare tensors by name, bit for bit."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert same(found[name], tensor), name
