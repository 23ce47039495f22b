"""What the sparse arch has besides tables comes from the checkpoint, or the export says that it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.errors import ModelError
from tests.support import score_models as models


class Projected(nn.Module):
    """A table, and layers that a state_dict has too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(models.ROWS, models.DIM)
        self.proj = nn.Linear(models.DIM, models.DIM)
        self.norm = nn.BatchNorm1d(models.DIM)
        self.register_buffer("scale", torch.ones(models.DIM))
        self.register_buffer("scratch", torch.ones(models.DIM), persistent=False)

    def forward(self, batch: Any) -> Any:
        rows = self.norm(self.proj(self.table(batch["user"]))) * self.scale * self.scratch
        return {"block": rows, "price": batch["price"]}


def build() -> nn.Module:
    return models.Model(Projected(), models.DIM + 1)


class Tied(models.Model):
    """The projection has another name in the model, which comes first."""

    def __init__(self) -> None:
        super().__init__(Projected(), models.DIM + 1)
        sparse_arch, dense_arch = self.sparse_arch, self.dense_arch
        del self.sparse_arch, self.dense_arch
        self.alias = sparse_arch.proj
        self.sparse_arch, self.dense_arch = sparse_arch, dense_arch


def train() -> nn.Module:
    trained = models.train(build())
    with torch.no_grad():
        trained.sparse_arch.scale += 0.5
        trained.sparse_arch.norm.running_mean += 0.5
    return trained


def export(tmp_path: Path, state: Any, model: nn.Module, **settings: Any) -> Any:
    torch.save(state, tmp_path / "c.pth")
    exporter = Exporter(
        model, "sparse_arch", "dense_arch", [models.batch_of()], str(tmp_path / "c.pth"), tmp_path / "out", **settings
    )
    exporter.export(progress=False)
    return dist_export.open_package(tmp_path / "out")


def test_what_the_checkpoint_has_is_taken(tmp_path: Path) -> None:
    trained = train()
    package = export(tmp_path, trained.state_dict(), build())
    batch = models.batch_of(9, seed=4)
    with torch.no_grad():
        expected = trained.eval()(batch)["ctr"].numpy()
    np.testing.assert_allclose(package.score(batch)["ctr"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lacking", ["proj.weight", "proj.bias", "norm.running_mean", "scale"])
def test_what_the_checkpoint_lacks_is_refused_by_name(tmp_path: Path, lacking: str) -> None:
    state = train().state_dict()
    del state[f"sparse_arch.{lacking}"]
    with pytest.raises(ModelError, match=rf"the checkpoint lacks sparse_arch\.{lacking} of the sparse arch"):
        export(tmp_path, state, build())
    assert not (tmp_path / "out").exists()
    package = export(tmp_path, state, build(), allow_missing_dense=[f"sparse_arch.{lacking}"])
    told = f"taken from the model, not from the checkpoint: sparse_arch.{lacking}"
    assert any(told in note for note in package.manifest.notes)


class Scaled(nn.Embedding):
    """A table with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__(models.ROWS, models.DIM)
        self.gain = nn.Parameter(torch.ones(models.DIM))

    def forward(self, ids: Any) -> Any:
        return super().forward(ids) * self.gain


def test_a_parameter_beside_the_weight_of_an_embedding_is_no_table(tmp_path: Path) -> None:
    build = lambda: models.Model(models.Lookups(Scaled(), lambda its, batch: its.table(batch["user"])), models.DIM + 1)
    state = models.train(build()).state_dict()
    export(tmp_path, state, build(), overwrite=True)
    del state["sparse_arch.table.gain"]
    with pytest.raises(ModelError, match=r"lacks sparse_arch\.table\.gain"):
        export(tmp_path, state, build(), overwrite=True)


class Rotated(Projected):
    """A matrix of its own would be a table of the checkpoint, if that had it."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.eye(models.DIM))

    def forward(self, batch: Any) -> Any:
        blocks = super().forward(batch)
        return {**blocks, "block": blocks["block"] @ self.matrix}


def test_a_matrix_that_the_checkpoint_lacks_is_refused(tmp_path: Path) -> None:
    build = lambda: models.Model(Rotated(), models.DIM + 1)
    state = models.train(build()).state_dict()
    del state["sparse_arch.matrix"]
    with pytest.raises(ModelError, match=r"lacks sparse_arch\.matrix"):
        export(tmp_path, state, build())


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'sparse_arch\.other\.\*' matches no parameter of the sparse arch"):
        export(tmp_path, train().state_dict(), build(), allow_missing_dense=["sparse_arch.other.*"])


def test_a_tied_tensor_may_be_under_its_name_in_the_model(tmp_path: Path) -> None:
    """safetensors keeps one name of a tensor that has two."""
    trained = models.train(Tied())
    state = {name: tensor for name, tensor in trained.state_dict().items() if not name.startswith("sparse_arch.proj.")}
    assert "alias.weight" in state
    package = export(tmp_path, state, Tied())
    batch = models.batch_of(9, seed=4)
    with torch.no_grad():
        expected = trained.eval()(batch)["ctr"].numpy()
    np.testing.assert_allclose(package.score(batch)["ctr"], expected, rtol=1e-5, atol=1e-6)


class NormBetween(models.Model):
    """A layer between the arches that does nothing as long as it is fresh."""

    def __init__(self) -> None:
        super().__init__(
            models.Lookups(nn.Embedding(models.ROWS, models.DIM), models.WAYS["embedding"][1]), models.DIM + 1
        )
        self.norm = nn.BatchNorm1d(models.DIM, eps=1e-12)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "block": self.norm(blocks["block"]) * self.gain})


@pytest.mark.parametrize("settings", [{}, {"score_program": "off"}])
def test_a_trained_layer_between_the_arches_is_refused_though_it_is_neutral_when_fresh(
    tmp_path: Path, settings
) -> None:
    trained = NormBetween()
    with torch.no_grad():
        trained.norm.running_mean += 2.0
    with pytest.raises(ModelError, match="'block' is changed between the sparse arch and the dense arch"):
        export(tmp_path, trained.state_dict(), NormBetween(), **settings)
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_shape_outside_of_the_arches_is_no_matter(tmp_path: Path) -> None:
    state = models.train(build()).state_dict() | {"aux.weight": torch.zeros(7, 7)}
    model = build()
    model.aux = nn.Linear(3, 3)
    assert export(tmp_path, state, model).manifest.parity.reference == "model"
    assert model.aux.weight.shape == (3, 3)


class Gate(NormBetween):
    """The layer between the arches takes part only for values that no sample has; what is behind the scores is none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(3, 3)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        self.steps += 1
        blocks = self.sparse_arch(batch)
        rows = blocks["block"]
        scores = self.dense_arch({**blocks, "block": torch.where(rows > 1e6, self.norm(rows) * self.gain, rows)})
        return scores, self.aux(torch.ones(1, 3))


@pytest.mark.parametrize("lacking", ["gain", "norm.weight", "norm.running_var"])
def test_what_forward_reads_between_the_arches_and_the_checkpoint_lacks_is_refused(tmp_path: Path, lacking) -> None:
    """Also where the checkpoint has it under another name, or in another shape."""
    state = dict(models.train(Gate()).state_dict())
    held = state.pop(lacking)
    for other in ({}, {f"old.{lacking}": held}, {lacking: torch.ones(77)}):
        with pytest.raises(ModelError, match=rf"lacks {lacking}, which the model's forward computes with outside"):
            export(tmp_path, state | other, Gate())
    assert not (tmp_path / "out").exists()
    package = export(tmp_path, state, Gate(), allow_missing_dense=[lacking])
    assert any(
        f"the model's forward taken from the model, not from the checkpoint: {lacking}" in note
        for note in package.manifest.notes
    )


def test_what_the_scores_do_not_read_may_be_lacking(tmp_path: Path) -> None:
    state = dict(models.train(Gate()).state_dict())
    for name in ("aux.weight", "aux.bias", "steps", "norm.num_batches_tracked"):
        del state[name]
    export(tmp_path, state, Gate())


def test_a_pattern_of_the_rest_that_is_one_of_the_dense_arch_too_is_of_the_dense_arch(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'nothing\.\*' matches no parameter of the dense arch"):
        export(tmp_path, models.train(Gate()).state_dict(), Gate(), allow_missing_dense=["nothing.*"])
