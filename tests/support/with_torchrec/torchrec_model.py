"""A model around torchrec's own ``EmbeddingBagCollection``, as the row-wise fixture was trained with, and a batch for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

TABLES = {"t_user": (1000, 8), "t_item": (1003, 16)}


class SparseArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ebc = EmbeddingBagCollection(
            tables=[
                EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name])
                for name, (rows, dim) in TABLES.items()
            ]
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        pooled = self.ebc(batch["features"])
        return {"numbers": batch["numbers"], **{name: pooled[name] for name in TABLES}}


class Mlp(nn.Sequential):
    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        blocks_by_row = torch.cat([blocks["t_user"], blocks["t_item"], blocks["numbers"]], dim=1)
        scores: torch.Tensor = super().forward(blocks_by_row)  # type: ignore[no-untyped-call]
        return scores


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse = SparseArch()
        self.mlp = Mlp(nn.Linear(28, 32), nn.ReLU(), nn.Linear(32, 1))


def build_model() -> Model:
    return Model()


def build_dataset(rows: int = 6) -> list[tuple[bool, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(0, 4, (len(TABLES) * rows,), generator=generator)
    values = torch.cat(
        [
            torch.randint(0, num_rows, (int(lengths[number * rows : (number + 1) * rows].sum()),), generator=generator)
            for number, (num_rows, _) in enumerate(TABLES.values())
        ]
    )
    features = KeyedJaggedTensor(keys=list(TABLES), values=values, lengths=lengths)
    return [(False, {"features": features, "numbers": torch.rand(rows, 4, generator=generator)})]
