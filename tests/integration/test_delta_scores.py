"""A delta with a model: it scores by itself as a full export does, and an export with wrong rows of the base fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.errors import DistExportError
from dist_export.verify.verify import verify
from tests.support import score_models as models
from tests.support.deltas import manifest_of


def build() -> nn.Module:
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


def train_on(model: nn.Module) -> nn.Module:
    """Change three rows of each table and the dense arch."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("sparse_arch"):
                parameter[:3] += 0.25
            else:
                parameter.add_(0.125)
    return model


def export(checkpoint: str, out: Path, **settings: Any) -> dist_export.Manifest:
    batch, model = models.inputs_of(build(), models.batch_of()), build()
    exporter = Exporter(model, "sparse_arch", "dense_arch", [batch], checkpoint, out, serving="off", **settings)
    return exporter.export(progress=False)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder, model = tmp_path_factory.mktemp("checkpoints"), models.train(build())
    before = models.save(model, folder / "before.pth")
    return before, models.save(train_on(model), folder / "after.pth")


@pytest.fixture(scope="module")
def base(checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the first checkpoint, which no test changes."""
    out = tmp_path_factory.mktemp("packages") / "base"
    export(checkpoints[0], out)
    return out


def test_a_delta_scores_as_the_full_export_and_as_the_model(checkpoints, base: Path, tmp_path: Path) -> None:
    _, after = checkpoints
    export(after, tmp_path / "full")
    made = export(after, tmp_path / "delta", base=str(base), score_program="require")
    assert made.parity is not None
    assert made.drift is not None
    assert all(entry.max_abs < 1e-5 for entry in made.drift.outputs.values())
    assert [table["rows_out"] for table in manifest_of(tmp_path / "delta")["tables"]] == [3, 3, 3]
    model = build()
    model.load_state_dict(torch.load(after))
    for size in (1, 2, 128):
        batch = models.batch_of(size, seed=size)
        inputs = models.inputs_of(model, batch)
        with (
            dist_export.open_package(tmp_path / "delta") as delta,
            dist_export.open_package(tmp_path / "full") as full,
            torch.no_grad(),
        ):
            found, expected, eager = delta.score(inputs), full.score(inputs), model.eval()(batch)
        assert found.keys() == expected.keys()
        for name, scores in found.items():
            assert scores.tobytes() == expected[name].tobytes()
            np.testing.assert_allclose(scores, eager[name].numpy(), rtol=1e-5, atol=1e-6)


def test_a_chain_scores_as_the_full_export(checkpoints, tmp_path: Path) -> None:
    """The second delta has other rows than the first, so that all three packages serve some."""
    before, after = checkpoints
    model = build()
    model.load_state_dict(torch.load(after))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("sparse_arch"):
                parameter[2:5] -= 0.5
    last = models.save(model, tmp_path / "last.pth")
    export(before, tmp_path / "base")
    export(after, tmp_path / "one", base=str(tmp_path / "base"))
    made = export(last, tmp_path / "two", base=str(tmp_path / "one"), delta_chain=2, score_program="require")
    export(last, tmp_path / "full")
    assert [table["rows_out"] for table in manifest_of(tmp_path / "two")["tables"]] == [3, 3, 3]
    assert made.drift is not None
    assert all(entry.max_abs < 1e-5 for entry in made.drift.outputs.values())
    inputs = {name: value for name, value in models.batch_of(128, seed=3).items() if name != "label"}
    with (
        dist_export.open_package(tmp_path / "two") as chain,
        dist_export.open_package(tmp_path / "full") as full,
    ):
        assert len(chain.layers) == 3
        found, expected = chain.score(inputs), full.score(inputs)
    for name, scores in found.items():
        assert scores.tobytes() == expected[name].tobytes()
    assert verify(str(tmp_path / "two")).findings == []


def test_casts_drift_as_in_a_full_export(checkpoints, tmp_path: Path) -> None:
    before, after = checkpoints
    settings: dict[str, Any] = {"dtype": {"*": "bfloat16"}, "score_program": "off"}  # the drift is of the dense arch
    export(before, tmp_path / "base", **settings)
    full = export(after, tmp_path / "full", **settings)
    delta = export(after, tmp_path / "delta", base=str(tmp_path / "base"), **settings)
    assert delta.drift == full.drift
    assert delta.drift is not None
    assert max(entry.max_abs for entry in delta.drift.outputs.values()) > 0


def test_rows_of_the_base_that_are_not_what_the_source_has_fail_the_export(
    checkpoints, base: Path, tmp_path: Path, monkeypatch
) -> None:
    """Were the comparison blind, the sample would have the base's rows where the checkpoint has others."""
    from dist_export.delta import same_rows

    _, after = checkpoints
    monkeypatch.setattr(same_rows, "_are_equal", lambda one, _: np.ones(len(one), bool))
    with pytest.raises(DistExportError):
        export(after, tmp_path / "delta", base=str(base), compare="exact")
    assert not (tmp_path / "delta" / "manifest.json").exists()
