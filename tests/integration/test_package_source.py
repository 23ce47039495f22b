"""A package is the source of another one: its tables are resharded, pruned, renamed and cast as those of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import dist_export
from dist_export.errors import CheckpointError
from dist_export.formats.recis import MERGED
from dist_export.manifest import decode_manifest
from dist_export.pipeline.source_package import refuse_other_ids
from dist_export.verify.verify import verify
from tests.support.plain_cases import TABLES, make_model, read_numbered
from tests.support.recis_writer import make_tables, write_checkpoint
from tests.support.sparse_cases import export, plan


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


LIKE_A_ROW = tuple(np.array([0.3, -1.7, 1e-5, 123.456], np.float32).tolist())


def export_chain(folder: Path, *dtypes: str) -> Path:
    """Cast a table of one row, LIKE_A_ROW, which is the default row too, from package to package; "" casts nothing."""
    tables = make_tables({"user": 1}, 1, dim=4)
    tables["user"][0].slots["embedding"][:] = LIKE_A_ROW
    source = folder / "ckpt"
    write_checkpoint(source, tables)
    more: dict[str, object] = {"default_row": {"user": list(LIKE_A_ROW)}}
    for number, dtype in enumerate(dtypes):
        target = folder / f"package{number}"
        export(source, target, **({"dtype": {"*": dtype}} if dtype else {}), **more)
        source, more = target, {}
    return source


@pytest.mark.parametrize("first", ["int8", "float16", "bfloat16", ""])
@pytest.mark.parametrize("then", ["int8", "float16", "bfloat16", "float32", ""])
def test_a_default_row_is_cast_as_rows_are(first: str, then: str, tmp_path: Path) -> None:
    """An id without a row gets bit for bit what a row of the same values has become, from package to package."""
    package = dist_export.open_package(export_chain(tmp_path, first, then))
    (known,) = make_tables({"user": 1}, 1, dim=4)["user"][0].ids.tolist()
    raw, has_row = package.lookup("user", [known, known ^ 1], raw=True)
    assert has_row.tolist() == [True, False]
    assert raw[0].tobytes() == raw[1].tobytes() == package.default_row("user").tobytes()
    assert not verify(str(package.directory.path)).findings


@pytest.mark.parametrize("dtype", ["int8", "float16", "bfloat16"])
def test_a_default_row_is_that_of_a_direct_export(dtype: str, tmp_path: Path) -> None:
    for name in ("chain", "widened"):
        (tmp_path / name).mkdir()
    chain = dist_export.open_package(export_chain(tmp_path / "chain", "", dtype, ""))
    direct = dist_export.open_package(export_chain(tmp_path, dtype))
    assert chain.default_row("user").tobytes() == direct.default_row("user").tobytes()
    widened = dist_export.open_package(export_chain(tmp_path / "widened", dtype, "float32"))
    assert np.array_equal(widened.lookup("user", [12345])[0], direct.lookup("user", [12345])[0].astype(np.float32))


def test_a_default_row_that_is_set_anew_is_not_rounded(tmp_path: Path) -> None:
    source = export_chain(tmp_path, "float16")
    again = export(source, tmp_path / "again", dtype={"*": "float32"}, default_row={"user": list(LIKE_A_ROW)})
    assert again.tables[0].default_row == LIKE_A_ROW


SHARD = "model-000000-of-000001.safetensors"


def package_of(kind: str, folder: Path, **settings: object) -> Path:
    """A sound package of one shard: of tables by row number, or of a hash table."""
    if kind == "rows":
        torch.save(make_model(), folder / "ckpt.pt")
        export(folder / "ckpt.pt", folder / "first", treat_as_tables=TABLES, num_shards=1, **settings)
    else:
        write_checkpoint(folder / "ckpt", make_tables({"user": 70}, 2))
        export(folder / "ckpt", folder / "first", num_shards=1, **settings)
    return folder / "first"


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x40
    path.write_bytes(raw)


def flip_id(path: Path, row: int) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    (key,) = [key for key, its in header.items() if its.get("dtype") == "I64"]
    flip(path, 8 + length + header[key]["data_offsets"][0] + 8 * row)


@pytest.mark.parametrize("digest", ["xxh3", "sha256"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("rows", {"num_shards": 3}),
        ("rows", {"dtype": {"*": "float16"}}),
        ("rows", {"to_hash_tables": ["*"], "num_shards": 2}),
        ("hash", {"num_shards": 2}),
        ("hash", {"filter_sparse_opt": False}),
    ],
)
def test_a_damaged_row_is_not_handed_on(kind: str, settings: dict[str, object], digest: str, tmp_path: Path) -> None:
    """Verify finds it in the source, and could not in a package that was made of it."""
    first = package_of(kind, tmp_path, digest=digest)
    flip(first / SHARD, -2)
    with pytest.raises(CheckpointError, match=rf"{SHARD}: its content is not what was written.*`verify` tells more"):
        export(first, tmp_path / "again", **settings)
    assert not (tmp_path / "again").exists(), "nothing was written"
    flip(first / SHARD, -2)
    assert not verify(str(export(first, tmp_path / "again", **settings) and tmp_path / "again")).findings


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("settings", [{"num_shards": 2}, {"filter_sparse_opt": False}])
def test_damage_of_a_copy_is_not_handed_on(in_place: bool, settings: dict[str, object], tmp_path: Path) -> None:
    """A copy, and a checkpoint that is its own package, have shards with digests as new shards do."""
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"user": 70}, 2))
    first = source if in_place else tmp_path / "first"
    export(source, first, filter_sparse_opt=False)
    shard = first / "model-000001-of-000002.safetensors"
    flip(shard, -2)
    advice = r"remove manifest\.json" if in_place else "Copy the package again"
    with pytest.raises(CheckpointError, match=rf"{shard.name}: its content is not what was written.*{advice}"):
        export(first, tmp_path / "again", **settings)
    assert not (tmp_path / "again").exists(), "nothing was written"
    skipped = export(first, tmp_path / "skipped", **settings, digest="none")
    assert any("were not compared with its manifest" in note for note in skipped.notes)
    flip(shard, -2)
    assert not verify(str(export(first, tmp_path / "again", **settings) and tmp_path / "again")).findings


def test_a_checkpoint_saved_over_its_package_is_told(tmp_path: Path) -> None:
    source = tmp_path / "ckpt"
    write_checkpoint(source, make_tables({"user": 70}, 2))
    export(source, source, filter_sparse_opt=False)
    write_checkpoint(source, make_tables({"user": 90}, 2))
    with pytest.raises(
        CheckpointError, match=r"has .* bytes, the manifest says.*a trainer has saved here.*remove manifest"
    ):
        export(source, tmp_path / "out")
    (source / "manifest.json").unlink()
    assert export(source, tmp_path / "out").tables[0].rows_out == 90


@pytest.mark.parametrize("name", ["tensorkey.json", "index", MERGED])
def test_a_damaged_index_of_a_package_is_not_handed_on(name: str, tmp_path: Path) -> None:
    first = package_of("hash", tmp_path)
    (first / name).write_bytes((first / name).read_bytes() + b" ")
    with pytest.raises(CheckpointError, match=rf"{name}: has .* bytes, the manifest says"):
        export(first, tmp_path / "again")


def test_ids_are_compared_where_shards_have_no_digest(tmp_path: Path) -> None:
    first = package_of("hash", tmp_path, digest="none")
    sound = export(first, tmp_path / "sound", num_shards=2)
    assert any("1 shard without a digest" in note for note in sound.notes)
    flip_id(first / SHARD, 5)
    with pytest.raises(CheckpointError, match="table 'user' has other ids than were written"):
        export(first, tmp_path / "again", num_shards=2)
    with pytest.raises(CheckpointError, match="table 'user' has other ids than were written"):
        export(first, tmp_path / "again", num_shards=2, digest="none")
    assert not (tmp_path / "again").exists()


def test_rows_are_counted_against_the_manifest(tmp_path: Path) -> None:
    first = package_of("rows", tmp_path, digest="none")
    manifest = decode_manifest((first / "manifest.json").read_bytes(), where="it")
    table = msgspec.structs.replace(manifest.tables[0], rows_out=manifest.tables[0].rows_out + 1)
    planned = plan(first, num_shards=1)
    checkpoint, census = planned.plan.checkpoint, planned.census
    refuse_other_ids(checkpoint, census, manifest)
    with pytest.raises(CheckpointError, match=r"rows, and the package's manifest\.json says"):
        refuse_other_ids(checkpoint, census, msgspec.structs.replace(manifest, tables=(table, *manifest.tables[1:])))


def test_without_digests_a_package_is_not_read_again(tmp_path: Path) -> None:
    first = package_of("rows", tmp_path)
    flip(first / SHARD, -2)
    manifest = export(first, tmp_path / "again", num_shards=2, digest="none")
    assert any("with digest: none its files were not compared" in note for note in manifest.notes)
