"""What the sparse arch holds besides embeddings: its matrices are tables, and the rest has the trained values in the scores."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import dist_export
from dist_export.errors import ModelError

ROWS, DIM = 20, 4
SAMPLE = {"user": torch.tensor([3, 0, 19, 3, 7]), "item": torch.tensor([1, 2, 18, 0, 5])}


class Lookalike(nn.Module):
    """Has the surface of an embedding, and is none of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = ROWS, DIM
        self.weight = nn.Parameter(torch.randn(ROWS, DIM))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.weight[ids]


class Sparse(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.user = nn.Embedding(ROWS, DIM)
        if kind == "parameter":
            self.item = nn.Parameter(torch.randn(ROWS, DIM))
        elif kind == "dict":
            self.tables = nn.ParameterDict({"item": nn.Parameter(torch.randn(ROWS, DIM))})
        elif kind == "lookalike":
            self.item = Lookalike()
        else:
            self.item = nn.Embedding(ROWS, DIM)
            self.proj = nn.Linear(DIM, DIM)
            self.norm = nn.BatchNorm1d(DIM)
            self.scale = nn.Parameter(torch.randn(DIM))

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        user, ids = self.user(batch["user"]), batch["item"]
        if self.kind == "parameter":
            return {"user": user, "item": functional.embedding(ids, self.item)}
        if self.kind == "dict":
            return {"user": user, "item": self.tables["item"][ids]}
        item = self.item(ids)
        return {"user": user, "item": item if self.kind == "lookalike" else self.scale * self.norm(self.proj(item))}


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(2 * DIM, 1)

    def forward(self, blocks: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.sigmoid(self.out(torch.cat(list(blocks.values()), 1)))


class Model(nn.Module):
    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.sparse_arch, self.dense_arch = Sparse(kind), Dense()
        if kind == "layers":
            self.sparse_arch.norm.running_mean.uniform_(-1, 1)

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.dense_arch(self.sparse_arch(batch))


def export(tmp_path: Path, model: nn.Module, trained: nn.Module, **settings: Any) -> dist_export.Manifest:
    (tmp_path / "ck").mkdir()
    torch.save(trained.state_dict(), tmp_path / "ck" / "model.pt")
    exporter = dist_export.Exporter(
        model,
        "sparse_arch",
        "dense_arch",
        [SAMPLE],
        tmp_path / "ck",
        tmp_path / "out",
        filter_sparse_opt=True,
        **settings,
    )
    return exporter.export()


def scores(out: Path) -> torch.Tensor:
    """Return the sample's scores as the package has them."""
    with (out / "fx_user_model" / "output_base.pkl").open("rb") as file:
        found: torch.Tensor = pickle.load(file)
    return found


ITEM = {"parameter": "sparse_arch.item", "dict": "sparse_arch.tables.item", "lookalike": "sparse_arch.item.weight"}


@pytest.mark.parametrize("kind", ITEM)
def test_a_matrix_of_the_callers_own_is_a_table_and_scored_with_the_trained_rows(kind: str, tmp_path: Path) -> None:
    trained, fresh = Model(kind, 1), Model(kind, 2)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    manifest = export(tmp_path, fresh, trained)
    rows, found = dist_export.open_package(tmp_path / "out").lookup(ITEM[kind], list(range(ROWS)))
    assert found.all()
    assert torch.equal(torch.as_tensor(rows), trained.state_dict()[ITEM[kind]])
    with torch.no_grad():
        assert torch.allclose(scores(tmp_path / "out"), trained.eval()(SAMPLE), atol=1e-6)
    assert manifest.parity.reference == "model"
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


def test_the_drift_of_such_a_table_is_seen(tmp_path: Path) -> None:
    manifest = export(tmp_path, Model("parameter", 2), Model("parameter", 1), dtype={"*": "bfloat16"})
    assert manifest.drift.outputs["torch_output_0"].max_abs > 0


def note_on_scale(manifest: dist_export.Manifest) -> str:
    told = "had the checkpoint's values in the sample"
    (note,) = [note for note in manifest.notes if told in note and "sparse_arch.scale" in note]
    return note


def test_layers_of_the_sparse_arch_have_the_trained_values_in_the_scores(tmp_path: Path) -> None:
    trained, fresh = Model("layers", 1), Model("layers", 2)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    manifest = export(tmp_path, fresh, trained)
    with torch.no_grad():
        assert torch.allclose(scores(tmp_path / "out"), trained.eval()(SAMPLE), atol=1e-6)
    assert manifest.parity.from_files.max_abs["torch_output_0"] == 0
    assert "the score program has them" in note_on_scale(manifest)
    assert all(torch.equal(value, before[name]) for name, value in fresh.state_dict().items())


@pytest.mark.parametrize("score_program", ["require", "off"])
def test_the_account_and_the_note_say_whether_a_file_holds_such_a_layer(score_program: str, tmp_path: Path) -> None:
    manifest = export(tmp_path, Model("layers", 2), Model("layers", 1), score_program=score_program)
    is_held = score_program == "require"
    note = note_on_scale(manifest)
    assert ("the score program has them" in note) is is_held
    assert ("no file of the package holds them" in note) is not is_held
    fates = {other.name: (other.fate, other.reason) for other in manifest.account.others}
    assert fates["sparse_arch.scale"] == (("in_program", "") if is_held else ("left_out", "not_served"))
    assert manifest.account.in_program == sum(it.num_bytes for it in manifest.account.others if it.fate == "in_program")
    assert not any("left out" in note for note in manifest.notes)


def test_layers_of_another_shape_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    trained = Model("layers", 1)
    trained.sparse_arch.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(ModelError, match=r"sparse_arch.scale is \[1\] in the checkpoint, the model has \[4\]"):
        export(tmp_path, Model("layers", 2), trained)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ITEM)
def test_a_model_in_memory_keeps_its_own_matrices_too(kind: str, tmp_path: Path) -> None:
    model = Model(kind, 3)
    exporter = dist_export.Exporter(model, "sparse_arch", "dense_arch", [SAMPLE], None, tmp_path / "out")
    exporter.export()
    rows, found = dist_export.open_package(tmp_path / "out").lookup(ITEM[kind], list(range(ROWS)))
    assert found.all()
    assert torch.equal(torch.as_tensor(rows), model.state_dict()[ITEM[kind]])


def test_a_model_in_memory_that_maps_raw_ids_is_refused(tmp_path: Path) -> None:
    model = Model("parameter", 3)
    model.sparse_arch.mapper = nn.Module()
    model.sparse_arch.mapper.register_buffer("_mch_sorted_raw_ids", torch.arange(4))
    exporter = dist_export.Exporter(model, "sparse_arch", "dense_arch", [SAMPLE], None, tmp_path / "out")
    with pytest.raises(ModelError, match=r"sparse_arch.mapper maps raw ids to rows"):
        exporter.export()
    assert not (tmp_path / "out").exists()
