"""The program of a package that is exported again: taken over byte by byte where no row changed, else left behind and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_model
from sparse_cases import export

import dist_export
from dist_export.config.schema import ExportConfig
from dist_export.errors import UserError
from dist_export.pipeline.dry_run import make_report
from dist_export.verify.verify import verify

MERGED = "torch_rank_weights_embs_table_multi_shard.json"


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package with a program and fg.json, of which one table was renamed, and both cast."""
    folder = tmp_path_factory.mktemp("source")
    tiny_model.write_tiny_checkpoint(folder / "ckpt")
    export(
        folder / "ckpt",
        folder / "first",
        num_shards=3,
        dtype={"user_emb": "int8", "*": "float16"},
        rename_tables={"user_emb": "u"},
        default_row={"item_emb": "zeros"},
        model="tiny_model:build_model",
        dataset="tiny_model:build_dataset",
        fg_conf_or_path={"features": []},
    )
    return folder / "first"


def dense_files(package: Path) -> dict[str, bytes]:
    manifest = dist_export.open_package(package).manifest
    names = [file.path for file in manifest.files if file.path == "fg.json" or "/" in file.path]
    return {name: (package / name).read_bytes() for name in names}


def list_dense(package: Path) -> dict[str, Any]:
    return {key: entry for key, entry in json.loads((package / MERGED).read_bytes()).items() if entry["dense"]}


def test_an_export_that_changes_no_row_takes_the_program_over(first: Path, tmp_path: Path) -> None:
    """And so does one of that package: each file as it is, scores and parameters listed as they were, all of it told."""
    before = dist_export.open_package(first).manifest
    again = export(first, tmp_path / "again", num_shards=2)
    export(tmp_path / "again", tmp_path / "third", num_shards=4, dtype={"*": "source"})
    for package in (tmp_path / "again", tmp_path / "third"):
        manifest = dist_export.open_package(package).manifest
        assert dense_files(package) == dense_files(first)
        assert len(dense_files(package)) > 8
        assert (manifest.dense, manifest.parity, manifest.drift) == (before.dense, before.parity, before.drift)
        assert manifest.parity is not None
        assert list_dense(package) == list_dense(first) != {}
        assert any("were taken over from" in note and "no score was compared anew" in note for note in manifest.notes)
        assert verify(str(package)).findings == []
    assert not any("not carried over" in note for note in again.notes)


@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": {"u": "float32"}},
        {"rename_tables": {"u": "v"}},
        {"prune": [{"tables": ["item_emb"], "norm_at_most": 2.0}]},
        {"drop_tables": ["item_emb"]},
        {"default_row": {"u": "zeros"}},
        {"fg_conf_or_path": {"features": []}},
        {"filter_sparse_opt": False},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_an_export_that_changes_a_row_leaves_the_program_behind(
    settings: dict[str, Any], first: Path, tmp_path: Path
) -> None:
    manifest = export(first, tmp_path / "again", **settings)
    assert (manifest.dense, manifest.parity, manifest.drift) == (None, None, None)
    assert not any("/" in file.path for file in manifest.files)
    (note,) = [note for note in manifest.notes if "not carried over" in note]
    assert "fx_user_model and fg.json" in note
    assert verify(str(tmp_path / "again")).findings == []


def test_plan_tells_the_same(first: Path, tmp_path: Path) -> None:
    for settings, words in (({}, "were taken over from"), ({"rename_tables": {"u": "v"}}, "not carried over")):
        config = ExportConfig(
            ckpt_dir=str(first), export_dir=str(tmp_path / "again"), filter_sparse_opt=True, **settings
        )
        assert sum(words in note for note in make_report(config, world_size=2)["notes"]) == 1


@pytest.mark.parametrize("is_shorter", [True, False])
def test_a_damaged_file_is_refused_before_anything_is_written(is_shorter: bool, first: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    for file in first.rglob("*"):
        if file.is_file():
            target = source / file.relative_to(first)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    path = source / "fx_user_model" / "graph.txt"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if is_shorter else data[:-1] + b"?")
    with pytest.raises(UserError, match=r"graph\.txt is not what the package's manifest\.json says"):
        export(source, tmp_path / "again")
    assert not (tmp_path / "again").exists()
