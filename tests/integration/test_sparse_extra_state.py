"""Extra state of modules in the sparse arch: the program has what the checkpoint holds, and the model keeps its own."""

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
from dist_export.manifest import Manifest
from tests.support import score_models as models


class Scaled(nn.Module):
    """A sparse arch that scales its rows by a number in its extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.user = nn.Embedding(models.ROWS, models.DIM)
        self.register_buffer("count", torch.zeros(2), persistent=False)
        self.settings = {"scale": 1.0}

    def get_extra_state(self) -> dict[str, Any]:
        return self.settings

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.settings.update(state)
        self.count.fill_(state["scale"])

    def forward(self, batch: models.Batch) -> models.Batch:
        return {"user": self.user(batch["user"]) * self.settings["scale"], "price": batch["price"]}


def build() -> nn.Module:
    return models.Model(Scaled(), models.DIM + 1)


def trained() -> nn.Module:
    model = models.train(build())
    model.sparse_arch.settings["scale"] = 3.0
    return model


def export(tmp_path: Path, model: nn.Module, state: dict[str, Any], **settings: Any) -> Manifest:
    torch.save(state, tmp_path / "model.pth")
    exporter = Exporter(
        model,
        "sparse_arch",
        "dense_arch",
        [models.batch_of()],
        str(tmp_path / "model.pth"),
        tmp_path / "out",
        score_program="require",
        **settings,
    )
    exporter.export(progress=False)
    return dist_export.open_package(tmp_path / "out").manifest


def scores(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(models.batch_of())["ctr"].numpy()


def test_the_score_program_has_the_checkpoints_extra_state(tmp_path: Path) -> None:
    model, source = build(), trained()
    own = scores(model)
    manifest = export(tmp_path, model, source.state_dict())
    found = dist_export.open_package(tmp_path / "out").score(models.batch_of())["ctr"]
    np.testing.assert_allclose(found, scores(source), rtol=1e-5, atol=1e-6)
    assert not any("were not run" in note or "is the model's own" in note for note in manifest.notes)
    assert any("(sparse_arch._extra_state)" in note for note in manifest.notes)
    assert model.sparse_arch.settings == {"scale": 1.0}
    assert model.sparse_arch.count.tolist() == [0.0, 0.0]
    np.testing.assert_array_equal(scores(model), own)


def test_allow_load_hooks_keeps_the_models_own(tmp_path: Path) -> None:
    source = trained()
    manifest = export(tmp_path, build(), source.state_dict(), allow_load_hooks=["sparse_arch"])
    source.sparse_arch.settings["scale"] = 1.0
    found = dist_export.open_package(tmp_path / "out").score(models.batch_of())["ctr"]
    np.testing.assert_allclose(found, scores(source), rtol=1e-5, atol=1e-6)
    (note,) = [note for note in manifest.notes if "were not run" in note]
    assert "sparse_arch (Scaled): its own set_extra_state" in note
    assert "extra state is the model's own" in note


def test_extra_state_that_the_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    state = {name: value for name, value in trained().state_dict().items() if not name.endswith("_extra_state")}
    manifest = export(tmp_path, build(), state)
    (note,) = [note for note in manifest.notes if "because the checkpoint has none" in note]
    assert note.endswith(": sparse_arch._extra_state")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"scale": Path()}, "sparse_arch._extra_state is in the checkpoint and cannot be taken: "),
        (
            {"other": 1.0},
            "sparse_arch._extra_state: the module's set_extra_state does not take what the checkpoint holds",
        ),
    ],
    ids=["an object", "refused"],
)
def test_what_cannot_be_loaded_is_refused_before_anything_is_written(tmp_path: Path, value, message: str) -> None:
    model, state = build(), trained().state_dict()
    state["sparse_arch._extra_state"] = value
    with pytest.raises(ModelError, match=message) as caught:
        export(tmp_path, model, state)
    assert "allow_load_hooks: ['sparse_arch']" in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert model.sparse_arch.count.tolist() == [0.0, 0.0]
