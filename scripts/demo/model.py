"""A small DeepFM: sharded hash tables behind named blocks of dense inputs, and two outputs, ``ctr`` and ``like``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from scripts.demo.features import PAD
from scripts.demo.sparse import CHILD_SHIFT, ID_MASK, HashTable, ShardedTable

OUTPUTS = ("ctr", "like")


class SparseArch(nn.Module):
    """Features -> blocks: each lookup feature is the mean of its ids' rows, each block its features side by side.

    Args:
        fg: Content of fg.json: the features, and the table and width of each.
        mc: Content of mc.json: block name -> feature names.
        coalesced: Name of a coalesced table -> the tables that are its children.
    """

    def __init__(
        self, fg: Mapping[str, Any], mc: Mapping[str, Sequence[str]], coalesced: Mapping[str, Sequence[str]]
    ) -> None:
        super().__init__()
        self.entries = {entry["feature_name"]: entry for entry in fg["features"]}
        self.blocks = {block: list(names) for block, names in mc.items()}
        self.place_of: dict[
            str, tuple[str, int | None]
        ] = {}  # table name -> (module that holds it, child index or None)
        self.tables = nn.ModuleDict()
        for group, children in coalesced.items():
            self.place_of |= {child: (group, index) for index, child in enumerate(children)}
        for entry in self.entries.values():
            if entry["gen_val_type"] != "lookup":
                continue
            name = entry["shared_name"]
            holder, _ = self.place_of.setdefault(name, (name, None))
            if holder not in self.tables:
                self.tables[holder] = ShardedTable(holder, entry["embedding_dimension"], coalesced.get(holder, ()))

    def hash_tables(self) -> list[HashTable]:
        return [cast("ShardedTable", sharded).table for sharded in self.tables.values()]

    def widths(self) -> dict[str, int]:
        def width(entry: Mapping[str, Any]) -> int:
            return int(entry["embedding_dimension" if entry["gen_val_type"] == "lookup" else "value_dimension"])

        return {block: sum(width(self.entries[name]) for name in names) for block, names in self.blocks.items()}

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return block name -> (B, width) float32. A collective: every rank calls it, each with its own batch."""
        features = {
            name: self._look_up(entry["shared_name"], batch[name]) if entry["gen_val_type"] == "lookup" else batch[name]
            for name, entry in self.entries.items()
        }
        return {block: torch.cat([features[name] for name in names], dim=1) for block, names in self.blocks.items()}

    def _look_up(self, table: str, ids: Tensor) -> Tensor:
        holder, child = self.place_of[table]
        is_id = ids != PAD
        flat_ids = ids[is_id]
        if child is not None:
            flat_ids = (child << CHILD_SHIFT) | (flat_ids & ID_MASK)
        rows: Tensor = self.tables[holder](flat_ids)
        bags = rows.new_zeros(*ids.shape, rows.shape[1]).index_put((is_id,), rows)
        return bags.sum(dim=1) / is_id.sum(dim=1, keepdim=True).clamp(min=1)


class DenseArch(nn.Module):
    """Blocks -> outputs: a factorization machine over the blocks, an MLP beside it, and a head for each output."""

    def __init__(self, widths: Mapping[str, int], *, dim: int, hidden: int) -> None:
        super().__init__()
        self.project = nn.ModuleDict({block: nn.Linear(width, dim) for block, width in widths.items()})
        self.mlp = nn.Sequential(
            nn.Linear(sum(widths.values()), hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, dim),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({name: nn.Linear(2 * dim, 1) for name in OUTPUTS})

    def forward(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return output name -> probabilities (B, 1)."""
        fields = torch.stack([project(blocks[block]) for block, project in self.project.items()], dim=1)
        pairs = 0.5 * (fields.sum(dim=1).square() - fields.square().sum(dim=1))
        deep = self.mlp(torch.cat([blocks[block] for block in self.project], dim=1))
        joint = torch.cat([pairs, deep], dim=1)
        return {name: torch.sigmoid(head(joint)) for name, head in self.heads.items()}


class DeepFM(nn.Module):
    def __init__(self, sparse_arch: SparseArch, dense_arch: DenseArch) -> None:
        super().__init__()
        self.sparse_arch = sparse_arch
        self.dense_arch = dense_arch

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = self.dense_arch(self.sparse_arch(batch))
        return scores


def build_model(*, fg: str, mc: str, coalesced: Mapping[str, Sequence[str]], dim: int = 16, hidden: int = 64) -> DeepFM:
    """Return the untrained model, its tables empty. ``fg`` and ``mc`` are paths of the two JSON files."""
    sparse_arch = SparseArch(json.loads(Path(fg).read_text()), json.loads(Path(mc).read_text()), coalesced)
    return DeepFM(sparse_arch, DenseArch(sparse_arch.widths(), dim=dim, hidden=hidden))
