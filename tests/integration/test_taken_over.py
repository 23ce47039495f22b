"""The program of a package that is exported again: taken over byte by byte where no row changed, else left behind and told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import dist_export
from dist_export.config.schema import ExportConfig
from dist_export.errors import UserError
from dist_export.pipeline.dry_run import make_report
from dist_export.verify.verify import verify
from tests.support import tiny_model
from tests.support.sparse_cases import export_with_scores as export

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
        model=tiny_model.MODEL,
        dataset=tiny_model.DATASET,
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
    assert "fx_user_model, score_program and fg.json" in note
    assert verify(str(tmp_path / "again")).findings == []


def test_plan_tells_the_same(first: Path, tmp_path: Path) -> None:
    for settings, words in (({}, "were taken over from"), ({"default_row": {"u": "zeros"}}, "not carried over")):
        config = ExportConfig(
            ckpt_dir=str(first), export_dir=str(tmp_path / "again"), filter_sparse_opt=True, **settings
        )
        assert sum(words in note for note in make_report(config, world_size=2)["notes"]) == 1


def test_other_names_of_tables_are_no_other_program(first: Path, tmp_path: Path) -> None:
    """Two of them may even change places: the dense program has no name of a table in it, and gives the scores that it gave."""
    manifest = export(first, tmp_path / "again", num_shards=2, rename_tables={"u": "item_emb", "item_emb": "u"})
    before = dist_export.open_package(first).manifest
    files, old_files = dense_files(tmp_path / "again"), dense_files(first)
    for name in ("fx_user_model/sample_rows.json", "fx_user_model/default_rows.json"):
        listed, was = json.loads(files.pop(name)), json.loads(old_files.pop(name))
        assert listed == {"u": was["item_emb"], "item_emb": was["u"]}
    for its in (files, old_files):
        its.pop(manifest.score.program)  # its lookups have the new names
    assert files == old_files
    assert (manifest.dense, manifest.parity, manifest.drift) == (before.dense, before.parity, before.drift)
    assert list_dense(tmp_path / "again") == list_dense(first)
    assert any("fg.json names tables as the trainer does, the package otherwise" in note for note in manifest.notes)
    assert verify(str(tmp_path / "again")).findings == []
    with dist_export.open_package(first) as old, dist_export.open_package(tmp_path / "again") as new:
        for was, is_now in (("u", "item_emb"), ("item_emb", "u")):
            scored = json.loads((first / "fx_user_model" / "sample_rows.json").read_bytes())[was]
            ids = np.array([row["id"] for row in scored])
            rows, has_row = old.lookup(was, ids)
            assert has_row.any()
            assert all(map(np.array_equal, (rows, has_row), new.lookup(is_now, ids)))


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


@pytest.fixture
def beside(first: Path, tmp_path: Path) -> Path:
    """A copy of the package, to which somebody has added files."""
    return Path(shutil.copytree(first, tmp_path / "beside"))


@pytest.mark.parametrize("name", ["model.pt", "last.ckpt", "pytorch_model.bin", "other.safetensors", ".metadata"])
def test_files_beside_a_package_are_no_part_of_it(name: str, first: Path, beside: Path, tmp_path: Path) -> None:
    """They shape nothing, whatever they hold, and a note names them."""
    state = {f"dense_arch.{key}": its + 1 for key, its in tiny_model.build_model().dense_arch.state_dict().items()}
    if name == ".metadata":
        (beside / name).write_bytes(b"x")
    elif name == "other.safetensors":
        save_file({"foreign.weight": torch.ones(3, 3)}, beside / name)
    else:
        torch.save(state, beside / name)
    again, clean = export(beside, tmp_path / "again"), export(first, tmp_path / "clean")
    assert [(file.path, file.digest) for file in again.files] == [(file.path, file.digest) for file in clean.files]
    assert again.account == clean.account
    assert any(f"these files are no part of it: {name}; they are not read" in note for note in again.notes)
    assert not any("no part of it" in note for note in clean.notes)


def test_a_model_is_not_loaded_from_a_file_beside_a_package(tmp_path: Path) -> None:
    """Its names may fit: these are the values of some other training."""
    beside = tmp_path / "beside"
    export(tiny_model.write_tiny_checkpoint(tmp_path / "another"), beside)
    shutil.copy(tmp_path / "another" / "model.pt", beside / "model.pt")
    with pytest.raises(UserError, match="is a package, which has a program and no dense parameters"):
        export(
            beside,
            tmp_path / "out",
            model=tiny_model.MODEL,
            dataset=tiny_model.DATASET,
        )
    assert not (tmp_path / "out").exists()
