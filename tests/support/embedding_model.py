"""A model of plain torch with embeddings in both arches and beside them, one of them tied, for whole exports in tests."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

DIM = 4
ROWS = {"user": 50, "item": 40}
POSITIONS = 5000
"""More rows than any layer has: a table by its looks."""


class SparseArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS["user"], DIM)
        self.item = nn.Embedding(ROWS["item"], DIM)
        self.scale = nn.Linear(DIM, DIM)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"user": self.user(batch["user"]), "item": self.item(batch["item"]), "place": batch["place"]}


class DenseArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Embedding(POSITIONS, DIM)
        self.mlp = nn.Linear(3 * DIM, 1)
        self.ebc = nn.Module()
        self.ebc.embedding_bags = nn.ModuleDict({"slot": nn.EmbeddingBag(6, DIM, mode="sum")})

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bags = cast("nn.ModuleDict", self.ebc.embedding_bags)
        place = self.position(blocks["place"][:, 0]) + bags["slot"](blocks["place"] % 6)
        return {"ctr": torch.sigmoid(self.mlp(torch.cat([blocks["user"], blocks["item"], place], dim=1)))}


class Model(nn.Module):
    """With an embedding that neither arch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = SparseArch()
        self.dense_arch = DenseArch()
        self.teacher = nn.Embedding(30, DIM)


class TiedDense(nn.Module):
    """Scores all items with their own rows."""

    def __init__(self, item: nn.Embedding) -> None:
        super().__init__()
        self.out = nn.Linear(DIM, ROWS["item"], bias=False)
        self.out.weight = item.weight

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": self.out(blocks["user"] + blocks["item"])}


class TiedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = SparseArch()
        self.dense_arch = TiedDense(self.sparse_arch.item)


def build() -> Model:
    torch.manual_seed(1)
    return Model()


def build_tied() -> TiedModel:
    torch.manual_seed(1)
    return TiedModel()


def build_trained(kind: type[nn.Module] = Model) -> Any:
    """The model as the trainer left it."""
    torch.manual_seed(2)
    return kind().eval()


def batch(rows: int = 6, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)

    def draw(most: int) -> torch.Tensor:
        return torch.randint(0, most, (rows,), generator=random)

    return {"user": draw(50), "item": draw(40), "place": draw(POSITIONS)[:, None]}


def dataset() -> list[dict[str, torch.Tensor]]:
    return [batch()]
