"""A package with int8 rows is the source of another one: its rows are decoded where they are cast, else copied byte by byte."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import dist_export
from dist_export.cli import main
from dist_export.errors import ExportError, PlanError, UserError
from dist_export.pipeline.dry_run import make_report
from dist_export.verify.verify import verify
from tests.support import tiny_model
from tests.support.plain_cases import TABLES, make_model
from tests.support.recis_writer import make_tables, read_back, write_checkpoint
from tests.support.sparse_cases import copy, export

USER, ITEM = list(make_model())[:2]
DIM = 16


def unpack(rows: np.ndarray) -> torch.Tensor:
    """Return the values of rows with scale and bias (float32), rounded after the product and after the sum.

    torch, which may round once, is as near as that lets it be.
    """
    packed = torch.from_numpy(np.ascontiguousarray(rows))
    tail = packed[:, -8:].contiguous().view(torch.float32)
    scaled = packed[:, :-8].float() * tail[:, :1]
    values = scaled + tail[:, 1:]
    by_torch = torch.ops.quantized.embedding_bag_byte_unpack(packed)
    assert torch.allclose(values, by_torch, rtol=0, atol=4e-7 * float(tail.abs().max() * 255))
    return values


def bits(rows: np.ndarray) -> torch.Tensor:
    """Return rows as they are looked up or read back as a tensor; bfloat16 is read back as uint16."""
    tensor = torch.from_numpy(np.ascontiguousarray(rows))
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor


def assert_sound(package: Path) -> None:
    """Verify a package, its values too."""
    report = verify(str(package), finite=True)
    assert not report.findings, report.findings


@pytest.fixture
def hashed(tmp_path: Path) -> Path:
    """A package of one hash table with rows of int8, in three shards."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"user": 700}, 2, dim=DIM))
    export(tmp_path / "ckpt", tmp_path / "first", dtype={"*": "int8"}, num_shards=3, default_row={"user": [0.5] * DIM})
    return tmp_path / "first"


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """A package with two tables by row number, rows of int8."""
    torch.save(make_model(), tmp_path / "ckpt.pt")
    export(tmp_path / "ckpt.pt", tmp_path / "first", treat_as_tables=TABLES, dtype={"*": "int8"}, num_shards=3)
    return tmp_path / "first"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_hash_tables_are_decoded(dtype: str, hashed: Path, tmp_path: Path) -> None:
    """The values are those that the first package gives, rounded once; the note says what the first cast took."""
    first = read_back(hashed)["user"]
    manifest = export(hashed, tmp_path / "again", dtype={"user": dtype}, num_shards=2)
    again = read_back(tmp_path / "again")["user"]
    assert (again["id"] == first["id"]).all()
    expected = unpack(first["embedding"])
    assert torch.equal(bits(again["embedding"]), expected.to(getattr(torch, dtype)))
    (slot,) = [slot for slot in manifest.tables[0].kept if slot.name == "embedding"]
    assert (slot.dtype, slot.shape, slot.encoding, slot.dim) == (
        dtype,
        (DIM,),
        *(dist_export.manifest.msgspec.UNSET,) * 2,
    )
    assert slot.cast.source_dtype == "int8_rowwise"
    error = (expected.to(getattr(torch, dtype)).double() - expected.double()).abs()
    assert slot.cast.max_abs_error == error.max().item()
    before = dist_export.open_package(hashed).manifest.tables[0].kept[1].cast
    (note,) = [note for note in manifest.notes if "stays at the precision" in note]
    assert f"cast from float32 to int8_rowwise (largest error {before.max_abs_error:.3g}" in note
    assert slot.earlier_casts == (before,)
    assert manifest.tables[0].default_row == (0.5,) * DIM
    assert_sound(tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_of_tables_by_number_are_decoded(dtype: str, numbered: Path, tmp_path: Path) -> None:
    """A table that no pattern matches stays int8; also where the other becomes a hash table of another name."""
    export(
        numbered,
        tmp_path / "again",
        dtype={"*user*": dtype},
        to_hash_tables=["*user*"],
        rename_tables={"*user*": "user"},
    )
    before, after = dist_export.open_package(numbered), dist_export.open_package(tmp_path / "again")
    rows = list(range(103))
    old, new = before.lookup(USER, rows), after.lookup("user", rows)
    expected = torch.as_tensor(np.asarray(old[0])).to(getattr(torch, dtype)).float()
    assert torch.equal(torch.as_tensor(np.asarray(new[0])).float(), expected)
    items = list(range(61))
    assert np.array_equal(np.asarray(before.lookup(ITEM, items)[0]), np.asarray(after.lookup(ITEM, items)[0]))
    assert_sound(tmp_path / "again")


@pytest.mark.parametrize("dtype", [{}, {"*": "int8"}, {"*": "source"}])
def test_rows_that_stay_are_copied(dtype: dict[str, str], hashed: Path, tmp_path: Path) -> None:
    """From one number of shards to another, and so again; no cast is told, the encoding is, and the note stays."""
    first = read_back(hashed)["user"]
    export(hashed, tmp_path / "again", dtype=dtype, num_shards=2)
    manifest = export(tmp_path / "again", tmp_path / "third", dtype=dtype, num_shards=4)
    third = read_back(tmp_path / "third")["user"]
    assert third["embedding"].tobytes() == first["embedding"].tobytes()
    slot = manifest.tables[0].kept[1]
    assert (slot.encoding, slot.dim, slot.cast) == ("int8_rowwise", DIM, dist_export.manifest.msgspec.UNSET)
    assert slot.earlier_casts == (dist_export.open_package(hashed).manifest.tables[0].kept[1].cast,)
    assert any("was cast from float32 to int8_rowwise" in note for note in manifest.notes)
    assert_sound(tmp_path / "third")


def test_all_that_casts_took_is_told_after_several_packages(hashed: Path, tmp_path: Path, capsys) -> None:
    """Each cast of the chain is in the last package, oldest first, whatever package in between changed no value."""
    first = dist_export.open_package(hashed).manifest.tables[0].kept[1].cast
    second = export(hashed, tmp_path / "second", dtype={"user": "float32"}).tables[0].kept[1].cast
    export(tmp_path / "second", tmp_path / "third", num_shards=3)
    copy(tmp_path / "third", tmp_path / "fourth")
    third = export(tmp_path / "fourth", tmp_path / "fifth", dtype={"user": "float16"}).tables[0].kept[1]
    assert third.earlier_casts == (first, second)
    assert third.casts == (first, second, third.cast)
    assert [cast.source_dtype for cast in third.casts] == ["float32", "int8_rowwise", "float32"]
    (note,) = [its for its in export(tmp_path / "fifth", tmp_path / "sixth").notes if "stays at the precision" in its]
    assert re.search(
        r"cast from float32 to int8_rowwise \(.*then from int8_rowwise to float32 \(.*from float32 to float16", note
    )
    assert main(["inspect", str(tmp_path / "sixth")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("before that, cast from") == 3
    assert_sound(tmp_path / "sixth")


def test_rows_of_a_copy_are_known_to_be_encoded(hashed: Path, tmp_path: Path) -> None:
    """A package that was copied as it is tells in its manifest, too."""
    copied = copy(hashed, tmp_path / "copy")
    assert copied.tables[0].kept[1].encoding == "int8_rowwise"
    export(tmp_path / "copy", tmp_path / "again", dtype={"*": "float32"})
    expected = unpack(read_back(hashed)["user"]["embedding"])
    assert torch.equal(bits(read_back(tmp_path / "again")["user"]["embedding"]), expected)


@pytest.mark.parametrize("dtype", [{}, {"*": "float16"}])
def test_rows_are_pruned_by_their_values(dtype: dict[str, str], hashed: Path, tmp_path: Path) -> None:
    """The norm is that of the decoded row, not of its bytes."""
    first = read_back(hashed)["user"]
    norms = unpack(first["embedding"]).double().norm(dim=1)
    limit = float(norms.sort().values[349:351].mean())  # between two rows
    manifest = export(hashed, tmp_path / "again", dtype=dtype, prune=[{"tables": ["*"], "norm_at_most": limit}])
    again = read_back(tmp_path / "again")["user"]
    assert again["id"].tolist() == first["id"][(norms > limit).numpy()].tolist()
    assert 0 < manifest.tables[0].rows_out < manifest.tables[0].rows_in


def test_rows_of_one_value_are_pruned_by_it(tmp_path: Path) -> None:
    """Also where the limit is no whole number, which is not rounded as for rows of integers."""
    write_checkpoint(tmp_path / "ckpt", make_tables({"user": 200}, 2, dim=1))
    export(tmp_path / "ckpt", tmp_path / "first", dtype={"*": "int8"})
    first = read_back(tmp_path / "first")["user"]
    values = unpack(first["embedding"])[:, 0].double()
    rule = {"tables": ["*"], "slot": "embedding", "below": 0.25}
    export(tmp_path / "first", tmp_path / "again", prune=[rule])
    assert read_back(tmp_path / "again")["user"]["id"].tolist() == first["id"][(values >= 0.25).numpy()].tolist()


def test_default_rows_are_rows_of_values(hashed: Path, tmp_path: Path) -> None:
    """They have as many values as a decoded row; what no int8 row can hold is refused where the rows stay int8."""
    for default, reason in (([1.0] * (DIM + 8), "whose rows have 16"), ([2e38] * DIM, "does not fit int8")):
        with pytest.raises(PlanError, match=reason):
            export(hashed, tmp_path / "again", default_row={"user": default})
    assert not (tmp_path / "again").exists()
    manifest = export(hashed, tmp_path / "again", default_row={"user": [2e38] * DIM}, dtype={"*": "float32"})
    assert manifest.tables[0].default_row == (2e38,) * DIM
    missing = dist_export.open_package(tmp_path / "again").lookup("user", [-77])[0]
    assert np.asarray(missing).tolist() == [[np.float32(2e38)] * DIM]


def test_values_that_do_not_fit_are_told(tmp_path: Path) -> None:
    """Those of int8 rows beyond float16 fail the export, and are clamped where that is asked for."""
    tables = make_tables({"user": 40}, 1, dim=4)
    tables["user"][0].slots["embedding"][7] = 1e6
    write_checkpoint(tmp_path / "ckpt", tables)
    export(tmp_path / "ckpt", tmp_path / "first", dtype={"*": "int8"})
    with pytest.raises(ExportError, match=r"'user': 4 values do not fit float16"):
        export(tmp_path / "first", tmp_path / "again", dtype={"*": "float16"})
    manifest = export(tmp_path / "first", tmp_path / "again", dtype={"*": "float16"}, on_overflow="clamp")
    assert manifest.tables[0].kept[1].cast.out_of_range == 4


def test_plan_and_summary_tell_the_bytes(hashed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dist_export.ExportConfig(
        ckpt_dir=str(hashed), export_dir=str(tmp_path / "again"), filter_sparse_opt=True, dtype={"*": "float32"}
    )
    (table,) = make_report(config, world_size=2)["tables"]
    assert (table["slots"][1]["written"], table["slots"][1]["written_bytes"]) == ("float32", 700 * DIM * 4)
    manifest = dist_export.export(config)
    told = "\n".join(manifest.summary()) if hasattr(manifest, "summary") else str(manifest)
    assert "int8_rowwise -> float32, takes" in told


def test_a_model_is_refused_for_encoded_rows(hashed: Path, tmp_path: Path) -> None:
    settings = {"model": tiny_model.MODEL, "dataset": tiny_model.DATASET}
    with pytest.raises(UserError, match=r"rows of table 'user' are int8_rowwise in .* no model is run on such rows"):
        export(hashed, tmp_path / "again", **settings)
    assert not (tmp_path / "again").exists()
