"""One tensor of the model that both arches have, or the rest of the model has too: the checkpoint must say one thing of it.

``load_state_dict`` takes the last name's values for all of them, the package those of each name. The sample cannot tell: the
values differ where it does not look.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

from dist_export.dense import found_rows
from dist_export.errors import ModelError
from dist_export.manifest import Manifest
from tests.support import exports

ROWS, DIM = 30, 4
TABLE, DENSE_TABLE, ALIAS = "sparse_arch.items.weight", "dense_arch.again.weight", "alias.weight"
SCALE, DENSE_SCALE = "sparse_arch.scale", "dense_arch.same_scale"
ODD = 25
"""A row that the sample misses."""


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.items = nn.Embedding(ROWS, DIM)
        self.register_buffer("scale", torch.ones(ROWS))

    def forward(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"items": self.items(ids) * self.scale[ids][:, None], "ids": ids}


class Dense(nn.Module):
    def __init__(self, again: nn.Embedding, scale: torch.Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * DIM, 1)
        self.again = again
        self.register_buffer("same_scale", scale)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = blocks["ids"]
        both = torch.cat([blocks["items"], self.again(ids)], dim=1)
        return self.linear(both)[:, 0] * self.same_scale[ids]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sparse_arch = Sparse()
        self.dense_arch = Dense(self.sparse_arch.items, self.sparse_arch.scale)
        self.alias = self.sparse_arch.items

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(ids))


def save(changed: str | None, folder: Path, how: str, *, without: str | None = None) -> Path:
    torch.manual_seed(2)
    state = {name: value.clone() for name, value in Model().state_dict().items() if name != without}
    if changed is not None:
        state[changed][ODD] += 1
    path = folder / "ckpt"
    path.mkdir()
    if how == "torch":
        torch.save(state, path / "model.pt")
    elif how == "safetensors":
        save_file(state, path / "model.safetensors")
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(state, checkpoint_id=path, no_dist=True)
    return path


def export(ckpt: Path, out: Path, **settings: Any) -> Manifest:
    torch.manual_seed(7)
    exporter = exports.exporter(
        Model(), "sparse_arch", "dense_arch", [torch.arange(9)], str(ckpt), str(out), **settings
    )
    return exporter.export(progress=False)


@pytest.mark.parametrize("how", ["torch", "safetensors", "dcp"])
@pytest.mark.parametrize("changed", [DENSE_TABLE, TABLE, ALIAS, DENSE_SCALE, SCALE])
def test_two_values_for_one_tensor_are_refused_by_name(changed: str, how: str, tmp_path: Path) -> None:
    """Each name's values went where the name is: rows and scores were none of the model's, and nothing told."""
    ckpt = save(changed, tmp_path, how)
    others = [DENSE_SCALE, SCALE] if changed in (DENSE_SCALE, SCALE) else [TABLE, DENSE_TABLE, ALIAS]
    with pytest.raises(ModelError, match=rf"different values for them, first in row {ODD}:") as caught:
        export(ckpt, tmp_path / "out")
    told = str(caught.value)
    assert "one tensor for " in told
    assert "Nothing was written" in told
    assert repr(changed) in told
    assert sum(repr(name) in told for name in others) == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", [DENSE_TABLE, DENSE_SCALE])
def test_a_row_of_a_later_piece(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_rows, "_PIECES", (512 << 20) // (7 * 4 * DIM))  # of seven rows of the table
    ckpt = save(changed, tmp_path, "dcp")
    with pytest.raises(ModelError, match=rf"different values for them, first in row {ODD}:"):
        export(ckpt, tmp_path / "out")


def test_without_rows_in_the_package_the_program_counts_all_the_same(tmp_path: Path) -> None:
    ckpt = save(DENSE_SCALE, tmp_path, "torch")
    with pytest.raises(ModelError, match=f"'{DENSE_SCALE}' and '{SCALE}'"):
        export(ckpt, tmp_path / "out", need_export_sparse=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["torch", "dcp"])
@pytest.mark.parametrize("without", [None, ALIAS])
def test_one_value_for_one_tensor(without: str | None, how: str, tmp_path: Path) -> None:
    ckpt = save(None, tmp_path, how, without=without)
    manifest = export(ckpt, tmp_path / "out")
    assert [table.name for table in manifest.tables] == [TABLE]
