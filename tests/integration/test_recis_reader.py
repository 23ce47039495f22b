from __future__ import annotations

import json

import numpy as np
import pytest

from dist_export.errors import PlanError, UserError
from dist_export.formats.dtypes import DTYPES
from tests.support.fixture_cases import CASES, NUM_SHARDS
from tests.support.recis_writer import (
    INDEX,
    MERGED,
    TENSORKEY,
    PartSpec,
    Raw,
    gen_slice,
    header_key,
    internal_name,
    make_rows,
    make_tables,
    read_dense,
    split_table,
    truth_of,
    write_checkpoint,
)
from tests.support.sparse_cases import ADAM, KEPT, assert_exact, copy, export, open_source


def load_truth(fixtures, case):
    """Return ({table: {slot: rows}}, {dense name: values}) of a reference checkpoint, empty where it has none."""
    path = fixtures / f"{'small2' if case.startswith('fullckpt') else case}.truth.npz"
    if not path.exists():
        return None, {}
    found = np.load(path)
    tables: dict = {}
    for name in found.files:
        if not name.startswith("dense:"):
            table, _, slot = name.rpartition("@")
            tables.setdefault(table, {})[slot] = found[name]
    return tables, {name.removeprefix("dense:"): found[name] for name in found.files if name.startswith("dense:")}


@pytest.mark.fixtures
@pytest.mark.parametrize("num_shards", NUM_SHARDS)
@pytest.mark.parametrize("case", CASES)
def test_reference_checkpoints_export_exactly(recis_fixtures, tmp_path, case, num_shards):
    source = recis_fixtures / case
    manifest = export(source, tmp_path / "out", num_shards=num_shards)
    truth, dense = load_truth(recis_fixtures, case)
    if truth is None:
        checkpoint = open_source(source)
        assert {table.name: table.rows_out for table in manifest.tables} == {
            table.name: int(checkpoint.parts.rows[checkpoint.parts.of_table(i)].sum())
            for i, table in enumerate(checkpoint.tables)
        }
    else:
        assert_exact(tmp_path / "out", truth)
        assert ("step_filter" in [slot.name for table in manifest.tables for slot in table.kept]) == (
            case == "stepfilter2"
        )
    written = read_dense(tmp_path / "out")
    assert not any(name.startswith("sparse_adam") for name in written)
    for name in set(written) & set(dense):
        assert written[name][1].tobytes() == dense[name].tobytes(), name
    if case == "dense_types":
        assert {name for name in dense if not name.startswith("sparse_adam")} <= set(written)
    if case == "hostile_bool_dense":
        assert [dtype for dtype, _ in written.values()].count("BOOL") == 1
    if case == "hostile_misplaced2":
        assert sum(table.misplaced for table in manifest.tables) > 0
    else:
        assert sum(table.misplaced for table in manifest.tables) == 0
    for table in manifest.tables:
        assert table.rows_in == table.rows_out == sum(part.rows for part in table.parts)


@pytest.mark.fixtures
@pytest.mark.parametrize("case", CASES)
def test_reference_checkpoints_copy_byte_for_byte_or_say_why_not(recis_fixtures, tmp_path, case):
    source, target = recis_fixtures / case, tmp_path / "out"
    if case.startswith("hostile"):
        with pytest.raises(UserError, match="filter_sparse_opt: true"):
            copy(source, target)
        assert not target.exists()
        return
    copy(source, target)
    for path in source.iterdir():
        if path.name in (INDEX, TENSORKEY) or path.suffix == ".safetensors":
            assert (target / path.name).read_bytes() == path.read_bytes()
    assert not (target / "extra.pt").exists()
    assert not (target / "model.pt").exists()


# ---- sound checkpoints of every shape -----------------------------------------------------------------------------

NAMES = ("user", "x@y", "u.embedding_x", "a b", "t/part_0_9", "表é\U0001f600", "a.b.c", "@lead", "q'\"\\", "new\nline")


@pytest.mark.parametrize("num_shards", [1, 3, "source"])
@pytest.mark.parametrize("files_per_shard", [1, 2, 5])
def test_odd_table_names(tmp_path, files_per_shard, num_shards):
    tables = make_tables({name: 20 + i for i, name in enumerate(NAMES)}, 2)
    write_checkpoint(tmp_path / "in", tables, files_per_shard=files_per_shard)
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))


@pytest.mark.parametrize("num_shards", [1, 2, 7, "source"])
@pytest.mark.parametrize("num_parts", [1, 2, 3, 8])
@pytest.mark.parametrize("size", [7, 1000, 65536, (1 << 20) + 1, 1 << 40])
def test_any_slice_size_and_number_of_shards(tmp_path, size, num_parts, num_shards):
    if num_parts > size:
        num_parts = size
    tables = make_tables({"a": 60, "b": 1}, num_parts, size=size, slots=())
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))
    assert {part.slice[2] for parts in tables.values() for part in parts} == {size}
    for path, text in json.loads((tmp_path / "out" / TENSORKEY).read_text()).items():
        assert text.endswith(f"@{size}"), path


def test_a_slice_size_of_one_holds_one_shard(tmp_path):
    tables = make_tables({"a": 9}, 1, size=1)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", num_shards=1)
    assert_exact(tmp_path / "out", truth_of(tables))
    with pytest.raises(PlanError, match="num_shards is 2, but the ids of table 'a' fall into 1 slices"):
        export(tmp_path / "in", tmp_path / "out2", num_shards=2)
    assert not (tmp_path / "out2").exists()


def test_as_many_shards_as_the_slice_has_places(tmp_path):
    tables = make_tables({"a": 40}, 2, size=7)
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=7)
    assert_exact(tmp_path / "out", truth_of(tables))
    assert [part.slice for part in manifest.tables[0].parts] == [f"{i}@{i + 1}@7" for i in range(7)]


@pytest.mark.parametrize("num_shards", [1, 2, 4, "source"])
def test_parts_left_out_or_empty_and_gaps_in_the_numbering(tmp_path, num_shards):
    tables = make_tables({"a": 80, "b": 40, "c": 0}, 4)
    empty = tables["a"][1]
    empty.ids = empty.ids[:0]
    empty.slots = {name: rows[:0] for name, rows in empty.slots.items()}
    tables["a"][2] = None
    tables["b"] = [None, *tables["b"][1:3], None]
    tables["c"] = [None, tables["c"][1], None, None]
    write_checkpoint(tmp_path / "in", tables, files_per_shard=8, dense={"w": np.ones(2, np.float32)})
    names = [path.name for path in (tmp_path / "in").glob("*.safetensors")]
    assert len(names) < 32
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))


def test_an_empty_part_may_lack_a_slot_that_others_have(tmp_path):
    tables = make_tables({"a": 30}, 2)
    part = tables["a"][1]
    part.ids, part.slots = part.ids[:0], {"embedding": part.slots["embedding"][:0]}
    write_checkpoint(tmp_path / "in", tables)
    truth = truth_of({"a": [tables["a"][0]]})
    export(tmp_path / "in", tmp_path / "out", num_shards=1)
    assert_exact(tmp_path / "out", truth)
    export(tmp_path / "in", tmp_path / "all", num_shards=1, keep_slots=["*"])
    assert_exact(tmp_path / "all", truth, slots=(*KEPT, *ADAM))
    copy(tmp_path / "in", tmp_path / "copy")


@pytest.mark.parametrize("num_shards", [1, 3, "source"])
def test_tables_without_any_row(tmp_path, num_shards):
    tables = make_tables({"a": 0, "b": 0}, 2)
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))
    assert [table.rows_out for table in manifest.tables] == [0, 0]
    copy(tmp_path / "in", tmp_path / "copy")


@pytest.mark.parametrize("mode", [{"num_shards": 3}, {"num_shards": "source"}, {"filter_sparse_opt": False}])
def test_a_checkpoint_without_tables(tmp_path, mode):
    write_checkpoint(tmp_path / "none", {})
    manifest = export(tmp_path / "none", tmp_path / "out", **mode)
    assert manifest.tables == ()
    assert json.loads((tmp_path / "out" / INDEX).read_text()) == {"block_index": {}, "file_index": {}}
    assert json.loads((tmp_path / "out" / TENSORKEY).read_text()) == {}
    write_checkpoint(tmp_path / "dense", {}, dense={"w": np.arange(3.0)})
    export(tmp_path / "dense", tmp_path / "out2", **mode)
    assert read_dense(tmp_path / "out2")["w"][1].tolist() == [0, 1, 2]


@pytest.mark.parametrize("manifest", ["new", "v1", "null", None])
def test_every_generation_of_the_merged_manifest(tmp_path, manifest):
    tables = make_tables({"user": 30, "u.embedding_x": 20, "x@y": 10}, 2)
    write_checkpoint(tmp_path / "in", tables, manifest=manifest, dense={"w": np.ones(2), "b": np.array(True)})
    written = export(tmp_path / "in", tmp_path / "out")
    assert_exact(tmp_path / "out", truth_of(tables))
    assert (MERGED in " ".join(written.notes)) == (manifest is None)


@pytest.mark.parametrize("how", ["renamed", "internal", "mixed"])
@pytest.mark.parametrize("num_shards", [1, 3, "source"])
def test_only_the_internal_names_count(tmp_path, how, num_shards):
    tables = make_tables({"user": 30, "x@y": 20}, 3)

    def rename(key, internal):
        return {
            "renamed": f"k{hash(internal) % 1000003}-{len(internal)}",
            "mixed": key if "@id" in internal else f"other/{internal}",
        }[how]

    write_checkpoint(
        tmp_path / "in",
        tables,
        rename=None if how == "internal" else rename,
        internal_keys=how == "internal",
        manifest=None,
    )
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))


@pytest.mark.parametrize("num_shards", [1, 2, "source"])
def test_two_parts_with_the_same_slice(tmp_path, num_shards):
    ids, rows = make_rows(50, slots=ADAM)
    full = (0, 65536, 65536)
    parts = [
        PartSpec(ids[:20], {name: r[:20] for name, r in rows.items()}, full),
        PartSpec(ids[20:], {name: r[20:] for name, r in rows.items()}, full),
    ]
    write_checkpoint(tmp_path / "in", {"t": parts}, files_per_shard=2)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of({"t": parts}))
    assert manifest.tables[0].misplaced == 0
    assert len(manifest.tables[0].parts) == (1 if num_shards == "source" else num_shards)
    with pytest.raises(UserError, match=r"two parts of table 't' carry the slice 0:65536.*filter_sparse_opt: true"):
        copy(tmp_path / "in", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("num_shards", [1, 2, 5, "source"])
def test_overlapping_slices(tmp_path, num_shards):
    ids, rows = make_rows(64)
    edges = [(0, 65536, 65536), (65535, 65536, 65536), (10000, 50000, 65536)]
    places = ids.astype(np.uint64) % 65536
    last = places == 65535
    middle = (places >= 10000) & (places < 50000) & (np.arange(len(ids)) % 2 == 0)
    masks = [~last & ~middle, last, middle & ~last]
    parts = [
        PartSpec(ids[mask], {"embedding": rows["embedding"][mask]}, part)
        for mask, part in zip(masks, edges, strict=True)
    ]
    write_checkpoint(tmp_path / "in", {"t": parts})
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of({"t": parts}))
    copy(tmp_path / "in", tmp_path / "copy")


DENSE = {
    "scalar": np.float32(2.5),
    "f64": np.arange(3.0),
    "f16": np.ones((2, 2), np.float16),
    "i64": np.arange(4),
    "i32": np.arange(4, dtype=np.int32),
    "i16": np.arange(4, dtype=np.int16),
    "i8": np.arange(4, dtype=np.int8),
    "u8": np.arange(5, dtype=np.uint8),
    "bf16": Raw("BF16", np.array([16256, 0, 1])),
    "empty": np.zeros((0, 3), np.float32),
    "": np.zeros(2, np.int8),
}


@pytest.mark.parametrize("num_shards", [1, 3, "source"])
def test_dense_tensors_of_every_dtype_go_into_shard_0(tmp_path, num_shards):
    tables = make_tables({"t": 10}, 2)
    dense = {**DENSE, "flags": np.array([True, False]), "a/part_0_1": np.arange(2.0)}
    write_checkpoint(tmp_path / "in", tables, dense=dense, files_per_shard=2)
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))
    written = read_dense(tmp_path / "out")
    assert set(written) == set(dense)
    assert written["flags"][0] == "BOOL"
    assert written["bf16"][0] == "BF16"
    for name, value in dense.items():
        array = np.asarray(value.array if isinstance(value, Raw) else value)
        assert written[name][1].shape == array.shape
        assert written[name][1].tolist() == array.tolist(), name
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    first = index["file_index"][f"model-000000-of-{num_shards if num_shards != 'source' else 2:06d}.safetensors"]
    assert {index["block_index"][f"{name}^ "] for name in dense} == {first}
    merged = json.loads((tmp_path / "out" / MERGED).read_text())
    assert merged["flags^ "]["dtype"] == "bool"
    assert merged["scalar^ "] == {
        "dense": True,
        "dimension": 0,
        "dtype": "float32",
        "is_hashmap": False,
        "name": "scalar^ ",
        "shape": [],
    }


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "bool"])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_tables_of_every_dtype(tmp_path, dtype, num_shards):
    ids, rows = make_rows(30, 3, dtype=np.float32)
    numbers = (np.abs(rows["embedding"]) * 40).astype(np.int64) % (2 if dtype == "bool" else 100)
    parts = split_table(ids, {"embedding": numbers}, 2)
    for part in parts:
        part.slots["embedding"] = Raw(dtype, part.slots["embedding"])
    write_checkpoint(tmp_path / "in", {"t": parts})
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of({"t": parts}))
    torch_name = next(d.torch for d in DTYPES if d.name == dtype.upper())
    assert manifest.tables[0].kept[1].dtype == torch_name


@pytest.mark.parametrize("shape", [(30, 1), (30, 0), (30, 2, 3)])
def test_rows_of_any_shape(tmp_path, shape):
    ids, _ = make_rows(30)
    parts = split_table(ids, {"embedding": np.random.default_rng(0).random(shape)}, 2)
    write_checkpoint(tmp_path / "in", {"t": parts})
    export(tmp_path / "in", tmp_path / "out", num_shards=3)
    assert_exact(tmp_path / "out", truth_of({"t": parts}))


def test_files_of_an_earlier_save_and_leftovers_stay_behind(tmp_path):
    tables = make_tables({"t": 10}, 2)
    strays = {
        "model-000005-of-000009.safetensors": b"old",
        "0tensorkey.json": b"{}",
        "ckpt-0-0.json.tmp": b"x",
        "extra.pt": b"x",
        "io_state_0.pt": b"x",
        "io_state_count": b"1",
        f"1{MERGED}": b"{}",
        "fg.json": b"{}",
    }
    write_checkpoint(tmp_path / "in", tables, extra_files=strays)
    for number, kind in enumerate((export, copy)):
        manifest = kind(tmp_path / "in", tmp_path / f"out{number}")
        assert not {path.name for path in (tmp_path / f"out{number}").iterdir()} & set(strays)
        assert any("model-000005-of-000009" in note for note in manifest.notes)
        assert any("leftovers" in note for note in manifest.notes)


def test_the_writer_names_blocks_as_recis_does():
    assert header_key("x@y", "id", "/part_0_2") == "x.y@id/part_0_2"
    assert internal_name("t", "id", gen_slice(0, 2)) == "t@id^00000@32768@65536"
