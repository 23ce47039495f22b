"""A small model with four hash tables, a batch for it, and its checkpoint, for timing the whole command."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from scripts.bench.generate import Source

SOURCE = Source(rows=2000, dim=16, tables=4, shards=2, holes="none")
NAMES = tuple(SOURCE.table_name(table) for table in range(SOURCE.tables))
BATCH_SIZE = 32


class Table(nn.Module):
    """A hash table with the surface of RecIS's: ``ids()``, ``insert(ids, embeddings)``, ``forward(ids)``."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self._name = name
        self._dim = dim
        self._rows: dict[int, Tensor] = {}

    def ids(self) -> Tensor:
        return torch.tensor(sorted(self._rows), dtype=torch.int64)

    def insert(self, ids: Tensor, embeddings: Tensor) -> None:
        for i, row in zip(ids.tolist(), embeddings, strict=True):
            self._rows[i] = row.clone()

    def forward(self, ids: Tensor) -> Tensor:
        zero = torch.zeros(self._dim)
        rows = torch.stack([self._rows.get(i, zero) for i in ids.tolist()])
        return torch.tanh(torch.nan_to_num(rows))  # random bytes make any number


class SparseArch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleDict({name: Table(name, SOURCE.dim) for name in NAMES})

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.tables[name](ids) for name, ids in batch.items()}


class DenseArch(nn.Module):
    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(len(NAMES) * SOURCE.dim, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, 1) for name in ("ctr", "like")})

    def forward(self, blocks: dict[str, Tensor]) -> dict[str, Tensor]:
        deep = self.mlp(torch.cat([blocks[name] for name in NAMES], dim=1))
        return {name: torch.sigmoid(head(deep)) for name, head in self.heads.items()}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = SparseArch()
        self.dense_arch = DenseArch()


def build_model() -> Model:
    torch.manual_seed(7)
    return Model()


def build_dataset() -> list[dict[str, Tensor]]:
    """Return one batch of ids that the checkpoint holds."""
    return [{name: torch.from_numpy(SOURCE.ids_of(i, 0, 0, BATCH_SIZE)) for i, name in enumerate(NAMES)}]


def write_dense_state(directory: Path) -> None:
    """Write ``model.pt`` as the trainer leaves it."""
    torch.manual_seed(11)
    state = {f"dense_arch.{name}": tensor for name, tensor in DenseArch().state_dict().items()}
    torch.save(state, directory / "model.pt")
