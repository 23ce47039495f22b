"""An embedding of the sparse arch whose weight is in RecIS's ``model.pt`` is a table of the package, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.support import exports, tiny_model
from tests.support.recis_writer import write_checkpoint


class Model(tiny_model.TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch.user = nn.Embedding(100, tiny_model.DIM)
        self.sparse_arch.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch(batch))


@pytest.mark.parametrize("is_filtered", [True, False])
def test_a_note_says_that_no_file_has_a_weight_where_this_is_so(is_filtered: bool, tmp_path: Path) -> None:
    """Copied files are those of hash tables alone."""
    state = tiny_model.trained_dense_state() | {
        "sparse_arch.user.weight": torch.randn(100, tiny_model.DIM),
        "sparse_arch.scale": torch.ones(1),
    }
    write_checkpoint(tmp_path / "in", {"item_emb": tiny_model.tables()["item_emb"]}, model_state=state)
    (_, batch), *_ = tiny_model.build_dataset()
    batches = [{**batch, "user": torch.tensor([3, 0, 99, 3, 7])}]
    settings = {"export_dir": tmp_path / "out", "filter_sparse_opt": is_filtered}
    exporter = exports.exporter(Model(), "sparse_arch", "dense_arch", batches, tmp_path / "in", **settings)
    manifest = exporter.export(progress=False)
    names = {table.name for table in manifest.tables}
    (told,) = [note for note in manifest.notes if "no file of the package holds them" in note]
    assert "sparse_arch.scale" in told
    assert ("sparse_arch.user.weight" in names) is is_filtered
    assert ("sparse_arch.user.weight" in told) is not is_filtered
