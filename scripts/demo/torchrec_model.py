"""The demo's model as torchrec has it, in plain torch: an ``EmbeddingBagCollection`` whose rows go by number."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scripts.demo.features import PAD
from scripts.demo.model import DeepFM, DenseArch


class EmbeddingBagCollection(nn.Module):
    """torchrec's module before it is sharded: a bag a table, by name.

    Args:
        tables: Name -> (rows, width).
    """

    def __init__(self, tables: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict(
            {
                name: nn.EmbeddingBag(rows, dim, mode="mean", include_last_offset=True)
                for name, (rows, dim) in tables.items()
            }
        )

    def forward(self, features: Mapping[str, tuple[str, Tensor, Tensor]]) -> dict[str, Tensor]:
        """Return feature -> (B, width), from feature -> (table, row numbers of all bags, offsets (B + 1,))."""
        return {
            name: self.embedding_bags[table](input=values, offsets=offsets)
            for name, (table, values, offsets) in features.items()
        }


class SparseArch(nn.Module):
    """Features -> blocks. An id's row is the id modulo the table's rows, as where ids are hashed into buckets.

    Args:
        fg: Content of fg.json: the features, and the table and width of each.
        mc: Content of mc.json: block name -> feature names.
        rows: Rows of each table.
    """

    def __init__(self, fg: Mapping[str, Any], mc: Mapping[str, Sequence[str]], rows: Mapping[str, int]) -> None:
        super().__init__()
        self.blocks = {block: list(names) for block, names in mc.items()}
        self.width_of: dict[str, int] = {}
        self.table_of: dict[str, str] = {}
        tables = {}
        for entry in fg["features"]:
            name = entry["feature_name"]
            self.width_of[name] = entry.get("embedding_dimension", entry.get("value_dimension"))
            if entry["gen_val_type"] == "lookup":
                self.table_of[name] = entry["shared_name"]
                tables[entry["shared_name"]] = rows[entry["shared_name"]], self.width_of[name]
        self.rows = dict(rows)
        self.ebc = EmbeddingBagCollection(tables)

    def widths(self) -> dict[str, int]:
        return {block: sum(self.width_of[name] for name in names) for block, names in self.blocks.items()}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return block name -> (B, width) float32."""
        bags = {}
        for name, table in self.table_of.items():
            is_id = batch[name] != PAD
            offsets = torch.cat([torch.zeros(1, dtype=torch.int64), is_id.sum(dim=1).cumsum(dim=0)])
            bags[name] = table, batch[name][is_id] % self.rows[table], offsets
        features = {**batch, **self.ebc(bags)}
        return {block: torch.cat([features[name] for name in names], dim=1) for block, names in self.blocks.items()}


def build_model(*, fg: str, mc: str, rows: Mapping[str, int], dim: int = 16, hidden: int = 64) -> DeepFM:
    """Return the untrained model. ``fg`` and ``mc`` are paths of the two JSON files."""
    sparse_arch = SparseArch(json.loads(Path(fg).read_text()), json.loads(Path(mc).read_text()), rows)
    return DeepFM(sparse_arch, DenseArch(sparse_arch.widths(), dim=dim, hidden=hidden))  # type: ignore[arg-type]
