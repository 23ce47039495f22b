"""A small model with a hash table of RecIS's surface, a dataset, and a checkpoint for them, for whole exports in tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from tests.support.recis_writer import PartSpec, make_tables, write_checkpoint

MODEL = "tests.support.tiny_model:build_model"
DATASET = "tests.support.tiny_model:build_dataset"
DIM = 4


class LookalikeTable(nn.Module):
    """RecIS's HashTable as far as an export sees it: ``ids()``, ``insert(ids, embeddings)``, ``forward(ids)``."""

    def __init__(self, name: str, dim: int = DIM) -> None:
        super().__init__()
        self._name = name
        self._dim = dim
        self._rows: dict[int, torch.Tensor] = {}

    def ids(self) -> torch.Tensor:
        return torch.tensor(sorted(self._rows), dtype=torch.int64)

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        for i, row in zip(ids.tolist(), embeddings, strict=True):
            self._rows[i] = row.clone()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        zero = torch.zeros(self._dim)
        return torch.stack([self._rows.get(i, zero) for i in ids.reshape(-1).tolist()]).reshape(*ids.shape, self._dim)


class SparseArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = LookalikeTable("user_emb")
        self.item = LookalikeTable("item_emb")

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"]), "price": batch["price"]}


class DenseArch(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * DIM + 1, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 2)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = torch.cat([blocks["user"], blocks["item"], blocks["price"]], dim=-1)
        scores = torch.sigmoid(self.out(torch.relu(self.norm(self.hidden(x)))))
        return {"ctr": scores[:, :1], "like": scores[:, 1:]}


class TinyModel(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.sparse_arch = SparseArch()
        self.dense_arch = DenseArch(width)


class BranchingDense(DenseArch):
    """Takes another way for a batch of one, which a trace does not see."""

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        scores = super().forward(blocks)
        return {name: score + 1 if score.shape[0] == 1 else score for name, score in scores.items()}


def build_model(width: int = 8) -> TinyModel:
    torch.manual_seed(7)
    return TinyModel(width)


def build_branching_model() -> TinyModel:
    model = build_model()
    model.dense_arch = BranchingDense()
    return model


def build_dataset(rows: int = 5) -> list[tuple[bool, dict[str, torch.Tensor]]]:
    ids = tables()
    users, items = (np.concatenate([part.ids for part in ids[name]]) for name in ("user_emb", "item_emb"))
    batch = {
        "user": torch.from_numpy(np.resize(users, rows)),
        "item": torch.from_numpy(np.resize(items, rows)),
        "price": torch.linspace(0, 1, rows).reshape(rows, 1),
    }
    return [(False, batch)]


def build_empty_dataset() -> list[object]:
    return []


def tables() -> dict[str, list[PartSpec]]:
    return make_tables({"user_emb": 60, "item_emb": 40}, 2, dim=DIM, seed=3)


def trained_dense_state() -> dict[str, torch.Tensor]:
    """Parameters that differ from those of a fresh model, as a trainer would have left them."""
    torch.manual_seed(11)
    return {f"dense_arch.{name}": tensor for name, tensor in DenseArch().state_dict().items()}


def write_tiny_checkpoint(directory: Path) -> Path:
    write_checkpoint(directory, tables(), model_state=trained_dense_state())
    return directory
