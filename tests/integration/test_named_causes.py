"""Forms of models that are common and were refused without a cause: they are exported, or the error says what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_export
from dist_export.errors import ParityError

IDS = torch.arange(16)


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(50, 4), nn.Embedding(40, 4)

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"user": self.user(ids), "item": self.item(ids)}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"ctr": torch.sigmoid(self.linear(torch.cat([blocks["user"], blocks["item"]], dim=1)))}


class Model(nn.Module):
    def __init__(self, sparse: type[nn.Module] = Sparse, dense: type[nn.Module] = Dense) -> None:
        super().__init__()
        self.sparse_arch, self.dense_arch = sparse(), dense()

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


def export(
    folder: Path, model: nn.Module, state: Any = None, batch: Any = IDS, **settings: Any
) -> dist_export.Manifest:
    """Export a fresh ``model`` with the values of ``state``, by default those of another fresh one."""
    torch.save(type(model)().state_dict() if state is None else state, folder / "ckpt.pt")
    return dist_export.Exporter(
        model, "sparse_arch", "dense_arch", [batch], str(folder / "ckpt.pt"), str(folder / "out"), **settings
    ).export(progress=False)


def score(folder: Path, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
    output: Any = dist_export.open_package(folder / "out").load_program().module()(**blocks)
    return output[0] if isinstance(output, tuple) else output


class Closing(Dense):
    def __init__(self) -> None:
        super().__init__()
        score = lambda x: torch.sigmoid(self.linear(x))
        self.forward = lambda blocks: {"ctr": score(torch.cat([blocks["user"], blocks["item"]], dim=1))}


def test_a_forward_that_closes_over_self_is_exported(tmp_path: Path) -> None:
    trained = Model(dense=Closing).eval()
    manifest = export(tmp_path, Model(dense=Closing), trained.state_dict())
    assert manifest.parity is not None
    blocks = trained.sparse_arch(IDS)
    assert torch.allclose(score(tmp_path, blocks), trained.dense_arch(blocks)["ctr"], atol=1e-6)


def make_closed_class() -> Model:
    linear = nn.Linear(8, 1)

    class Closed(Dense):
        def forward(self, blocks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"ctr": torch.sigmoid(linear(torch.cat([blocks["user"], blocks["item"]], dim=1)))}

    model = Model(dense=Closed)
    model.dense_arch.linear = linear
    return model


def test_a_class_that_closes_over_a_module_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ParityError, match=r"reaches parameters of the model .*dense_arch\.forward\.linear.*through self"
    ):
        export(tmp_path, make_closed_class(), Model().state_dict())
