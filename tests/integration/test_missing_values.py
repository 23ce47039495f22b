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
    arches, batch = ("sparse_arch", "dense_arch"), models.inputs_of(model, models.batch_of())
    settings = {"serving": "off", **settings}
    exporter = Exporter(model, *arches, [batch], str(tmp_path / "c.pth"), tmp_path / "out", **settings)
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


class Before(NormBetween):
    """Ids are mapped to others before the sparse arch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("others", torch.arange(models.ROWS))

    def forward(self, batch: Any) -> Any:
        return self.dense_arch(self.sparse_arch({**batch, "user": self.others[batch["user"]]}))


@pytest.mark.parametrize(
    "settings", [{}, {"dtype": {"*": "float16"}}, {"prune": [{"tables": "*", "norm_at_most": 1.0}]}]
)
def test_what_forward_does_before_the_sparse_arch_is_refused_before_anything_is_written(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """Also where a setting changes rows, so that scores differ anyway."""
    settings = {"score_program": "off", "overwrite": True, "to_hash_tables": ["*"], **settings}
    export(tmp_path, Before().state_dict(), Before(), **settings)
    trained = Before()
    trained.others += 1
    trained.others %= models.ROWS
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    with pytest.raises(ModelError, match=r"gives other values of 'block' than sparse_arch\(batch\) does: .* Do within"):
        export(tmp_path, trained.state_dict(), Before(), **settings)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before


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


def test_what_the_checkpoint_has_in_another_way_is_not_said_to_be_lacking(tmp_path: Path) -> None:
    """It is a table by a setting, or in a state beside those of the two arches."""
    whole = models.train(Gate()).state_dict() | {"shift": torch.zeros(models.ROWS, models.DIM)}
    model = Gate()
    model.shift = nn.Parameter(torch.zeros(models.ROWS, models.DIM))
    model.norm.forward = lambda rows: rows + model.shift[0]
    with pytest.raises(ModelError, match=r"^shift: a table of the package, whose rows .* take it off treat_as_tables"):
        export(tmp_path, whole, model, treat_as_tables=["shift"])
    trained = models.train(Gate())
    states = {"sparse": trained.sparse_arch.state_dict(), "dense": trained.dense_arch.state_dict()}
    states |= {"norm": trained.norm.state_dict()}
    with pytest.raises(ModelError, match=r"^the checkpoint has norm\.\S+ .* beside the states of the two arches"):
        export(tmp_path, states, Gate())
    assert not (tmp_path / "out").exists()


def test_what_the_scores_do_not_read_may_be_lacking(tmp_path: Path) -> None:
    state = dict(models.train(Gate()).state_dict())
    for name in ("aux.weight", "aux.bias", "steps", "norm.num_batches_tracked"):
        del state[name]
    export(tmp_path, state, Gate())


def test_a_pattern_of_the_rest_that_is_one_of_the_dense_arch_too_is_of_the_dense_arch(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'nothing\.\*' matches no parameter of the dense arch"):
        export(tmp_path, models.train(Gate()).state_dict(), Gate(), allow_missing_dense=["nothing.*"])


class Counted(Gate):
    """Counts ids and keeps a mean: what is written is none of the scores, nor is what takes its shape alone."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(models.ROWS))
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        ids = batch["user"]
        self.count.index_add_(0, ids, torch.ones(len(ids)))
        self.count[ids] = 1
        self.mean.lerp_(batch["price"].mean(), 0.1)
        self.mean.copy_(batch["price"].mean())
        return super().forward({**batch, "price": batch["price"] + torch.zeros_like(self.mean)})


def test_what_forward_only_writes_may_be_lacking(tmp_path: Path) -> None:
    state = dict(models.train(Counted()).state_dict())
    for name in ("count", "mean", "steps"):
        del state[name]
    export(tmp_path, state, Counted(), score_program="off")


class ByNumpy(NormBetween):
    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "block": blocks["block"] * float(self.gain.numpy()[0])})


class ByList(NormBetween):
    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "block": blocks["block"] * self.gain.tolist()[0]})


class BySize(NormBetween):
    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "block": blocks["block"] * (self.gain > 0).nonzero().shape[0]})


@pytest.mark.parametrize("build", [ByNumpy, ByList, BySize])
def test_what_leaves_torch_may_reach_the_scores(tmp_path: Path, build: Any) -> None:
    state = dict(models.train(build()).state_dict())
    del state["gain"]
    with pytest.raises(ModelError, match="the checkpoint lacks gain, which"):
        export(tmp_path, state, build(), score_program="off")


class LikeWrapped(nn.Module):
    """A module called module, with a parameter of the same name: wrappers put such an element into names."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.LayerNorm(models.DIM)
        self.weight = nn.Parameter(torch.ones(models.DIM))

    def forward(self, values: Any) -> Any:
        return self.module(values) * self.weight


class ScaledArch(Projected):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = LikeWrapped()

    def forward(self, batch: Any) -> Any:
        return {"block": self.scaled(self.table(batch["user"])), "price": batch["price"]}


def build_scaled() -> nn.Module:
    return models.Model(ScaledArch(), models.DIM + 1)


def test_a_module_that_is_called_as_wrappers_call_theirs_has_its_own_values(tmp_path: Path) -> None:
    trained = models.train(build_scaled())
    package = export(tmp_path, trained.state_dict(), build_scaled())
    batch = models.batch_of(9, seed=4)
    with torch.no_grad():
        expected = trained.eval()(batch)["ctr"].numpy()
    np.testing.assert_allclose(package.score(batch)["ctr"], expected, rtol=1e-5, atol=1e-6)


def test_names_that_wrappers_make_one_are_refused_where_they_cannot_be_told_apart(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in models.train(build_scaled()).state_dict().items()}
    with pytest.raises(ModelError, match="are one name without the elements of wrappers"):
        export(tmp_path, state, build_scaled())


class ScaledBetween(NormBetween):
    def __init__(self) -> None:
        super().__init__()
        self.scaled = LikeWrapped()
        self.scaled.module = nn.Identity()
        self.scaled.module.weight = nn.Parameter(torch.ones(models.DIM))

    def forward(self, batch: Any) -> Any:
        blocks = self.sparse_arch(batch)
        return self.dense_arch({**blocks, "block": blocks["block"] * self.scaled.weight})


def test_so_has_one_between_the_arches(tmp_path: Path) -> None:
    trained = ScaledBetween()
    with torch.no_grad():
        trained.scaled.weight += 2.0
    with pytest.raises(ModelError, match="'block' is changed between the sparse arch and the dense arch"):
        export(tmp_path, trained.state_dict(), ScaledBetween(), score_program="off")
    state = {name: tensor for name, tensor in trained.state_dict().items() if name != "scaled.weight"}
    with pytest.raises(ModelError, match=r"the checkpoint lacks scaled\.weight"):
        export(tmp_path, state, ScaledBetween(), score_program="off")


class NamedAlike(models.Model):
    """The model has a layer of the same name as one within its sparse arch."""

    def __init__(self) -> None:
        super().__init__(Projected(), models.DIM + 1)
        self.proj = nn.Linear(models.DIM, models.DIM)


def test_a_name_within_the_sparse_arch_is_none_of_the_model(tmp_path: Path) -> None:
    state = dict(models.train(NamedAlike()).state_dict())
    del state["sparse_arch.proj.weight"]
    with pytest.raises(ModelError, match=r"the checkpoint lacks sparse_arch\.proj\.weight of the sparse arch"):
        export(tmp_path, state, NamedAlike())
