"""The account of a model in memory: what is neither a table nor in the program is left out by name, as of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_export
from dist_export.manifest import AccountEntry

IDS = torch.arange(16)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(50, 4)
        self.mix = nn.Linear(4, 4)
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("passing", torch.zeros(3), persistent=False)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.mix(self.user(ids))}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(blocks["user"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = Sparse(), Dense()
        self.head = nn.Linear(1, 2)
        self.tied = self.dense_arch.linear

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.dense_arch(self.sparse_arch(ids)))


OUTSIDE = {
    "head.bias": 8,
    "head.weight": 8,
    "sparse_arch.mix.bias": 16,
    "sparse_arch.mix.weight": 64,
    "sparse_arch.seen": 12,
}
DENSE = {"dense_arch.linear.weight": 16, "dense_arch.linear.bias": 4}


def export(model: nn.Module, out: Path, dataset: Any) -> Any:
    return dist_export.Exporter(model, "sparse_arch", "dense_arch", dataset, None, str(out)).export(progress=False)


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel], ids=["plain", "wrapped"])
def test_what_is_in_no_file_is_named(wrap: Any, tmp_path: Path) -> None:
    """A head outside both arches is in no file. A linear layer of the sparse arch is in the score program."""
    manifest = export(wrap(Model()), tmp_path / "out", iter([IDS]))
    account = manifest.account
    assert isinstance(account, AccountEntry)
    left = {its.name: (its.num_bytes, its.reason) for its in account.others if its.fate == "left_out"}
    outside = {name: size for name, size in OUTSIDE.items() if not name.startswith("sparse_arch.mix.")}
    assert left == {name: (size, "not_served") for name, size in outside.items()}
    assert account.left_out == {"not_served": sum(outside.values())}
    assert account.num_bytes == account.total == 50 * 16 + sum(OUTSIDE.values()) + sum(DENSE.values())
    assert any("5 tensors of the model (head.bias, head.weight" in note for note in manifest.notes)


def test_without_a_program_the_dense_arch_is_left_out_too(tmp_path: Path) -> None:
    manifest = export(Model(), tmp_path / "out", None)
    account = manifest.account
    assert isinstance(account, AccountEntry)
    left = {its.name: its.num_bytes for its in account.others if its.fate == "left_out"}
    assert left == OUTSIDE | DENSE
