"""A model as torchrec has it, in plain torch: an EmbeddingBagCollection with its naming, and a dataset, for whole exports."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.support.tiny_model import DenseArch, LookalikeTable

MODEL = "tests.support.torchrec_shape:build_model"
DATASET = "tests.support.torchrec_shape:build_dataset"
DIM = 4
ROWS = {"t_user": 60, "t_item": 37}


class EmbeddingBagCollection(nn.Module):
    """torchrec's, unsharded: bags by table name, called by keyword with the values and offsets of a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding_bags = nn.ModuleDict(
            {name: nn.EmbeddingBag(rows, DIM, mode="sum", include_last_offset=True) for name, rows in ROWS.items()}
        )

    def forward(self, features: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            name: bag(input=features[name][0], offsets=features[name][1]).float()
            for name, bag in self.embedding_bags.items()
        }


class SparseArch(nn.Module):
    def __init__(self, *, has_hash_table: bool) -> None:
        super().__init__()
        self.ebc: nn.Module = EmbeddingBagCollection()
        self.city = LookalikeTable("city_emb") if has_hash_table else None

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        pooled = self.ebc(batch["features"])
        item = pooled["t_item"]
        if self.city is not None:
            item = item + self.city(batch["city"])
        return {"user": pooled["t_user"], "item": item, "price": batch["price"]}


class Model(nn.Module):
    def __init__(self, *, has_hash_table: bool = False) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(has_hash_table=has_hash_table)
        self.dense_arch = DenseArch()


def build_model(*, has_hash_table: bool = False) -> Model:
    torch.manual_seed(5)
    return Model(has_hash_table=has_hash_table)


def build_trained(*, has_hash_table: bool = False) -> Model:
    """The model as the trainer left it."""
    torch.manual_seed(6)
    return Model(has_hash_table=has_hash_table).eval()


def build_mixed_model() -> Model:
    return build_model(has_hash_table=True)


class ShardedLookalike(nn.Module):
    """Looks rows up in a way that an export does not see, as torchrec's kernels do."""

    def __init__(self, ebc: EmbeddingBagCollection) -> None:
        super().__init__()
        self.weights = nn.ParameterDict({name: bag.weight for name, bag in ebc.embedding_bags.items()})

    def forward(self, features: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {
            name: nn.functional.embedding_bag(*features[name][:1], weight, features[name][1], include_last_offset=True)
            for name, weight in self.weights.items()
        }


def build_sharded_model() -> Model:
    model = build_model()
    ebc = model.sparse_arch.ebc
    assert isinstance(ebc, EmbeddingBagCollection)
    model.sparse_arch.ebc = ShardedLookalike(ebc)
    return model


def build_dataset(rows: int = 5) -> list[tuple[bool, dict[str, Any]]]:
    generator = torch.Generator().manual_seed(8)
    features = {}
    for name, num_rows in ROWS.items():
        lengths = torch.randint(0, 4, (rows,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        features[name] = torch.randint(0, num_rows, (int(offsets[-1]),), generator=generator), offsets
    price = torch.linspace(0, 1, rows).reshape(rows, 1)
    return [(False, {"features": features, "price": price, "city": torch.arange(rows) * 7})]
