"""An export leaves the caller's model as it was, and exports one in memory as it was, whatever its forward writes into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export

ROWS, DIM = 30, 4


class Counting(nn.Module):
    """Its lookups shorten rows (``max_norm``), and it counts its calls in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(ROWS, DIM, max_norm=1.0)
        self.register_buffer("saved", torch.zeros(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.saved += 1
        self.unsaved += 1
        return {"user": self.user(batch["user"])}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.linear(blocks["user"])


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Counting()
        self.dense_arch = Dense()

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(batch))


def build(seed: int) -> Model:
    torch.manual_seed(seed)
    model = Model()
    with torch.no_grad():
        model.sparse_arch.user.weight.mul_(3)
    return model


def batches() -> Iterator[dict[str, torch.Tensor]]:
    for first in (0, 5, 10):
        yield {"user": torch.arange(first, first + 8)}


def values_of(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def export(model: Model, out: Path, ckpt_dir: Path | None) -> None:
    settings: dict[str, Any] = {} if ckpt_dir is None else {"filter_sparse_opt": True}
    dist_export.Exporter(
        model, "sparse_arch", "dense_arch", batches(), None if ckpt_dir is None else str(ckpt_dir), str(out), **settings
    ).export(progress=False)


@pytest.mark.parametrize("is_live", [True, False])
def test_rows_that_a_lookup_shortens_and_buffers_that_a_forward_counts_in(is_live: bool, tmp_path: Path) -> None:
    trained = build(1)
    torch.save(trained.state_dict(), tmp_path / "ckpt.pt")
    model = trained if is_live else build(2)
    before, rows = values_of(model), trained.sparse_arch.user.weight.detach().clone().numpy()
    export(model, tmp_path / "out", None if is_live else tmp_path / "ckpt.pt")
    after = values_of(model)
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    found, has_row = dist_export.open_package(tmp_path / "out").lookup("sparse_arch.user.weight", np.arange(ROWS))
    assert has_row.all()
    np.testing.assert_array_equal(found, rows)
