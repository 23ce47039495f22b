"""Packages of tables whose rows go by number: how they are written, looked up and described, and what ``verify`` finds."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

import dist_export
from dist_export.config.schema import ExportConfig
from dist_export.errors import PackageError
from dist_export.inspect.describe import describe, render
from dist_export.manifest import Manifest
from dist_export.package.held_file import HeldFile
from dist_export.pipeline.dry_run import make_report, render_report
from dist_export.reporting.summary import summarize
from dist_export.verify.verify import verify
from tests.integration.test_package import edit_json, reseal, restate
from tests.support.numbered_source import Numbered, make_rows, plug_in, write_source
from tests.support.recis_writer import Raw, make_tables, read_back, read_header, truth_of
from tests.support.sparse_cases import content, export, recorded_reads, tiny

A, B = "model-000000-of-000002.safetensors", "model-000001-of-000002.safetensors"
INDEX, TENSORKEY, MANIFEST = "index", "tensorkey.json", "manifest.json"
MERGED = "torch_rank_weights_embs_table_multi_shard.json"
T, U, HASH = "ebc.embedding_bags.t.weight", "u.weight", "clicks"
ROWS = {T: make_rows(11, seed=1), U: make_rows(3, 2, seed=2)}
MOMENTUM = make_rows(11, 1, seed=3)[:, 0].copy()


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch)


def numbered_tables() -> dict[str, Any]:
    return {
        T: Numbered({"embedding": ROWS[T], "momentum1": MOMENTUM}, (0, 2, 2, 7)),
        U: Numbered({"embedding": ROWS[U]}, (0,)),
    }


def hash_tables() -> dict[str, Any]:
    return make_tables({HASH: 30}, 2, seed=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``mixed`` holds both kinds of table and a dense tensor; ``bare`` holds tables by number alone."""
    base = tmp_path_factory.mktemp("numbered")
    with pytest.MonkeyPatch.context() as monkeypatch:
        plug_in(monkeypatch)
        dense = {"w": np.ones(3, np.float32)}
        write_source(base / "mixed_ckpt", {**numbered_tables(), **hash_tables()}, dense=dense)
        write_source(base / "bare_ckpt", numbered_tables())
        for kind in ("mixed", "bare"):
            export(base / f"{kind}_ckpt", base / kind, num_shards=2)
    return base


@pytest.fixture
def mixed(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / "mixed", tmp_path / "mixed")


@pytest.fixture
def bare(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written / "bare", tmp_path / "bare")


def read_numbered(folder: Path, stem: str) -> np.ndarray:
    """Put the blocks of one slot together by their names alone, as TorchEasyRec's reader does."""
    parts: dict[int, np.ndarray] = {}
    for path in sorted(folder.glob("model-*.safetensors")):
        start, header = read_header(path)
        for key, entry in header.items():
            name, _, part = key.rpartition("/part_")
            if name == stem:
                number, total = map(int, part.split("_"))
                begin, end = entry["data_offsets"]
                dtype = {"F32": np.float32, "BF16": np.uint16}[entry["dtype"]]
                parts[number] = np.frombuffer(path.read_bytes()[start + begin : start + end], dtype)
                parts[number] = parts[number].reshape(entry["shape"])
    assert sorted(parts) == list(range(total))
    return np.concatenate([parts[number] for number in sorted(parts)])


def told(folder: Path, **settings: Any) -> set[tuple[str, str]]:
    report = verify(str(folder), **settings)
    assert all("\n" not in line for line in report.findings)
    return {(finding.file, finding.check) for finding in report.found}


# ---- what is written ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 16, "source"])
def test_rows_go_over_by_number(num_shards: int | str, tmp_path: Path) -> None:
    """More shards than rows leave parts that are empty; small pieces of work change nothing."""
    tuning = tiny()
    write_source(tmp_path / "ckpt", {**numbered_tables(), **hash_tables()})
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=num_shards, keep_slots=["momentum1"], tuning=tuning)
    for table, rows in ROWS.items():
        assert np.array_equal(read_numbered(tmp_path / "out", table), rows)
    assert np.array_equal(read_numbered(tmp_path / "out", f"{T}.momentum1"), MOMENTUM)
    assert told(tmp_path / "out", finite=True, tuning=tuning) == set()
    package = dist_export.open_package(tmp_path / "out")
    found, is_there = package.lookup(U, np.arange(3))
    assert is_there.all()
    assert np.array_equal(found, ROWS[U])


def test_both_kinds_of_table_lie_in_one_package(written: Path) -> None:
    """RecIS's own reader finds the hash table; the numbered ones are in the merged manifest as TorchEasyRec has them."""
    hidden = {name: (written / "mixed" / name).read_bytes() for name in (INDEX, TENSORKEY)}
    assert not any(T.encode() in raw or U.encode() in raw for raw in hidden.values())
    merged = json.loads((written / "mixed" / MERGED).read_bytes())
    assert merged[f"{T}/part_1_2"] == {
        "name": f"{T}/part_1_2",
        "dense": False,
        "dimension": 4,
        "dtype": "float32",
        "memory": 5 * 4 * 4,
        "shape": [5, 4],
        "is_hashmap": False,
    }
    assert "memory" not in merged[f"{HASH}.embedding/part_1_2"]
    assert f"{T}.momentum1/part_0_2" not in merged
    truth = truth_of(hash_tables())[HASH]
    found, is_there = dist_export.open_package(written / "mixed").lookup(HASH, truth["id"])
    assert is_there.all()
    assert np.array_equal(found, truth["embedding"])


def test_without_hash_tables_there_are_no_indexes(written: Path) -> None:
    assert sorted(path.name for path in (written / "bare").iterdir()) == [MANIFEST, A, B, MERGED]


def test_hash_tables_beside_them_are_written_as_if_alone(written: Path, tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", hash_tables(), dense={"w": np.ones(3, np.float32)})
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=2)
    for name in (INDEX, TENSORKEY):
        assert (tmp_path / "out" / name).read_bytes() == (written / "mixed" / name).read_bytes()
    assert set(read_back(tmp_path / "out")) == {HASH}


def test_an_empty_table_is_sound(tmp_path: Path) -> None:
    write_source(tmp_path / "ckpt", {"e.weight": Numbered({"embedding": make_rows(0)})})
    manifest = export(tmp_path / "ckpt", tmp_path / "out", num_shards=3)
    assert [part.rows for part in manifest.tables[0].parts] == [0, 0, 0]
    assert told(tmp_path / "out") == set()
    rows, found = dist_export.open_package(tmp_path / "out").lookup("e.weight", [0, 1])
    assert rows.shape == (2, 4)
    assert not found.any()


def test_the_manifest_says_what_recis_does_not_read(written: Path) -> None:
    """Once, with the way out; a package of hash tables alone says nothing."""
    notes = dist_export.open_package(written / "mixed").manifest.notes
    (note,) = [note for note in notes if "row-indexed" in note]
    assert "2 tables" in note
    assert "to_hash_tables" in note


def test_a_rerun_of_the_same_export_is_the_same_package(written: Path, tmp_path: Path) -> None:
    export(written / "mixed_ckpt", tmp_path / "out", num_shards=2)
    assert content(tmp_path / "out") == content(written / "mixed")


# ---- looking rows up ------------------------------------------------------------------------------------------------


def test_lookup_by_number_in_any_shape(written: Path) -> None:
    package = dist_export.open_package(written / "mixed")
    ids = np.array([[10, 0, 0], [-1, 11, 5]])
    rows, found = package.lookup(T, ids)
    assert found.tolist() == [[True, True, True], [False, False, True]]
    assert rows.shape == (2, 3, 4)
    assert np.array_equal(rows[found], ROWS[T][[10, 0, 0, 5]])
    assert not rows[~found].any()
    raw, _ = package.lookup(T, [3], raw=True)
    assert raw.tobytes() == ROWS[T][3].tobytes()
    assert package.lookup(T, [])[0].shape == (0, 4)
    with pytest.raises(PackageError, match="no slot 'id'"):
        package.lookup(T, [1], slot="id")


@pytest.mark.parametrize("header", [b"{}", b'{"other": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}'])
def test_a_shard_without_the_block_is_no_shard_of_the_package(bare: Path, header: bytes) -> None:
    for path in bare.glob("model-*.safetensors"):
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(b"other" in header))
    with pytest.raises(PackageError, match="is not what the manifest says of it"):
        dist_export.open_package(bare).lookup(T, [3])


def test_lookup_reads_the_rows_that_were_asked_for(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a file cannot be mapped; from a mapping the system reads what is touched."""
    package = dist_export.open_package(written / "mixed")
    package.lookup(T, [0, 10])  # the headers
    monkeypatch.setattr(HeldFile, "map", lambda _: None)
    with recorded_reads(monkeypatch) as reads:
        package.lookup(T, [1, 2, 3, 8])
    assert [last - first for _, first, last in reads] == [3 * 16, 16]


def test_lookup_of_kept_slots_and_of_bfloat16(tmp_path: Path) -> None:
    values = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    bits = Raw("BF16", (values.view(np.uint32) >> 16).astype(np.uint16))
    write_source(tmp_path / "ckpt", {"t.weight": Numbered({"embedding": bits, "age": values[:, 0].copy()})})
    export(tmp_path / "ckpt", tmp_path / "out", num_shards=2)
    package = dist_export.open_package(tmp_path / "out")
    assert np.array_equal(package.lookup("t.weight", [1, 0])[0], values[::-1])
    assert package.lookup("t.weight", [1], slot="age")[0].tolist() == [0.25]


# ---- describing -----------------------------------------------------------------------------------------------------


def test_describe_tells_which_tables_go_by_number(written: Path) -> None:
    found = describe(str(written / "mixed"))
    assert {table["name"]: table["is_hashed"] for table in found["tables"]} == {T: False, U: False, HASH: True}
    lines = render(found)
    assert any(T in line and "by number" in line for line in lines)
    assert not any(HASH in line and "by number" in line for line in lines)


def test_plan_and_summary_tell_too(written: Path, tmp_path: Path) -> None:
    settings = {"ckpt_dir": str(written / "mixed_ckpt"), "export_dir": str(tmp_path / "out"), "filter_sparse_opt": True}
    report = make_report(ExportConfig(**settings), world_size=2)
    assert {table["name"]: table["is_hashed"] for table in report["tables"]} == {T: False, U: False, HASH: True}
    lines = render_report(report)
    assert f"  table {T}: 11 rows by number" in lines
    assert f"  table {HASH}: 30 rows" in lines
    assert any("to_hash_tables" in line for line in lines if line.startswith("  note"))
    manifest = dist_export.open_package(written / "mixed").manifest
    assert any(
        line.startswith("  tables   3 (2 by row number), 44 rows in 2 shards") for line in summarize(manifest, [], "x")
    )


# ---- verify ---------------------------------------------------------------------------------------------------------


def test_verify_says_what_it_looked_at(written: Path) -> None:
    report = verify(str(written / "mixed"), finite=True)
    assert report.findings == []
    assert any(line.startswith("1 table, 30 rows") for line in report.checked)
    assert "2 tables by row number, 14 rows: all there, in order" in report.checked
    report = verify(str(written / "bare"))
    assert report.findings == []
    assert "2 shards: headers and merged manifest agree" in report.checked
    assert not any("index" in line or "in the slice" in line for line in report.checked)


def edit_shard(change: Callable[[dict[str, Any]], object], name: str = A) -> Callable[[Path], None]:
    """Change blocks of a shard, which come as key -> [dtype, shape, bytes], and write the file anew, sound in itself."""

    def damage(folder: Path) -> None:
        start, header = read_header(folder / name)
        raw = (folder / name).read_bytes()
        blocks = {
            key: [
                entry["dtype"],
                entry["shape"],
                raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
            ]
            for key, entry in header.items()
        }
        change(blocks)
        entries, payload = {}, b""
        for key, (dtype, shape, data) in blocks.items():
            entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [len(payload), len(payload) + len(data)]}
            payload += data
        text = json.dumps(entries).encode()
        (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + payload)
        restate(folder, name)

    return damage


def change_part(number: int, **changes: Any) -> Callable[[Path], None]:
    def change(manifest: Manifest) -> Manifest:
        first, *rest = manifest.tables
        parts = list(first.parts)
        parts[number] = msgspec.structs.replace(parts[number], **changes)
        return msgspec.structs.replace(manifest, tables=(msgspec.structs.replace(first, parts=tuple(parts)), *rest))

    return lambda folder: reseal(folder, change)


def change_table(change: Callable[[Any], dict[str, Any]]) -> Callable[[Path], None]:
    def apply(manifest: Manifest) -> Manifest:
        first, *rest = manifest.tables
        return msgspec.structs.replace(manifest, tables=(msgspec.structs.replace(first, **change(first)), *rest))

    return lambda folder: reseal(folder, apply)


def edit_merged(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        edit_json(folder / MERGED, change)
        restate(folder, MERGED)

    return damage


def swap_files(folder: Path) -> None:
    shutil.move(folder / A, folder / "x")
    shutil.move(folder / B, folder / A)
    shutil.move(folder / "x", folder / B)
    restate(folder, A, B)


def shorten(blocks: dict[str, Any]) -> None:
    """Take the last row of a block away."""
    dtype, (rows, *inner), data = blocks[f"{T}/part_0_2"]
    blocks[f"{T}/part_0_2"] = [dtype, [rows - 1, *inner], data[:-16]]


def to_nan(blocks: dict[str, Any]) -> None:
    blocks[f"{T}/part_0_2"][2] = struct.pack("<f", float("nan")) + blocks[f"{T}/part_0_2"][2][4:]


def add_file(folder: Path) -> None:
    """A shard that the manifest vouches for, with a block of ours that another one has."""

    def only(blocks: dict[str, Any]) -> None:
        for key in [key for key in blocks if key != f"{T}/part_0_2"]:
            del blocks[key]

    extra = "model-000007-of-000009.safetensors"
    shutil.copy(folder / A, folder / extra)
    reseal(
        folder, lambda m: msgspec.structs.replace(m, files=(*m.files, msgspec.structs.replace(m.files[0], path=extra)))
    )
    edit_shard(only, extra)(folder)


BREAKS: list[tuple[str, Callable[[Path], object], set[tuple[str, str]], str]] = [
    ("a bit of a shard", lambda p: flip(p / A), {(A, "digest")}, "not what was written"),
    ("a shard gone", lambda p: (p / A).unlink(), {(A, "size")}, "is missing"),
    ("a part that the manifest forgets", change_table(lambda t: {"parts": t.parts[:1]}),
     {(MANIFEST, "account"), (B, "manifest")}, "have 6 rows, its rows_out is 11"),
    ("parts in another order", change_table(lambda t: {"parts": t.parts[::-1]}), {(MANIFEST, "parts")}, "begins at row 6"),
    ("a wrong first row", change_part(1, first_row=5), {(MANIFEST, "parts")}, "begins at row 5; the parts before it have 6"),
    ("no first row", change_part(1, first_row=msgspec.UNSET), {(MANIFEST, "parts")}, "begins at row nowhere"),
    ("a range of other rows", change_part(0, slice="00@07@11"), {(MANIFEST, "parts")}, "its rows are 0 to 6 of 11"),
    ("a range that is none", change_part(0, slice="all"), {(MANIFEST, "parts")}, "has the slice 'all'"),
    ("a part of another file", change_part(0, file=B), {(MANIFEST, "manifest")}, f"is stated with file '{B}'"),
    ("a part of no shard", change_part(0, file=MERGED), {(MANIFEST, "manifest")}, f"is stated with file '{MERGED}'"),
    ("fewer rows in a block", edit_shard(shorten), {(MANIFEST, "manifest"), (MERGED, "merged")}, "the shards say (5, 4)"),
    ("a block too many", edit_shard(lambda b: b.update({"x.weight/part_0_1": ["F32", [1, 1], bytes(4)]})),
     {(A, "manifest")}, "'x.weight/part_0_1' is not in the manifest"),
    ("a block of no table at all", edit_shard(lambda b: b.update({"x": ["F32", [], bytes(4)]})),
     {(A, "manifest")}, "'x' is not in the manifest"),
    ("a block that is gone", edit_shard(lambda b: b.pop(f"{T}.momentum1/part_0_2")),
     {(MANIFEST, "manifest")}, "is in no shard"),
    ("a block in two files", add_file, {("model-000007-of-000009.safetensors", "manifest")}, "which another file holds too"),
    ("shards in each other's place", swap_files, set(), "is stated with file"),
    ("a table that is not stated", lambda p: reseal(p, lambda m: msgspec.structs.replace(m, tables=m.tables[1:])),
     {(A, "manifest"), (B, "manifest")}, "is not in the manifest"),
    ("a table called hashed", change_table(lambda t: {"is_hashed": msgspec.UNSET}), set(), "keeps no id"),
    ("a table that keeps ids", change_table(lambda t: {"kept": (*t.kept, msgspec.structs.replace(t.kept[0], name="id"))}),
     {(MANIFEST, "manifest")}, "has a part with slots"),
    ("another sum of ids", change_table(lambda t: {"id_sum": "1" * 16}), {(MANIFEST, "id_sum")}, "not those that were exported"),
    ("another dtype", change_table(lambda t: {"kept": (msgspec.structs.replace(t.kept[0], dtype="int32"), *t.kept[1:])}),
     {(MANIFEST, "manifest")}, "dtype 'int32'"),
    ("a merged manifest that calls it a hash table",
     edit_merged(lambda m: m[f"{T}/part_0_2"].update(is_hashmap=True)), {(MERGED, "merged")}, "has is_hashmap True"),
    ("a merged manifest with a key for it",
     edit_merged(lambda m: m[f"{T}/part_0_2"].update(hashmap_key="x")), {(MERGED, "merged")}, "has hashmap_key 'x'"),
    ("a merged manifest of other bytes",
     edit_merged(lambda m: m[f"{T}/part_0_2"].update(memory=1)), {(MERGED, "merged")}, "has memory 1"),
    ("a merged manifest of another shape",
     edit_merged(lambda m: m[f"{T}/part_0_2"].update(shape=[7, 4])), {(MERGED, "merged")}, "has shape [7, 4]"),
    ("a merged manifest without a part", edit_merged(lambda m: m.pop(f"{T}/part_0_2")), {(MERGED, "merged")}, "is missing"),
    ("a merged manifest with another slot",
     edit_merged(lambda m: m.update({f"{T}.momentum1/part_0_2": m[f"{T}/part_0_2"]})), {(MERGED, "merged")},
     "is listed, but is no embedding"),
    ("no merged manifest", lambda p: (p / MERGED).unlink(), {(MERGED, "size")}, "is missing"),
]  # fmt: skip


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("kind", ["mixed", "bare"])
@pytest.mark.parametrize(("damage", "expected", "message"), [b[1:] for b in BREAKS], ids=[b[0] for b in BREAKS])
def test_each_fault_is_found_once(kind: str, damage, expected, message, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    damage(folder)
    report = verify(str(folder))
    found = {(finding.file, finding.check) for finding in report.found}
    assert any(message in line for line in report.findings), report.findings
    if expected:
        assert found == expected, report.findings
    assert all("Traceback" not in line and "cannot be checked" not in line for line in report.findings)


def test_values_that_are_not_finite_are_found(bare: Path) -> None:
    edit_shard(to_nan)(bare)
    assert told(bare) == set()
    report = verify(str(bare), finite=True)
    (line,) = report.findings
    assert f"slot 'embedding' of table '{T}' holds 1 NaN" in line


def name_in_index(folder: Path) -> None:
    edit_json(folder / INDEX, lambda d: d["block_index"].update({f"{T}/part_0_2": 0}))
    restate(folder, INDEX)


def name_in_tensorkey(folder: Path) -> None:
    edit_json(folder / TENSORKEY, lambda d: d.update({f"{T}/part_0_2": f"{T}@embedding^0@6@11"}))
    restate(folder, TENSORKEY)


@pytest.mark.parametrize(("damage", "file"), [(name_in_index, INDEX), (name_in_tensorkey, TENSORKEY)])
def test_indexes_that_name_numbered_rows_are_found(damage, file: str, mixed: Path) -> None:
    """RecIS's loader would take the block for something that it is not."""
    damage(mixed)
    report = verify(str(mixed))
    assert {(finding.file, finding.check) for finding in report.found} == {(file, file)}, report.findings
    assert "whose rows go by number" in report.findings[0]


def test_both_indexes_that_name_numbered_rows_are_one_finding(mixed: Path) -> None:
    name_in_index(mixed)
    name_in_tensorkey(mixed)
    assert told(mixed) == {(INDEX, INDEX)}


@pytest.mark.parametrize("name", [INDEX, TENSORKEY])
def test_an_index_is_missed_where_there_is_a_hash_table(name: str, mixed: Path) -> None:
    (mixed / name).unlink()
    assert (name, "size") in told(mixed)
    reseal(mixed, lambda m: msgspec.structs.replace(m, files=tuple(f for f in m.files if f.path != name)))
    assert {file for file, _ in told(mixed)} == {name, MANIFEST}


def test_hash_tables_are_checked_as_ever(mixed: Path) -> None:
    def forget(blocks: dict[str, Any]) -> None:
        del blocks[f"{HASH}.id/part_0_2"]

    edit_shard(forget)(mixed)
    report = verify(str(mixed))
    assert (INDEX, INDEX) in {(finding.file, finding.check) for finding in report.found}


def test_an_index_that_nothing_needs_is_looked_at(bare: Path) -> None:
    document = {"block_index": {f"{T}/part_0_2": 0}, "file_index": {A: 0}}
    (bare / INDEX).write_text(json.dumps(document))
    assert told(bare) == {(INDEX, INDEX)}


@pytest.mark.parametrize("kind", ["mixed", "bare"])
def test_a_hostile_manifest_gives_findings_and_errors_of_one_line(kind: str, request: pytest.FixtureRequest) -> None:
    """Each value of the manifest's first table in turn is something else."""
    folder: Path = request.getfixturevalue(kind)
    document = json.loads((folder / MANIFEST).read_bytes())
    part = document["tables"][0]["parts"][0]
    values = [None, -1, 1 << 61, 1 << 80, 1.5, "", "x" * 3000, "0@0@1", [], {}, True, "\x1b[31m", f"{HASH}.id/part_0_2"]
    sound = (folder / MANIFEST).read_bytes()
    for place in [*((part, name) for name in part), *((part["keys"], slot) for slot in part["keys"])]:
        holder, name = place
        kept = holder[name]
        for value in values:
            holder[name] = value
            from dist_export.manifest import compute_digest

            document["digest"] = compute_digest(document)
            (folder / MANIFEST).write_text(json.dumps(document))
            report = verify(str(folder))
            assert report.findings or value == kept, (name, value)
            assert not any("cannot be checked" in line for line in report.findings), (name, value, report.findings)
            try:
                dist_export.open_package(folder).lookup(T, [0, 1, 6, 10, 1 << 40])
            except PackageError as error:
                assert "\n" not in str(error)
        holder[name] = kept
    (folder / MANIFEST).write_bytes(sound)
    assert told(folder) == set()
    assert os.listdir(folder)


# ---- checkpoints of torchrec ----------------------------------------------------------------------------------------


@pytest.mark.fixtures
@pytest.mark.parametrize("case", ["row_wise", "column_wise", "dtensor_adam", "hostile_lossy_adam"])
@pytest.mark.parametrize("num_shards", [1, 3, "source"])
def test_packages_of_torchrec_checkpoints_hold_their_rows(
    case: str, num_shards: int | str, torchrec_fixtures: Path, tmp_path: Path
) -> None:
    golden = torch.load(torchrec_fixtures / f"{case}.golden.pt", weights_only=True)
    named = {"treat_as_tables": ["t_*.weight"]} if case == "dtensor_adam" else {}
    export(torchrec_fixtures / case, tmp_path / "out", num_shards=num_shards, **named)
    report = verify(str(tmp_path / "out"), finite=True)
    assert report.findings == []
    package = dist_export.open_package(tmp_path / "out")
    assert package.manifest.tables
    for table in package.manifest.tables:
        weight = golden[table.name].numpy()
        numbers = np.append(np.arange(len(weight)), len(weight))
        rows, found = package.lookup(table.name, numbers)
        assert found.tolist() == [True] * len(weight) + [False]
        assert np.array_equal(rows[:-1], weight)
