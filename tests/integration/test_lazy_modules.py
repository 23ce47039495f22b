"""Lazy modules: the checkpoint gives them their shapes, and nothing else may."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_export.dense.copied_arch import note_unregistered
from dist_export.dense.load_state import load_dense_parameters
from dist_export.errors import ModelError
from dist_export.model.unwrap import copy_dense_arch, is_lazy
from tests.support import exports
from tests.support.score_models import DIM, ROWS, Batch, Lookups, Model, batch_of, inputs_of, save, train


class LazyHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(1))

    def forward(self, blocks: Batch) -> Batch:
        return {"ctr": torch.sigmoid(self.mlp(torch.cat(list(blocks.values()), dim=1)))}


def build(*, is_sparse_lazy: bool = False) -> nn.Module:
    model = Model(Lookups(nn.Embedding(ROWS, DIM), lambda its, batch: its.layer(its.table(batch["user"]))), DIM + 1)
    model.sparse_arch.layer = nn.LazyLinear(DIM) if is_sparse_lazy else nn.Identity()
    model.dense_arch = LazyHead()
    return model


def build_trained(*, is_sparse_lazy: bool = False) -> nn.Module:
    model = build(is_sparse_lazy=is_sparse_lazy)
    model(batch_of())
    return train(model)


def test_a_copy_has_the_shapes_of_the_checkpoint_and_runs_again() -> None:
    model, trained = build(), build_trained()
    copied = copy_dense_arch(model.dense_arch)
    load_dense_parameters(copied, trained.state_dict(), dense_model_name="dense_arch", allow_missing=[], where="it")
    blocks = trained.sparse_arch(batch_of())
    for _ in range(2):
        assert torch.equal(copied(blocks)["ctr"], trained.dense_arch(blocks)["ctr"])
    assert note_unregistered(model, model.dense_arch, "dense_arch") == []
    assert all(
        is_lazy(its) for its in (*model.dense_arch.parameters(), *model.dense_arch.buffers()) if not is_count(its)
    )


def is_count(tensor: torch.Tensor) -> bool:
    """Whether this is the buffer num_batches_tracked, which has its shape from the start."""
    return not is_lazy(tensor) and not tensor.dim()


def test_an_export_takes_shapes_and_values_from_the_checkpoint(tmp_path: Path) -> None:
    trained = build_trained()
    data = [inputs_of(trained, batch_of())]
    source = save(trained, tmp_path / "model.pt")
    manifest = exports.exporter(build(), "sparse_arch", "dense_arch", data, source, str(tmp_path / "out")).export()
    (note,) = [note for note in manifest.notes if "lazy" in note]
    assert "lazy modules, until the model is called): scores are those of dense_arch(sparse_arch(batch))" in note


@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("live", "dense_arch.mlp.0.weight"),
        ("allowed", "dense_arch.mlp.3.weight, dense_arch.mlp.3.bias have neither"),
        ("sparse", "sparse_arch.layer.weight, sparse_arch.layer.bias have neither"),
    ],
)
def test_what_nothing_gives_a_shape_is_refused(case: str, named: str, tmp_path: Path) -> None:
    """The first batch would fill it with random numbers."""
    trained = build_trained(is_sparse_lazy=case == "sparse")
    state = {key: its for key, its in trained.state_dict().items() if case != "allowed" or "mlp.3" not in key}
    torch.save(state, tmp_path / "model.pt")
    exporter = exports.exporter(
        build(is_sparse_lazy=case == "sparse"),
        "sparse_arch",
        "dense_arch",
        [inputs_of(trained, batch_of())],
        None if case == "live" else str(tmp_path / "model.pt"),
        str(tmp_path / "out"),
        **({"allow_missing_dense": ["mlp.3.*"]} if case == "allowed" else {}),
    )
    with pytest.raises(ModelError, match=named) as caught:
        exporter.export()
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()
