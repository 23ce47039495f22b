"""The score program of a package that is exported again: taken over, its lookups with the new names of tables."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from torch import nn

import dist_export
from dist_export.api import Exporter
from dist_export.archive.lookup_operator import list_lookups
from dist_export.verify.verify import verify
from tests.support import score_models as models
from tests.support.sparse_cases import export_with_scores as export

USER, CLICKS, TAGS = (f"sparse_arch.{name}.weight" for name in ("user", "clicks", "tags"))


def build() -> nn.Module:
    return models.Model(models.ThreeTables(), 3 * models.DIM + 1)


@pytest.fixture(scope="module", params=["pt2", "legacy"])
def first(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    checkpoint = models.save(models.train(build()), folder / "model.pth")
    exporter = Exporter(
        build(),
        "sparse_arch",
        "dense_arch",
        [models.batch_of()],
        checkpoint,
        folder / "first",
        score_program="require",
        archive_format=request.param,
    )
    exporter.export(progress=False)
    return folder / "first"


def test_lookups_have_the_new_names(first: Path, tmp_path: Path) -> None:
    """Two tables change places and one gets a new name: the scores are those of the source, bit for bit."""
    renamed = {USER: CLICKS, CLICKS: USER, TAGS: "tags"}
    manifest = export(first, tmp_path / "again", num_shards=2, rename_tables=renamed)
    assert manifest.score.tables == tuple(sorted([USER, CLICKS, "tags"]))
    assert any("lookups of the score program" in note and "new names" in note for note in manifest.notes)
    assert verify(str(tmp_path / "again")).findings == []
    batch = models.batch_of(9, seed=3)
    with dist_export.open_package(first) as old, dist_export.open_package(tmp_path / "again") as new:
        names = [[name for _, name in list_lookups(it.load_score_program().graph_module)] for it in (old, new)]
        assert names[1] == [renamed[name] for name in names[0]]
        np.testing.assert_array_equal(new.score(batch)["ctr"], old.score(batch)["ctr"])


def test_without_new_names_not_a_byte_changes(first: Path, tmp_path: Path) -> None:
    manifest = export(first, tmp_path / "again", num_shards=2)
    for name in (manifest.score.program, manifest.score.sample):
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()
    assert not any("lookups of the score program" in note for note in manifest.notes)


def test_score_program_off_leaves_it_behind(first: Path, tmp_path: Path) -> None:
    manifest = export(first, tmp_path / "again", num_shards=2, score_program="off")
    assert manifest.score is msgspec.UNSET
    assert manifest.dense is not None
    assert not any(file.path.startswith("score_program/") for file in manifest.files)
    assert any(note.startswith("fx_user_model was taken over from") for note in manifest.notes)
    assert verify(str(tmp_path / "again")).findings == []


def test_the_renamed_program_is_the_same_for_the_same_source(first: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        manifest = export(first, tmp_path / name, num_shards=2, rename_tables={TAGS: "tags"})
    one, two = ((tmp_path / name / manifest.score.program).read_bytes() for name in ("one", "two"))
    assert one == two
