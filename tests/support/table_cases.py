"""Tables of RecIS's surface, sparse arches of one function, and checkpoints for them: for the tests of tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample import run_sparse_arch
from dist_export.dense.source_rows import SourceRows
from dist_export.pipeline.planning import open_checkpoint
from dist_export.runtime.joining import join
from dist_export.storage.urls import open_directory
from tests.support.recis_writer import PartSpec, split_table, write_checkpoint


class HashTable(nn.Module):
    """RecIS's surface: rows by id, an unknown id gives zeros; refuses what RecIS's kernel would refuse."""

    def __init__(
        self, name: str | None, dim: int = 2, children: list[str] | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self._name = name
        self.children_hashtable: list[str] | list[str | None] = children or [name]
        self.rows: dict[int, torch.Tensor] = {}
        self.dim = dim
        self.dtype = dtype
        self.inserted: list[int] = []

    @property
    def coalesce(self) -> bool:
        return len(self.children_hashtable) > 1

    def ids(self, child: str | None = None) -> torch.Tensor:
        return torch.tensor(list(self.rows), dtype=torch.int64)

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        if embeddings.shape != (len(ids), self.dim) or embeddings.dtype != self.dtype:
            raise RuntimeError("insert: shape or dtype")
        self.inserted += ids.tolist()
        self.rows |= dict(zip(ids.tolist(), embeddings.clone(), strict=True))

    def forward(self, ids: torch.Tensor, admit_hook: object = None) -> torch.Tensor:
        zeros = torch.zeros(self.dim, dtype=self.dtype)
        found = [self.rows.get(i, zeros) for i in ids.reshape(-1).tolist()]
        return torch.stack(found).reshape(*ids.shape, self.dim) if found else torch.zeros(0, self.dim)


class Sparse(nn.Module):
    def __init__(self, fn: Callable[..., torch.Tensor], **tables: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        for name, table in tables.items():
            setattr(self, name, table)

    def forward(self, data: Any) -> dict[str, torch.Tensor]:
        return {"x": self.fn(self, data)}


def row(i: int, dim: int = 2) -> np.ndarray:
    """What the checkpoint holds for an id."""
    return np.arange(dim) + (i % 1000)


def table_of(ids: list[int], dim: int = 2, dtype: str = "<f4", num_parts: int = 2) -> list[PartSpec]:
    rows = np.stack([row(i, dim) for i in ids]).astype(dtype)
    return split_table(np.array(ids, np.int64), {"embedding": rows, "sparse_adam_exp_avg": rows + 1}, num_parts)


def open_finder(folder: Path, tables: dict[str, list[PartSpec]], misplaced: Any = None) -> RowFinder:
    """Write a checkpoint of these tables and return what finds its rows."""
    write_checkpoint(folder, tables)
    checkpoint = open_checkpoint(join(timeout_secs=1), open_directory(folder))
    return RowFinder(SourceRows(checkpoint=checkpoint, misplaced=misplaced))


def run(sparse: nn.Module, data: Any, finder: RowFinder, name: str = "sparse") -> tuple[torch.Tensor, Any]:
    blocks, counts = run_sparse_arch(sparse, data, sparse_model_name=name, finder=finder)
    return blocks.tensors["x"], counts


def rows(*ids: int, dim: int = 2) -> torch.Tensor:
    return torch.tensor(np.stack([row(i, dim) for i in ids]), dtype=torch.float32)
