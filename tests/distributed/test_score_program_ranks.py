"""The score program of a sparse arch that is collective: the demo's tables, whose lookup is an all-to-all over the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

import dist_export
from dist_export.api import Exporter
from dist_export.errors import DistExportError
from dist_export.verify.verify import verify
from tests.support import sharded_model
from tests.support.distributed.ranks import run_ranks

pytestmark = pytest.mark.distributed


def export(rank: int, folder: str, settings: dict[str, Any]) -> Any:
    try:
        manifest = Exporter(
            sharded_model.Model(),
            "sparse_arch",
            "dense_arch",
            [(False, sharded_model.batch_of(7, rank))],
            f"{folder}/source",
            f"{folder}/out",
            filter_sparse_opt=True,
            **{"score_program": "require", **settings},
        ).export(progress=False)
    except DistExportError as error:
        return str(error)
    return manifest.score, [note for note in manifest.notes if "score program" in note]


def ends_with_a_collective(rank: int, folder: str) -> Any:
    """Export a model that averages its blocks over the ranks, which no lookup can stand for."""
    plain = sharded_model.SparseArch.forward

    def forward(self, batch):
        blocks = plain(self, batch)
        dist.all_reduce(blocks["item"])
        return blocks

    sharded_model.SparseArch.forward = forward
    try:
        return export(rank, folder, {})
    finally:
        sharded_model.SparseArch.forward = plain


@pytest.mark.parametrize("settings", [{}, {"lookup_modules": ["sparse_arch.user", "sparse_arch.profile"]}])
def test_lookups_are_in_the_place_of_the_collectives(settings: dict[str, Any], tmp_path: Path) -> None:
    sharded_model.write_source(tmp_path / "source")
    found = run_ranks(export, 2, tmp_path / "store", str(tmp_path), settings, timeout=240)
    entry, notes = found[0]
    assert entry.parity.batch_sizes == (7, 1, 2, 301)
    assert entry.row_modules == {"profile": "item_emb, age_emb, city_emb", "user": "user_emb"}
    assert len(notes) == (0 if settings else 1)
    package = dist_export.open_package(tmp_path / "out")
    for num_examples in (1, 2, 128):
        batch = sharded_model.batch_of(num_examples, num_examples + 50)
        scores = package.score(batch)
        for name, expected in sharded_model.expected_scores(batch).items():
            np.testing.assert_allclose(scores[name], expected, rtol=1e-5, atol=1e-6)
    assert verify(str(tmp_path / "out")).findings == []


def test_a_collective_that_remains_is_named_with_its_line(tmp_path: Path) -> None:
    sharded_model.write_source(tmp_path / "source")
    texts = run_ranks(ends_with_a_collective, 2, tmp_path / "store", str(tmp_path), timeout=240)
    assert len(set(texts)) == 1
    assert "a collective remains in it" in texts[0], texts[0]
    assert "test_score_program_ranks.py" in texts[0]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def export_live(rank: int, folder: str, settings: dict[str, Any]) -> Any:
    """Export from memory: each rank has the rows of its slices."""
    model = sharded_model.Model()
    model.dense_arch.load_state_dict(sharded_model.trained_dense().state_dict())
    sharded_model.fill(model, rank, 2)
    manifest = Exporter(
        model,
        "sparse_arch",
        "dense_arch",
        [(False, sharded_model.batch_of(7, rank))],
        None,
        f"{folder}/out",
        **{"score_program": "require", **settings},
    ).export(progress=False)
    return manifest.score, [note for note in manifest.notes if "score program" in note]


def test_a_model_in_memory_scores_from_the_shards_that_all_ranks_wrote(tmp_path: Path) -> None:
    settings = {"lookup_modules": ["user", "profile"]}
    run_ranks(export_live, 2, tmp_path / "store", str(tmp_path), settings, timeout=240)
    package = dist_export.open_package(tmp_path / "out")
    batch = sharded_model.batch_of(20, 9)
    for name, expected in sharded_model.expected_scores(batch).items():
        np.testing.assert_allclose(package.score(batch)[name], expected, rtol=1e-5, atol=1e-6)


def test_of_a_model_in_memory_on_ranks_modules_are_named_by_the_settings_alone(tmp_path: Path) -> None:
    """The rows of other ranks are in no file yet, so that nothing shows what a module returns."""
    _, notes = run_ranks(export_live, 2, tmp_path / "store", str(tmp_path), {"score_program": "auto"}, timeout=240)[0]
    assert len(notes) == 1
    assert "sparse.py" in notes[0]
