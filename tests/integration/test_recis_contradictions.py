from __future__ import annotations

import struct

import numpy as np
import pytest

from dist_export.errors import CheckpointError
from tests.support.recis_writer import INDEX, MERGED, TENSORKEY, PartSpec, make_rows, make_tables, write_checkpoint
from tests.support.sparse_cases import copy, export


def refuses(tmp_path, said, *, kinds=(export, copy)):
    for kind in kinds:
        with pytest.raises(CheckpointError) as caught:
            kind(tmp_path / "in", tmp_path / "out")
        text = str(caught.value)
        assert said in text, text
        assert "\n" not in text
        assert str(tmp_path / "in") in text
        assert caught.value.exit_code == 2
        assert not (tmp_path / "out").exists()
    return text


def base(tmp_path, **settings):
    tables = make_tables({"user": 20, "item": 10}, 2)
    return write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(2)}, **settings)


FIRST = "model-000000-of-000002.safetensors"
SECOND = "model-000001-of-000002.safetensors"
USER = "user.embedding/part_0_2"


def test_no_checkpoint(tmp_path):
    refuses(tmp_path, "does not exist")
    (tmp_path / "in").mkdir()
    refuses(tmp_path, "holds no files")
    (tmp_path / "in" / "file").write_text("")
    refuses(tmp_path, "no checkpoint that is known among its 1 files")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (INDEX, "no index among its"),
        (TENSORKEY, "no tensorkey.json among its"),
        (FIRST, f"{FIRST} is missing; index names it"),
        (SECOND, f"{SECOND} is missing; index names it"),
    ],
)
def test_a_missing_file(tmp_path, name, said):
    base(tmp_path, omit=[name])
    refuses(tmp_path, said)


@pytest.mark.parametrize("cut", [0, 5, 8, 100, -1, -500])
def test_a_truncated_file(tmp_path, cut):
    base(tmp_path)
    path = tmp_path / "in" / SECOND
    path.write_bytes(path.read_bytes()[:cut])
    assert SECOND in refuses(tmp_path, "truncated")


def test_a_file_that_is_too_long(tmp_path):
    base(tmp_path)
    with (tmp_path / "in" / FIRST).open("ab") as file:
        file.write(b"x")
    assert FIRST in refuses(tmp_path, "bytes that no entry names")


@pytest.mark.parametrize("length", [1 << 60, 1 << 63, 2**64 - 1])
def test_a_header_length_from_elsewhere(tmp_path, length):
    base(tmp_path)
    path = tmp_path / "in" / FIRST
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    assert FIRST in refuses(tmp_path, "says that its header has")


def unreadable_index(files):
    files.index["file_index"] = {name: number + 1 for name, number in files.index["file_index"].items()}


def climb(files):
    files.index["file_index"] = {"../evil": 0, SECOND: 1}


def slash(files):
    files.index["file_index"] = {FIRST: 0, "sub/dir": 1}


def drop_from_index(files):
    del files.index["block_index"][USER]


def add_to_index(files):
    files.index["block_index"]["ghost.id/part_0_2"] = 0


def wrong_file(files):
    files.index["block_index"][USER] = 1


def drop_from_tensorkey(files):
    del files.tensorkey[USER]


def add_to_tensorkey(files):
    files.tensorkey["ghost.id/part_0_2"] = "ghost@id^0@1@1"


def bad_internal(files):
    files.tensorkey[USER] = "user@embedding"


def internal_number(files):
    files.tensorkey[USER] = 5


def huge_slice(files):
    files.tensorkey[USER] = "user@embedding^0@1@" + "9" * 5000


def swap_slot(files):
    files.tensorkey[USER] = files.tensorkey["user.id/part_0_2"]


def hole(files):
    files.headers[FIRST][USER]["data_offsets"][0] += 4
    files.headers[FIRST][USER]["data_offsets"][1] += 4


def overlap(files):
    files.headers[FIRST][USER]["data_offsets"] = [offset - 4 for offset in files.headers[FIRST][USER]["data_offsets"]]


def overflow(files):
    files.headers[FIRST][USER]["shape"] = [1 << 40, 1 << 40]


def wide_and_empty(files):
    files.headers[FIRST]["wide.embedding/part_0_1"] = {
        "dtype": "F32",
        "shape": [0, 1 << 61, 1 << 61],
        "data_offsets": [len(files.payloads[FIRST])] * 2,
    }
    files.headers[FIRST]["wide.id/part_0_1"] = {
        "dtype": "I64",
        "shape": [0],
        "data_offsets": [len(files.payloads[FIRST])] * 2,
    }
    for slot in ("embedding", "id"):
        files.index["block_index"][f"wide.{slot}/part_0_1"] = 0
        files.tensorkey[f"wide.{slot}/part_0_1"] = f"wide@{slot}^0@1@1"


def no_shape(files):
    del files.headers[FIRST][USER]["shape"]


def unknown_dtype(files):
    files.headers[FIRST][USER]["dtype"] = "U32"


def two_kinds(files):
    files.headers[FIRST][USER]["dtype"] = "I32"
    files.merged = {}


def id_dtype(files):
    for header in files.headers.values():
        for key, entry in header.items():
            if key.startswith("user.id"):
                entry["dtype"], files.merged = "F64", {}


def two_sizes(files):
    for key, internal in files.tensorkey.items():
        if key.endswith("item/part_1_2") or (key.startswith("item.") and key.endswith("part_1_2")):
            files.tensorkey[key] = internal.replace("@65536", "@65537")


def second_dense(files):
    files.headers[SECOND]["w"] = {"dtype": "F64", "shape": [0], "data_offsets": [len(files.payloads[SECOND])] * 2}
    files.index["block_index"]["w"] = 1


@pytest.mark.parametrize(
    ("change", "said", "file"),
    [
        (unreadable_index, "numbers in file_index are", INDEX),
        (climb, "'../evil'", INDEX),
        (slash, "'sub/dir'", INDEX),
        (drop_from_index, "which index does not name", FIRST),
        (add_to_index, "does not hold 'ghost.id/part_0_2', although index says so", FIRST),
        (wrong_file, f"index says that it is in {SECOND}", FIRST),
        (drop_from_tensorkey, "which tensorkey.json does not name", FIRST),
        (add_to_tensorkey, "names 'ghost.id/part_0_2'", TENSORKEY),
        (bad_internal, "expected <table>@<slot>", TENSORKEY),
        (internal_number, "maps to 5", TENSORKEY),
        (huge_slice, "expected <table>@<slot>", TENSORKEY),
        (swap_slot, "ids are I64", FIRST),
        (hole, "hole", FIRST),
        (overlap, "overlaps", FIRST),
        (overflow, "data_offsets span", FIRST),
        (wide_and_empty, "which no table has", FIRST),
        (no_shape, "has shape None", FIRST),
        (unknown_dtype, "dtype 'U32'", FIRST),
        (two_kinds, "other parts of the table have", SECOND),
        (id_dtype, "ids are I64 [rows]", FIRST),
        (two_sizes, "slice size 65537, another one 65536", SECOND),
        (second_dense, "a second dense tensor of that name", SECOND),
    ],
    ids=lambda value: value.__name__ if callable(value) else None,
)
def test_contradictions_between_the_files(tmp_path, change, said, file):
    base(tmp_path, change=change, manifest=None)
    assert file in refuses(tmp_path, said)


@pytest.mark.parametrize("name", [INDEX, TENSORKEY, MERGED])
@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b'{"a": NaN}', b'{"a": 1, "a": 2}', b"[" * 100_000, b"\xff", b'{"\\ud800": "t@id^0@1@1"}'],
    ids=["empty", "cut", "list", "nan", "twice", "deep", "bytes", "surrogate"],
)
def test_bad_json(tmp_path, name, raw):
    base(tmp_path)
    (tmp_path / "in" / name).write_bytes(raw)
    assert name in refuses(tmp_path, name)


@pytest.mark.parametrize("raw", [b'{"a": NaN}      ', b'{"a":{},"a":{}} ', b"not json        "])
def test_a_bad_header(tmp_path, raw):
    base(tmp_path)
    (tmp_path / "in" / FIRST).write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert FIRST in refuses(tmp_path, FIRST)


def test_a_key_in_two_files(tmp_path):
    def change(files):
        entry = dict(files.headers[FIRST][USER])
        end = len(files.payloads[SECOND])
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        files.headers[SECOND][USER] = {**entry, "data_offsets": [end, end + size]}
        files.payloads[SECOND] += bytes(size)

    base(tmp_path, change=change)
    assert SECOND in refuses(tmp_path, "index says that it is in")


def broken_tables(change):
    tables = make_tables({"user": 20, "item": 10}, 2)
    change(tables["user"][1])
    return tables


def test_fewer_rows_than_ids(tmp_path):
    def change(part):
        part.slots["sparse_adam_exp_avg"] = part.slots["sparse_adam_exp_avg"][:-1]

    write_checkpoint(tmp_path / "in", broken_tables(change))
    assert SECOND in refuses(tmp_path, "rows of sparse_adam_exp_avg, but the part of table 'user'")


def test_more_rows_than_ids(tmp_path):
    def change(part):
        part.ids = part.ids[:-1]

    write_checkpoint(tmp_path / "in", broken_tables(change))
    assert SECOND in refuses(tmp_path, "RecIS's reader would run on")


@pytest.mark.parametrize("slot", ["embedding", "sparse_adam_exp_avg"])
def test_a_slot_missing_in_one_part(tmp_path, slot):
    write_checkpoint(tmp_path / "in", broken_tables(lambda part: part.slots.pop(slot)))
    assert SECOND in refuses(tmp_path, f"no {slot}")


def test_a_table_without_embedding(tmp_path):
    tables = make_tables({"user": 20}, 1)
    del tables["user"][0].slots["embedding"]
    write_checkpoint(tmp_path / "in", tables)
    assert "model-000000-of-000001" in refuses(tmp_path, "no file holds the embedding block of table 'user'")


@pytest.mark.parametrize("rows", [np.zeros((10, 5), np.float32), np.zeros((10, 4), np.float64)])
def test_parts_that_differ_in_dims_or_dtype(tmp_path, rows):
    def change(part):
        part.slots["embedding"] = np.zeros((len(part.ids), rows.shape[1]), rows.dtype)

    write_checkpoint(tmp_path / "in", broken_tables(change))
    assert SECOND in refuses(tmp_path, "other parts of the table have")


def test_two_parts_with_the_same_slice_whose_blocks_cannot_be_told_apart(tmp_path):
    ids, rows = make_rows(10)
    parts = [PartSpec(ids[i::2], {"embedding": rows["embedding"][i::2]}, (0, 8, 8)) for i in range(2)]
    counter = iter(range(100))
    write_checkpoint(tmp_path / "in", {"t": parts}, rename=lambda *_: f"block{next(counter)}", manifest=None)
    refuses(tmp_path, "nothing says which one belongs to which ids")


def test_flat_embeddings(tmp_path):
    ids, _ = make_rows(4)
    write_checkpoint(tmp_path / "in", {"t": [PartSpec(ids, {"embedding": np.zeros(4)}, (0, 1, 1))]}, manifest=None)
    refuses(tmp_path, "embeddings are [rows, dim]")


def test_blocks_without_rows_axis(tmp_path):
    parts = [PartSpec(np.array(5), {"embedding": np.zeros((1, 2))}, (0, 1, 1))]
    write_checkpoint(tmp_path / "in", {"t": parts}, manifest=None)
    refuses(tmp_path, "is a scalar")


def test_the_merged_manifest_of_another_save(tmp_path):
    changes = {
        "has shape [9, 4]": lambda m: m[USER].update(shape=[9, 4]),
        "is 'float64'": lambda m: m[USER].update(dtype="float64"),
        "is 'bool'": lambda m: m[USER].update(dtype="bool"),
        "has dimension 3": lambda m: m[USER].update(dimension=3),
        "names 'ghost.embedding/part_0_2'": lambda m: m.update({"ghost.embedding/part_0_2": m[USER]}),
        "names 'ghost^ '": lambda m: m.update({"ghost^ ": m["w^ "]}),
        f"does not name '{USER}'": lambda m: m.pop(USER),
        "should be an object": lambda m: m.update({USER: 1}),
    }
    for style in ("new", "v1"):
        for said, change in changes.items():
            base(tmp_path, manifest=style, change=lambda files, change=change: change(files.merged))
            assert MERGED in refuses(tmp_path, said)
    base(tmp_path, manifest="v1", change=lambda files: files.merged["user.id/part_0_2"].update(dtype="I32"))
    refuses(tmp_path, "is 'I32'")


def test_parameters_of_the_dense_arch_in_the_merged_manifest_are_no_blocks(tmp_path):
    def change(files):
        files.merged["dense_arch.w"] = {"dense": True, "dtype": "float32", "name": "dense_arch.w", "shape": [2]}

    base(tmp_path, change=change)
    export(tmp_path / "in", tmp_path / "out")


def test_a_source_that_the_system_will_not_read(tmp_path, monkeypatch):
    base(tmp_path)
    (tmp_path / "in" / FIRST).unlink()
    (tmp_path / "in" / FIRST).mkdir()
    refuses(tmp_path, FIRST)
    from dist_export.storage.directory import Directory

    def denied(self, name):
        if name == "manifest.json":
            raise FileNotFoundError(2, "No such file or directory", name)
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr(Directory, "read_text", denied)
    (tmp_path / "in" / FIRST).rmdir()
    base(tmp_path)
    assert INDEX in refuses(tmp_path, "cannot be read: Permission denied")


def test_an_export_dir_that_is_there_stays_as_it_is(tmp_path):
    base(tmp_path, omit=[SECOND])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    for kind in (export, copy):
        with pytest.raises(CheckpointError):
            kind(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
