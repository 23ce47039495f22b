"""A package is the source of another one: its tables are resharded, pruned, renamed and cast as those of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_cases import TABLES, make_model, read_numbered
from recis_writer import make_tables, write_checkpoint
from sparse_cases import export

import dist_export


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A package with two tables by row number, one of them with a default row."""
    torch.save(make_model(), tmp_path / "ckpt.pt")
    export(
        tmp_path / "ckpt.pt", tmp_path / "first", treat_as_tables=TABLES, num_shards=3, default_row={"*user*": "zeros"}
    )
    return tmp_path / "first"


def test_tables_by_row_number_are_exported_again(numbered: Path, tmp_path: Path) -> None:
    """Their rows are those of the checkpoint, in another number of shards, and so is the default row."""
    manifest = export(numbered, tmp_path / "again", num_shards=2)
    model = make_model()
    rows = read_numbered(tmp_path / "again")
    assert {name: tensor.tolist() for name, tensor in rows.items()} == {
        name: model[name].tolist() for name in ("sparse_arch.ebc.embedding_bags.user.weight", "sparse_arch.item.weight")
    }
    assert manifest.num_shards == 2
    assert manifest.source.format == "package"
    assert {table.name: table.default_row for table in manifest.tables if isinstance(table.default_row, str)} == {
        "sparse_arch.ebc.embedding_bags.user.weight": "zeros"
    }


def test_a_package_is_pruned_renamed_and_cast(numbered: Path, tmp_path: Path) -> None:
    settings = {
        "rename_tables": {"*item.weight": "item"},
        "to_hash_tables": ["*item.weight"],
        "dtype": {"*user*": "float16"},
    }
    manifest = export(numbered, tmp_path / "again", **settings, prune=[{"tables": ["*item*"], "norm_at_most": 1.0}])
    item = make_model()["sparse_arch.item.weight"]
    (table,) = [table for table in manifest.tables if table.name == "item"]
    assert table.rows_out == int((item.norm(dim=1) > 1.0).sum())
    package = dist_export.open_package(tmp_path / "again")
    user = torch.as_tensor(package.lookup("sparse_arch.ebc.embedding_bags.user.weight", [0, 102])[0])
    assert torch.allclose(user.float(), make_model()["sparse_arch.ebc.embedding_bags.user.weight"][[0, 102]], atol=1e-2)
    cast = export(tmp_path / "again", tmp_path / "third")
    assert any("was cast from float32" in note for note in cast.notes)


def test_default_rows_of_hash_tables_are_carried_over(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", make_tables({"user": 70}, 2))
    first = export(tmp_path / "ckpt", tmp_path / "first", default_row={"user": "zeros"})
    again = export(tmp_path / "first", tmp_path / "again")
    assert again.tables[0].default_row == first.tables[0].default_row == "zeros"
