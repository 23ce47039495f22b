"""The score program: the whole model as one exported program, whose lookups read rows from the package's shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dist_export
from dist_export.api import Exporter
from tests.support import score_models as models


def run(tmp_path: Path, build, batch=None, **settings):
    """Export a trained model from a checkpoint into ``out``; return the package and the trained model."""
    trained = models.train(build())
    checkpoint = models.save(trained, tmp_path / "model.pth")
    settings = {"score_program": "require", **settings}
    dataset = [models.batch_of() if batch is None else batch]
    Exporter(build(), "sparse_arch", "dense_arch", dataset, checkpoint, tmp_path / "out", **settings).export(
        progress=False
    )
    return dist_export.open_package(tmp_path / "out"), trained


def three_tables() -> nn.Module:
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


@pytest.mark.parametrize("num_examples", [1, 2, 128])
def test_a_package_scores_from_ids_as_the_trained_model_does(tmp_path: Path, num_examples: int) -> None:
    package, trained = run(tmp_path, three_tables)
    batch = models.batch_of(num_examples, seed=num_examples)
    found = package.score(batch)
    with torch.no_grad():
        expected = trained(batch)
    assert list(found) == ["ctr"]
    np.testing.assert_allclose(found["ctr"], expected["ctr"].numpy(), rtol=1e-5, atol=1e-6)
    entry = package.manifest.score
    assert entry.parity.batch_sizes == (6, 1, 2, 301)
    assert entry.dropped_inputs == ("tags_weights", "tags_bounds", "label")
    assert entry.tables == ("sparse_arch.clicks.weight", "sparse_arch.tags.weight", "sparse_arch.user.weight")
