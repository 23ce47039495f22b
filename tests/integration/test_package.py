"""Open, look up, describe, verify. Each check of ``verify`` is shown to be able to fail."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

import dist_export
from dist_export.errors import PackageError, UserError
from dist_export.inspect.describe import describe
from dist_export.manifest import Manifest, decode_manifest, encode_manifest, seal
from dist_export.verify.verify import verify
from tests.support import exports, tiny_model
from tests.support.recis_writer import truth_of, write_checkpoint

SHARD = "model-000000-of-000002.safetensors"
MERGED = "torch_rank_weights_embs_table_multi_shard.json"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("exported")
    source = tiny_model.write_tiny_checkpoint(base / "ckpt")
    exports.export(
        {
            "ckpt_dir": str(source),
            "export_dir": str(base / "out"),
            "filter_sparse_opt": True,
            "num_shards": 2,
            "model": tiny_model.MODEL,
            "dataset": tiny_model.DATASET,
        }
    )
    return base / "out"


@pytest.fixture
def package(exported: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return shutil.copytree(exported, tmp_path / "out")


def test_lookup_gives_rows_in_any_shape_and_says_what_is_missing(exported: Path) -> None:
    opened = dist_export.open_package(exported)
    truth = truth_of(tiny_model.tables())["user_emb"]
    ids = np.array([[truth["id"][3], 5555555], [truth["id"][3], truth["id"][0]]])
    rows, found = opened.lookup("user_emb", ids)
    assert rows.shape == (2, 2, tiny_model.DIM)
    assert rows.dtype == np.float32
    assert found.tolist() == [[True, False], [True, True]]
    assert np.array_equal(rows[0, 0], truth["embedding"][3])
    assert np.array_equal(rows[1, 1], truth["embedding"][0])
    assert not rows[0, 1].any()
    empty, _ = opened.lookup("user_emb", [])
    assert empty.shape == (0, tiny_model.DIM)


def test_lookup_widens_bfloat16(tmp_path: Path) -> None:
    from tests.support.recis_writer import PartSpec, Raw

    values = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    write_checkpoint(
        tmp_path / "ckpt", {"t": [PartSpec(np.array([7, 9]), {"embedding": Raw("BF16", bits)}, (0, 65536, 65536))]}
    )
    exports.export({"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True})
    rows, _ = dist_export.open_package(tmp_path / "out").lookup("t", [9, 7])
    assert np.array_equal(rows, values[::-1])


def test_lookup_finds_rows_that_a_copy_has_in_another_file_than_their_ids(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ckpt", tiny_model.tables(), files_per_shard=2)
    exports.export({"ckpt_dir": str(tmp_path / "ckpt"), "export_dir": str(tmp_path / "out")})
    assert verify(str(tmp_path / "out")).findings == []
    truth = truth_of(tiny_model.tables())["user_emb"]
    rows, found = dist_export.open_package(tmp_path / "out").lookup("user_emb", truth["id"])
    assert found.all()
    assert np.array_equal(rows, truth["embedding"])


def test_a_shard_that_goes_before_it_is_read_is_the_packages_error(package: Path, monkeypatch) -> None:
    """Of disks and stores as of all else: who serves from a package has one kind of error to expect."""
    monkeypatch.setattr("dist_export.package.file_pool._MAX_HELD", 0)
    opened = dist_export.open_package(package)
    table = opened.manifest.tables[0]
    for part in table.parts:
        opened.header(part.file)
        (package / part.file).unlink()
    with pytest.raises(PackageError, match=r"safetensors is gone .* it was replaced; open it again"):
        opened.lookup(table.name, np.arange(100_000))


def test_unknown_names_are_told(exported: Path) -> None:
    opened = dist_export.open_package(exported)
    with pytest.raises(PackageError, match=r"no table 'nope'.*user_emb"):
        opened.lookup("nope", [1])
    with pytest.raises(PackageError, match="no slot 'sparse_adam_exp_avg'"):
        opened.lookup("user_emb", [1], slot="sparse_adam_exp_avg")


def test_no_manifest_no_package(package: Path, tmp_path: Path) -> None:
    (package / "manifest.json").unlink()
    with pytest.raises(PackageError, match=r"no manifest.json.*run the export again"):
        dist_export.open_package(package)
    with pytest.raises(UserError, match="does not exist"):
        dist_export.open_package(tmp_path / "nowhere")


def test_a_sound_package_has_no_findings(exported: Path) -> None:
    report = verify(str(exported))
    assert report.findings == []
    assert any("100 rows" in line for line in report.checked)
    assert any("ctr max abs 0, max rel 0, 0 ULP; like" in line for line in report.checked)


def reseal(package: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Change the manifest as somebody would who also mends its digest, so that the check behind it is reached."""
    manifest = decode_manifest((package / "manifest.json").read_bytes(), where="")
    (package / "manifest.json").write_bytes(encode_manifest(seal(change(manifest))))


def restate(package: Path, *names: str) -> None:
    """Let the manifest state size and digest of files as they are now."""
    from dist_export.manifest import FileEntry
    from dist_export.storage.directory import digest_file
    from dist_export.storage.urls import open_directory

    def change(manifest: Manifest) -> Manifest:
        files = tuple(
            FileEntry(
                path=entry.path,
                num_bytes=(package / entry.path).stat().st_size,
                digest=digest_file(open_directory(package), entry.path),
            )
            if entry.path in names
            else entry
            for entry in manifest.files
        )
        return msgspec.structs.replace(manifest, files=files)

    reseal(package, change)


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def first_ids(package: Path) -> int:
    """Return the position of the first id of the first shard."""
    header = dist_export.open_package(package).header(SHARD)
    return int(header.begins[header.keys.index("user_emb.id/part_0_2")])


def break_id(package: Path) -> None:
    flip(package / SHARD, first_ids(package) + 1)  # the second byte decides on the slice


def break_duplicate(package: Path) -> None:
    data = bytearray((package / SHARD).read_bytes())
    begin = first_ids(package)
    data[begin : begin + 8] = data[begin + 8 : begin + 16]
    (package / SHARD).write_bytes(data)


def drop_table_row(manifest: Manifest) -> Manifest:
    table = msgspec.structs.replace(manifest.tables[0], rows_in=manifest.tables[0].rows_in + 1)
    return msgspec.structs.replace(manifest, tables=(table, *manifest.tables[1:]))


def break_id_within_slice(package: Path) -> None:
    """Change the bits of an id above those that decide on its slice."""
    flip(package / SHARD, first_ids(package) + 5)


def repeat_table(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, tables=(*manifest.tables, manifest.tables[0]))


def change_table(manifest: Manifest, **changes: object) -> Manifest:
    table = msgspec.structs.replace(manifest.tables[0], **changes)
    return msgspec.structs.replace(manifest, tables=(table, *manifest.tables[1:]))


def swap_slice(manifest: Manifest) -> Manifest:
    first, *rest = manifest.tables[0].parts
    return change_table(manifest, parts=(msgspec.structs.replace(first, slice=rest[0].slice), *rest))


def change_dtype(manifest: Manifest) -> Manifest:
    ids, embedding = manifest.tables[0].kept
    return change_table(manifest, kept=(ids, msgspec.structs.replace(embedding, dtype="float16")))


def forget_program(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(
        manifest, files=tuple(entry for entry in manifest.files if not entry.path.endswith("exported_model.pt"))
    )


def lead_out(manifest: Manifest, what: str) -> Manifest:
    if what == "part":
        first, *rest = manifest.tables[0].parts
        return change_table(manifest, parts=(msgspec.structs.replace(first, file=f"../{first.file}"), *rest))
    if what == "file":
        entry = msgspec.structs.replace(manifest.files[0], path="/etc/passwd")
        return msgspec.structs.replace(manifest, files=(entry, *manifest.files[1:]))
    dense = msgspec.structs.replace(manifest.dense, **{what: "../outside/x"})
    return msgspec.structs.replace(manifest, dense=dense)


@pytest.mark.parametrize("what", ["part", "file", "program", "folder"])
def test_no_path_leads_out_of_the_package(what: str, package: Path) -> None:
    reseal(package, lambda manifest: lead_out(manifest, what))
    with pytest.raises(PackageError, match="does not lie in the package"):
        dist_export.open_package(package)


@pytest.mark.parametrize("ids", [[1.5], [True], ["a"]])
def test_ids_that_are_no_integers_are_refused(ids: list[object], exported: Path) -> None:
    with pytest.raises(TypeError, match="ids are integers"):
        dist_export.open_package(exported).lookup("user_emb", ids)


def rename_output(document: dict) -> None:
    document["OutputNodes"][0]["OutputNodeName"] = "other"


BREAKS: list[tuple[str, Callable[[Path], object], tuple[str, ...], str]] = [
    ("a bit of a shard", lambda p: flip(p / SHARD, -1), (), "content is not what was written"),
    ("a shard cut short", lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:-4]), (), "the manifest says"),
    ("a shard gone", lambda p: (p / SHARD).unlink(), (), "missing"),
    ("a dense file gone", lambda p: (p / "fx_user_model" / "graph.txt").unlink(), (), "graph.txt: is missing"),
    ("a truncated header", lambda p: (p / SHARD).write_bytes((p / SHARD).read_bytes()[:20]), (SHARD,), "truncated"),
    ("an id of another slice", break_id, (SHARD,), "outside its slice"),
    ("an id twice", break_duplicate, (SHARD,), "stand twice"),
    (
        "a block that index forgets",
        lambda p: edit_json(p / "index", lambda d: d["block_index"].pop("user_emb.id/part_0_2")),
        ("index",),
        "index does not name it",
    ),
    (
        "a block that is nowhere",
        lambda p: edit_json(p / "index", lambda d: d["block_index"].update({"ghost.id/part_0_2": 0})),
        ("index",),
        "'ghost.id/part_0_2' should be in",
    ),
    (
        "a gap in the file numbers",
        lambda p: edit_json(p / "index", lambda d: d["file_index"].update({SHARD: 7})),
        ("index",),
        "crashes",
    ),
    (
        "a part that tensorkey forgets",
        lambda p: edit_json(p / "tensorkey.json", lambda d: d.pop("user_emb.id/part_0_2")),
        ("tensorkey.json",),
        "does not name 'user_emb.id/part_0_2'",
    ),
    (
        "two blocks of one name",
        lambda p: edit_json(
            p / "tensorkey.json", lambda d: d.update({"user_emb.id/part_1_2": d["user_emb.id/part_0_2"]})
        ),
        ("tensorkey.json",),
        "RecIS keeps one",
    ),
    ("no tensorkey.json", lambda p: (p / "tensorkey.json").unlink(), (), "tensorkey.json: is missing"),
    (
        "a merged manifest of another shape",
        lambda p: edit_json(p / MERGED, lambda d: d["user_emb.embedding/part_0_2"].update(shape=[1, 4])),
        (MERGED,),
        "has shape",
    ),
    (
        "a merged manifest without a part",
        lambda p: edit_json(p / MERGED, lambda d: d.pop("user_emb.embedding/part_0_2")),
        (MERGED,),
        "is missing",
    ),
    (
        "a merged manifest with wrong ids",
        lambda p: edit_json(p / MERGED, lambda d: d["user_emb.embedding/part_0_2"].update(hashmap_key="x")),
        (MERGED,),
        "has hashmap_key 'x'",
    ),
    (
        "a merged manifest with a ghost",
        lambda p: edit_json(p / MERGED, lambda d: d.update({"ghost.embedding/part_0_1": {"is_hashmap": True}})),
        (MERGED,),
        "is in no file",
    ),
    (
        "a merged manifest that hides a table",
        lambda p: edit_json(p / MERGED, lambda d: d["user_emb.embedding/part_0_2"].update(is_hashmap=False)),
        (MERGED,),
        "has is_hashmap False",
    ),
    ("a merged manifest that is a list", lambda p: (p / MERGED).write_text("[]"), (MERGED,), "should be a JSON object"),
    ("a merged manifest too deep", lambda p: (p / MERGED).write_text("[" * 100000), (MERGED,), "nested too deeply"),
    ("an id that became another", break_id_within_slice, (SHARD,), "not those that were exported"),
    ("a table listed twice", lambda p: reseal(p, repeat_table), (), "twice"),
    ("a part of another slice", lambda p: reseal(p, swap_slice), (), "the shards say"),
    ("a slot of another dtype", lambda p: reseal(p, change_dtype), (), "the shards say"),
    ("a program that nothing vouches for", lambda p: reseal(p, forget_program), (), "nothing vouches"),
    (
        "outputs that are no objects",
        lambda p: (p / "fx_user_model" / "output_info.json").write_text('{"OutputNodes": [1]}'),
        ("fx_user_model/output_info.json",),
        "Expected `object`, got `int`",
    ),
    ("an account that does not add up", lambda p: reseal(p, drop_table_row), (), "does not add up"),
    (
        "an output of another name",
        lambda p: edit_json(p / "fx_user_model" / "output_info.json", rename_output),
        ("fx_user_model/output_info.json",),
        "the manifest says [",
    ),
    (
        "inputs in another order",
        lambda p: (p / "fx_user_model" / "params_order.json").write_text('["user", "price", "item"]'),
        ("fx_user_model/params_order.json",),
        "the manifest says [",
    ),
    (
        "a program that is no archive",
        lambda p: (p / "fx_user_model" / "exported_model.pt").write_bytes(b"nothing"),
        ("fx_user_model/exported_model.pt",),
        "exported_model.pt",
    ),
]


@pytest.mark.parametrize(("damage", "names", "finding"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_each_check_can_fail(damage, names, finding, package: Path) -> None:
    damage(package)
    if names:
        restate(package, *names)
    findings = verify(str(package)).findings
    assert any(finding in line for line in findings), findings
    assert all("\n" not in line for line in findings)


def test_a_program_with_a_pickle_that_runs_code_is_refused_unopened(package: Path, tmp_path: Path) -> None:
    witness = tmp_path / "witness"

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {witness}",)

    import pickle

    program = package / "fx_user_model" / "exported_model.pt"
    broken = tmp_path / "broken.pt"
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(broken, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            if "sample_inputs" in member.filename and member.filename.endswith(".pt"):
                data = pickle.dumps(Evil())
            new.writestr(member, data)
    shutil.move(broken, program)
    restate(package, "fx_user_model/exported_model.pt")
    findings = verify(str(package)).findings
    assert any("exported_model.pt" in line for line in findings)
    assert not witness.exists()


def test_a_manifest_that_was_changed_is_refused(package: Path) -> None:
    edit_json(package / "manifest.json", lambda d: d["tables"][0].update(rows_out=1))
    with pytest.raises(PackageError, match="not what was committed"):
        dist_export.open_package(package)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"format": "dist_export"}', '{"format": "x", "schema_version": 1}', "[" * 100000]
)
def test_a_manifest_that_is_none_gives_one_line(text: str, package: Path) -> None:
    (package / "manifest.json").write_text(text)
    with pytest.raises(PackageError) as caught:
        dist_export.open_package(package)
    assert "\n" not in str(caught.value)


def test_readers_ignore_fields_that_they_do_not_know(package: Path) -> None:
    from dist_export.manifest import compute_digest

    document = json.loads((package / "manifest.json").read_text())
    document["later"] = {"a": 1}
    document["tables"][0]["later"] = 2
    document["digest"] = compute_digest(document)
    (package / "manifest.json").write_text(json.dumps(document))
    assert dist_export.open_package(package).manifest.tables[0].name == "user_emb"


def test_a_field_that_was_added_after_the_commit_is_found_out(package: Path) -> None:
    for indent in (None, 1):
        document = json.loads((package / "manifest.json").read_text())
        document["later"] = {"a": 1}
        (package / "manifest.json").write_text(json.dumps(document, indent=indent))
        with pytest.raises(PackageError, match="is not what was committed"):
            dist_export.open_package(package)


def test_a_later_schema_is_refused(package: Path) -> None:
    edit_json(package / "manifest.json", lambda d: d.update(schema_version=99))
    with pytest.raises(PackageError, match="newer dist_export"):
        dist_export.open_package(package)


def test_the_digest_leaves_out_the_run(exported: Path) -> None:
    manifest = dist_export.open_package(exported).manifest
    assert seal(msgspec.structs.replace(manifest, run={"other": 1})).digest == manifest.digest
    assert seal(msgspec.structs.replace(manifest, notes=("x",))).digest != manifest.digest


def test_describe_shows_tables_and_signature(exported: Path) -> None:
    found = describe(str(exported))
    assert [table["name"] for table in found["tables"]] == ["user_emb", "item_emb"]
    assert found["dense"]["inputs"][0] == {"name": "item", "dtype": "float32", "shape": ["batch", tiny_model.DIM]}
    assert found["dense"]["outputs"][0] == {"name": "ctr", "dtype": "float32", "shape": ["batch", 1]}
