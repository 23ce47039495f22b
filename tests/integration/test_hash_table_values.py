"""Values that a hash table module has beside its rows: they are the checkpoint's, or the export says that it lacks them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_export
from dist_export.errors import ModelError
from tests.support import tiny_model
from tests.support.recis_writer import write_checkpoint

DIM = tiny_model.DIM


class Scaled(tiny_model.LookalikeTable):
    """Does nothing to its rows as long as it is fresh."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.scale = nn.Parameter(torch.ones(1))
        self.proj = nn.Linear(DIM, DIM, bias=False)
        nn.init.eye_(self.proj.weight)
        self.register_buffer("offset", torch.zeros(DIM))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.proj(super().forward(ids) * self.scale) + self.offset


class InBuffers(nn.Module):
    """Keeps ids and rows in buffers, which a checkpoint has as a table."""

    def __init__(self, name: str, capacity: int = 256) -> None:
        super().__init__()
        self._name = name
        self.register_buffer("keys", torch.full((capacity,), -1))
        self.values = nn.Parameter(torch.zeros(capacity, DIM), requires_grad=False)
        self.gain = nn.Parameter(torch.ones(1))

    def ids(self) -> torch.Tensor:
        return self.keys[self.keys != -1]

    def insert(self, ids: torch.Tensor, embeddings: torch.Tensor) -> None:
        for number, row in zip(ids.tolist(), embeddings, strict=True):
            held = torch.nonzero(self.keys == number).flatten()
            place = int(held[0]) if len(held) else int((self.keys != -1).sum())
            self.keys[place] = number
            self.values[place] = row

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        is_own = self.keys == ids.reshape(-1, 1)
        rows = torch.where(is_own.any(1, keepdim=True), self.values[is_own.int().argmax(1)], 0.0)
        return (rows * self.gain).reshape(*ids.shape, DIM)


class Model(tiny_model.TinyModel):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.sparse_arch.user = kind("user_emb")

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


def export(tmp_path: Path, kind: type[nn.Module], values: dict[str, torch.Tensor], **settings: Any) -> Any:
    state = tiny_model.trained_dense_state() | {f"sparse_arch.user.{name}": value for name, value in values.items()}
    write_checkpoint(tmp_path / "in", tiny_model.tables(), model_state=state)
    batches = [batch for _, batch in tiny_model.build_dataset()]
    settings |= {"export_dir": tmp_path / "out", "filter_sparse_opt": True, "overwrite": True}
    exporter = dist_export.Exporter(Model(kind), "sparse_arch", "dense_arch", batches, tmp_path / "in", **settings)
    return exporter.export(progress=False)


def trained() -> dict[str, torch.Tensor]:
    return {"scale": torch.full((1,), 2.0), "proj.weight": torch.eye(DIM).flip(0), "offset": torch.ones(DIM)}


@pytest.mark.parametrize("lacking", list(trained()))
def test_one_that_the_checkpoint_lacks_is_refused(lacking: str, tmp_path: Path) -> None:
    values = {name: value for name, value in trained().items() if name != lacking}
    with pytest.raises(ModelError, match=rf"the checkpoint lacks sparse_arch\.user\.{lacking} of the sparse arch"):
        export(tmp_path, Scaled, values)
    assert not (tmp_path / "out").exists()
    manifest = export(tmp_path, Scaled, values, score_program="off", allow_missing_dense=["sparse_arch.user.*"])
    told = f"taken from the model, not from the checkpoint: sparse_arch.user.{lacking}"
    assert any(told in note for note in manifest.notes)


def test_a_program_that_has_the_rows_alone_is_left_out_with_the_reason(tmp_path: Path) -> None:
    manifest = export(tmp_path, Scaled, trained())
    assert not manifest.score
    (told,) = [note for note in manifest.notes if "no score program" in note]
    assert "sparse_arch.user (Scaled): its forward does more than look rows up" in told
    assert "sparse_arch.item" not in told


def test_rows_that_a_table_keeps_in_buffers_are_no_such_values(tmp_path: Path) -> None:
    """What insert writes is the table; the checkpoint has it in its own files."""
    assert export(tmp_path, InBuffers, {"gain": torch.ones(1)}, score_program="off").parity.reference == "model"
    with pytest.raises(ModelError, match=r"the checkpoint lacks sparse_arch\.user\.gain of the sparse arch"):
        export(tmp_path, InBuffers, {}, score_program="off")
