"""A model around torchrec's ``ManagedCollisionEmbeddingBagCollection``, with tables of both kinds, and batches of raw ids."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.modules.hash_mc_modules import HashZchManagedCollisionModule
from torchrec.modules.mc_embedding_modules import ManagedCollisionEmbeddingBagCollection
from torchrec.modules.mc_modules import (
    DistanceLFU_EvictionPolicy,
    ManagedCollisionCollection,
    MCHManagedCollisionModule,
)

TABLES = {"t_mch": (24, 8), "t_zch": (32, 4)}
PLACED = [5, 123_456_789_012, 0, 77, 1 << 61]
"""Raw ids that ``train`` gives a slot in ``t_zch``."""
CPU = torch.device("cpu")


def modules_of(model: nn.Module) -> Any:
    """Return the managed-collision modules by table."""
    return model.get_submodule("sparse.mc._managed_collision_collection._managed_collision_modules")


def hash_ids(ids: torch.Tensor, _: int) -> torch.Tensor:
    return ids * 3 + 1


class SparseArch(nn.Module):
    def __init__(self, *, is_hashed: bool = False) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=rows, embedding_dim=dim, feature_names=[name])
            for name, (rows, dim) in TABLES.items()
        ]
        modules: dict[str, Any] = {
            "t_mch": MCHManagedCollisionModule(
                zch_size=TABLES["t_mch"][0],
                device=CPU,
                eviction_policy=DistanceLFU_EvictionPolicy(),
                eviction_interval=2,
                input_hash_func=hash_ids if is_hashed else None,
            ),
            "t_zch": HashZchManagedCollisionModule(
                zch_size=TABLES["t_zch"][0], device=CPU, total_num_buckets=1, max_probe=8
            ),
        }
        self.mc = ManagedCollisionEmbeddingBagCollection(
            EmbeddingBagCollection(tables=configs, device=CPU), ManagedCollisionCollection(modules, configs)
        )

    def forward(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        pooled, _ = self.mc(batch["features"])
        return {name: pooled[name] for name in TABLES}


class Mlp(nn.Sequential):
    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = torch.cat([blocks["t_mch"], blocks["t_zch"]], dim=1)
        scores: torch.Tensor = super().forward(rows)  # type: ignore[no-untyped-call]
        return scores


class Model(nn.Module):
    def __init__(self, *, is_hashed: bool = False) -> None:
        super().__init__()
        self.sparse = SparseArch(is_hashed=is_hashed)
        self.mlp = Mlp(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, batch: dict[str, Any]) -> torch.Tensor:
        scores: torch.Tensor = self.mlp(self.sparse(batch))
        return scores


def build_model(*, is_hashed: bool = False) -> Model:
    """A fresh model: its modules know no id."""
    torch.manual_seed(1)
    return Model(is_hashed=is_hashed)


def make_batch(ids: dict[str, list[int]]) -> dict[str, Any]:
    """One id a sample and feature."""
    values = torch.tensor([number for name in TABLES for number in ids[name]])
    return {
        "features": KeyedJaggedTensor(
            keys=list(TABLES), values=values, lengths=torch.ones(len(values), dtype=torch.int64)
        )
    }


def train(steps: int = 9, *, is_hashed: bool = False) -> Model:
    """Train until ids are evicted, and place raw ids in the slots that HashZCH finds them in: its CPU kernel only reads."""
    model = build_model(is_hashed=is_hashed)
    modules_of(model)["t_zch"].eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        ids = {
            "t_mch": (torch.randint(0, 30, (16,), generator=generator) + 7 * step - 9).tolist(),
            "t_zch": torch.randint(0, 99, (16,), generator=generator).tolist(),
        }
        optimizer.zero_grad()
        (model(make_batch(ids)) - 1).square().sum().backward()
        optimizer.step()
    place_identities(model, PLACED)
    return model


def place_identities(model: Model, ids: list[int]) -> None:
    """Put each id into the slot that the module maps it to."""
    module = modules_of(model)["t_zch"]
    for number in ids:
        feature = JaggedTensor(values=torch.tensor([number]), lengths=torch.ones(1, dtype=torch.int64))
        slot = int(module.remap({"x": feature})["x"].values())
        while int(module._hash_zch_identities[slot]) != -1:
            slot = (slot + 1) % len(module._hash_zch_identities)
        module._hash_zch_identities.data[slot] = number


def build_dataset(rows: int = 6) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(2)
    return [make_batch({name: torch.randint(0, 90, (rows,), generator=generator).tolist() for name in TABLES})]
