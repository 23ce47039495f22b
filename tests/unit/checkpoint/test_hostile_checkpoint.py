"""Checkpoints that came from elsewhere: one line and exit code 2 before anything is written, whatever is in them."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support import tiny_model
from tests.support.hostile_cases import (
    FIRST,
    SECOND,
    USER,
    USER_ID,
    Damage,
    assert_refused,
    edit,
    edit_header,
    edit_header_text,
    edit_json,
    instead,
    link_out,
    rename_table,
    run,
    run_all,
    sparse_file,
    sparse_header,
    swap,
    write_base,
)
from tests.support.recis_writer import (
    INDEX,
    MERGED,
    TENSORKEY,
    PartSpec,
    make_rows,
    make_tables,
    truth_of,
    write_checkpoint,
)
from tests.support.sparse_cases import assert_exact

ESCAPE = "\x1b]0;owned\x07\x1b[31m\u202e\x9b2J\n"


class Case(NamedTuple):
    damage: Damage
    said: str
    inspect: int = 2
    """What inspect returns, which looks at headers and indexes alone: 0 where there is nothing wrong with these."""


def set_entry(field: str, value: object, key: str = USER) -> Damage:
    return edit_header(lambda header: header[key].update({field: value}))


def set_index(section: str, key: str, value: object) -> Damage:
    return edit_json(INDEX, lambda index: index[section].update({key: value}))


def set_internal(value: object, key: str = USER) -> Damage:
    return edit_json(TENSORKEY, lambda names: names.update({key: value}))


def set_merged(field: str, value: object) -> Damage:
    return edit_json(MERGED, lambda merged: merged[USER].update({field: value}))


def rename_file(name: str) -> Damage:
    return edit_json(INDEX, lambda index: index.update(file_index={name: 0, SECOND: 1}))


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def cut(size: int) -> Damage:
    return lambda folder: os.truncate(folder / FIRST, size)


def grow(folder: Path) -> None:
    os.truncate(folder / FIRST, (folder / FIRST).stat().st_size + (1 << 33))


def move(by: int) -> Damage:
    def change(header):
        header[USER]["data_offsets"] = [offset + by for offset in header[USER]["data_offsets"]]

    return edit_header(change)


SHARDS = {
    "cut to nothing": Case(cut(0), "truncated"),
    "cut in the length": Case(cut(7), "truncated"),
    "cut in the header": Case(cut(60), "truncated"),
    "cut in the data": Case(cut(900), "model-000000-of-000002.safetensors"),
    "a hole behind the data": Case(grow, "bytes that no entry names"),
    "a header of 2^60 bytes": Case(edit(FIRST, lambda raw: b"\0" * 7 + b"\x10" + raw[8:]), "says that its header has"),
    "a header of 4 GB that is a hole": Case(sparse_header(4 << 30), "says that its header has 4,294,967,296 bytes"),
    "a header of 1 GB that is a hole": Case(sparse_header(1 << 30), "byte 8 is zero where text should be"),
    "a header that begins well and is a hole": Case(
        sparse_header(1 << 30, b'{"user.id/part_0_2":{"dtype":"I64","shape":[' + b"1," * 100), "is zero where text should be"
    ),
    "an overlap": Case(move(-4), "overlaps the block before it"),
    "a gap": Case(move(4), "leaves a hole before it"),
    "beyond the end": Case(move(1 << 40), "ends at byte 1,099,511,6"),
    "beyond 64 bits": Case(move(1 << 64), "data_offsets"),
    "offsets the wrong way round": Case(set_entry("data_offsets", [8, 0]), "data_offsets [8, 0]"),
    "three offsets": Case(set_entry("data_offsets", [0, 1, 2]), "data_offsets [0, 1, 2]"),
    "float offsets": Case(set_entry("data_offsets", [0.0, 8.0]), "data_offsets [0.0, 8.0]"),
    "bool offsets": Case(set_entry("data_offsets", [False, True]), "data_offsets [False, True]"),
    "a product beyond 64 bits": Case(set_entry("shape", [1 << 32, 1 << 32]), "but its data_offsets span"),
    "a product that is 0 in 64 bits": Case(set_entry("shape", [1 << 62, 4]), "has shape [4611686018427387904, 4]"),
    "a product of thousands of sizes": Case(set_entry("shape", [(1 << 61) - 1] * 200_000), "at most 64 sizes"),
    "65 sizes": Case(set_entry("shape", [1] * 65), "at most 64 sizes"),
    "a negative size": Case(set_entry("shape", [-1, 4]), "has shape [-1, 4]"),
    "two negative sizes": Case(set_entry("shape", [-10, -4]), "has shape [-10, -4]"),
    "a float size": Case(set_entry("shape", [10.0, 4]), "has shape [10.0, 4]"),
    "a bool size": Case(set_entry("shape", [True, 4]), "has shape [True, 4]"),
    "a huge size": Case(set_entry("shape", [10**3000, 4]), "has shape [1000000"),
    "a size of more digits than Python reads": Case(
        edit_header_text(swap(b'"shape":[', b'"shape":[' + b"9" * 5000 + b",")), "is not the JSON it should be"
    ),
    "a nested size": Case(set_entry("shape", [[10], 4]), "has shape [[10], 4]"),
    "a shape that is a text": Case(set_entry("shape", "10"), "has shape '10'"),
    "a shape of 900 brackets": Case(
        edit_header_text(swap(b'"shape":[', b'"shape":[' + nested(900) + b",")), "expected a list of at most 64 sizes"
    ),
    "2^62 rows of nothing": Case(set_entry("shape", [(1 << 62) - 1, 0]), "but its data_offsets span"),
    "a dtype of another kind": Case(set_entry("dtype", "U64"), "has dtype 'U64'"),
    "a dtype that is a number": Case(set_entry("dtype", 7), "has dtype 7"),
    "a dtype that is a list": Case(set_entry("dtype", ["F32"]), "has dtype ['F32']"),
    "a dtype with an escape": Case(set_entry("dtype", ESCAPE), r"has dtype '\x1b]0;owned\x07\x1b[31m\u202e\x9b2J\n'"),
    "an entry that is a number": Case(edit_header(lambda header: header.update({USER: 1})), "should be an object"),
    "a header that is a list": Case(edit_header_text(lambda _: b"[]"), "should be a JSON object, found list"),
    "an empty header": Case(edit_header_text(lambda _: b""), "is not the JSON it should be"),
    "NaN": Case(edit_header_text(swap(b'"shape":[', b'"shape":[NaN,')), "NaN is no JSON"),
    "Infinity": Case(edit_header_text(swap(b'"shape":[', b'"shape":[-Infinity,')), "-Infinity is no JSON"),
    "1e400": Case(edit_header_text(swap(b'"shape":[', b'"shape":[1e400,')), "has shape [inf"),
    "a key twice": Case(edit_header_text(lambda text: b'{"user.id/part_0_2":0,' + text[1:]), "stands there twice"),
    "a key twice, once escaped": Case(
        edit_header_text(lambda text: b'{"\\u0075ser.id/part_0_2":0,' + text[1:]), "'user.id/part_0_2' stands there twice"
    ),
    "a field twice": Case(edit_header_text(swap(b'"dtype":', b'"dtype":"F32","dtype":')), "'dtype' stands there twice"),
    "half a surrogate pair": Case(edit_header_text(lambda text: b'{"\\ud800":0,' + text[1:]), "surrogates not allowed"),
    "bytes that are no UTF-8": Case(edit_header_text(lambda text: b'{"\xff":0,' + text[1:]), "can't decode byte 0xff"),
    "a byte order mark": Case(edit_header_text(lambda text: b"\xef\xbb\xbf" + text), "BOM"),
    "100,000 levels": Case(edit_header_text(lambda text: b'{"a":' + nested(100_000) + b"," + text[1:]), "nested too deeply"),
    "a zero byte": Case(edit_header_text(lambda text: b'{"a\0":0,' + text[1:]), "is zero where text should be"),
    "ids that are a scalar": Case(set_entry("shape", [], USER_ID), "but its data_offsets span"),
    "ids of 32 bits": Case(
        edit_header(lambda header: header[USER_ID].update(dtype="I32", shape=[header[USER_ID]["shape"][0] * 2])),
        "ids are I64",
        inspect=0,
    ),
    "ids in two dimensions": Case(
        edit_header(lambda header: header[USER_ID].update(shape=[header[USER_ID]["shape"][0], 1])), "ids are I64 [rows]",
        inspect=0,
    ),
}  # fmt: skip


def shift_rows(by: int) -> Damage:
    """Move the border between two slots: fewer and more rows than ids, every range sound."""

    def change(header):
        after = USER.replace("embedding", "sparse_adam_exp_avg")
        for key, rows, edge in ((USER, by, 1), (after, -by, 0)):
            header[key]["shape"][0] += rows
            header[key]["data_offsets"][edge] += by * 4 * header[key]["shape"][1]

    return edit_header(change)


LAYOUT = {
    "fewer rows than ids": Case(shift_rows(-1), "RecIS's reader would run on into the next block", inspect=0),
    "more rows than ids": Case(shift_rows(1), "ids; RecIS's reader would run on into the next block", inspect=0),
    "an index with a gap": Case(set_index("file_index", SECOND, 2), "RecIS's reader crashes on that"),
    "an index with one number twice": Case(set_index("file_index", SECOND, 0), "RecIS's reader crashes on that"),
    "a negative file number": Case(set_index("file_index", SECOND, -1), "RecIS's reader crashes on that"),
    "a huge file number": Case(set_index("file_index", SECOND, 1 << 70), "RecIS's reader crashes on that"),
    "a float file number": Case(set_index("file_index", SECOND, 1.0), "file_index should be a map from a name to a number"),
    "a bool file number": Case(set_index("file_index", SECOND, True), "file_index should be a map from a name to a number"),
    "a negative place": Case(set_index("block_index", USER, -1), "is in file -1, but there are 2 files"),
    "a huge place": Case(set_index("block_index", USER, 1 << 70), "but there are 2 files"),
    "a float place": Case(set_index("block_index", USER, 0.0), "block_index should be a map from a name to a number"),
    "a bool place": Case(set_index("block_index", USER, False), "block_index should be a map from a name to a number"),
    "a nested place": Case(set_index("block_index", USER, [0]), "block_index should be a map from a name to a number"),
    "no block_index": Case(edit_json(INDEX, lambda index: index.pop("block_index")), "block_index should be"),
    "an index that is a list": Case(edit(INDEX, lambda _: b"[]"), "should be a JSON object, found list"),
    "an index key twice": Case(edit(INDEX, lambda raw: b'{"file_index":{},' + raw[1:]), "'file_index' stands there twice"),
    "a block twice in the index": Case(
        edit(INDEX, swap(b'"block_index":{', b'"block_index":{"user.id\\/part_0_2":0,')), "stands there twice"
    ),
    "a tensorkey twice": Case(
        edit(TENSORKEY, swap(b"{", b'{"user.\\u0069d/part_0_2":"a@id^0@1@1",')), "'user.id/part_0_2' stands there twice"
    ),
    "100,000 levels in the index": Case(edit(INDEX, lambda _: b'{"block_index":' * 100_000), "nested too deeply"),
    "100,000 levels in tensorkey": Case(edit(TENSORKEY, lambda _: b'{"a":' + nested(100_000) + b"}"), "nested too deeply"),
    "900 levels in tensorkey": Case(
        edit(TENSORKEY, lambda raw: b'{"a":' + nested(900) + b"," + raw[1:]), "expected <table>@<slot>"
    ),
    "an index of 3 GB that is a hole": Case(sparse_file(INDEX, 3 << 30, b'{"block_index":'), "is zero where text should be"),
    "an index of 5 GB": Case(sparse_file(INDEX, 5 << 30), "has 5,368,709,120 bytes, too many"),
    "a tensorkey of 3 GB that is a hole": Case(sparse_file(TENSORKEY, 3 << 30), "is zero where text should be"),
    "a name that climbs": Case(rename_file("../in/" + FIRST), "is no name of a data file in this directory"),
    "a name with a slash": Case(rename_file("a/b"), "is no name of a data file"),
    "an absolute name": Case(rename_file("/etc/passwd"), "is no name of a data file"),
    "a name with a backslash": Case(rename_file("a\\b"), "is no name of a data file"),
    "a name with a zero byte": Case(rename_file("a\0b"), r"'a\x00b' is no name of a data file"),
    "a name with escape codes": Case(rename_file(ESCAPE), "is no name of a data file"),
    "an empty name": Case(rename_file(""), "is no name of a data file"),
    "a dot": Case(rename_file("."), "is no name of a data file"),
    "a name of 256 bytes": Case(rename_file("é" * 128), "is no name of a data file"),
    "a name of a megabyte": Case(rename_file("x" * 1_000_000), "(1,000,"),
    "the name of a small file": Case(rename_file("manifest.json"), "is no name of a data file"),
    "a key with escape codes": Case(set_index("block_index", ESCAPE, 0), r"\x1b]0;owned\x07", inspect=0),
    "a table without a name": Case(set_internal("@embedding^0@1@1"), "expected <table>@<slot>"),
    "a slot without a name": Case(set_internal("user@^0@1@1"), "expected <table>@<slot>"),
    "an internal name with escape codes": Case(set_internal(ESCAPE), r"maps to '\x1b]0;owned\x07"),
    "no slice": Case(set_internal("user@embedding"), "expected <table>@<slot>"),
    "an internal name of a megabyte": Case(set_internal("x" * 1_000_000), "(1,000,002 characters)"),
    "another size within a table": Case(set_internal("user@embedding^0@1@77"), "has no id block", inspect=0),
    "a table without ids": Case(set_internal("other@embedding^00000@32768@65536"), "id block of table 'other'", inspect=0),
    "a merged manifest key twice": Case(
        edit(MERGED, swap(b"{", b'{"user.embedding\\/part_0_2":{},')), "stands there twice", inspect=0
    ),
    "100,000 levels in the merged manifest": Case(
        edit(MERGED, lambda raw: b'{"a":' + nested(100_000) + b"," + raw[1:]), "nested too deeply", inspect=0
    ),
    "900 levels in the merged manifest": Case(
        edit(MERGED, swap(b'"shape": [', b'"shape": [' + nested(900) + b",")), "has shape", inspect=0
    ),
    "a merged shape that is huge": Case(set_merged("shape", [1 << 70, 4]), "has shape [1180591620717411303424", inspect=0),
    "a merged dtype with escape codes": Case(set_merged("dtype", ESCAPE), r"'\x1b]0;owned", inspect=0),
    "a merged dimension that is a float": Case(set_merged("dimension", 4.5), "has dimension 4.5", inspect=0),
    "a merged manifest that is a hole": Case(sparse_file(MERGED, 3 << 30), "is zero where text should be", inspect=0),
    "a merged entry with escape codes": Case(
        edit_json(MERGED, lambda merged: merged.update({ESCAPE: merged[USER]})), r"names '\x1b]0;", inspect=0
    ),
}  # fmt: skip

LAYOUT |= {
    f"the slice {text!a}": Case(set_internal(f"user@embedding^{text}"), "expected <table>@<slot>^BEGIN@END@SIZE")
    for text in (
        "2@1@4", "0@5@4", "0@0@0", f"0@1@{1 << 70}", f"0@{1 << 62}@{1 << 62}", "-1@1@4", "+0@1@4", "0@1_0@100", " 0@1@4",
        "0@1@4 ", "0@1@4\n", "\u0660@\u0663@\u0664", "\uff10@\uff13@\uff14", "\u00b2@3@4", "0@1", "0@1@4@4", "a@b@c", "0.0@1@4",
        "0x0@1@4", "@@", "0@1@" + "9" * 5000,
    )
}  # fmt: skip


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket may have 108 bytes
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


FILES = {
    **{
        f"{name} is {what}": Case(instead(name, make), said)
        for name in (FIRST, INDEX)
        for what, make, said in (
            ("a pipe", os.mkfifo, name),
            ("a directory", os.mkdir, name),
            ("a socket", make_socket, name),
            ("a loop of links", lambda path: path.symlink_to(path.name), name),
            ("a link to nowhere", lambda path: path.symlink_to("nowhere"), name),
            ("a link to a device", lambda path: path.symlink_to("/dev/zero"), name),
            ("a link to a pipe of the system", lambda path: path.symlink_to("/dev/stdin"), name),
        )
    },
    "a shard behind a link out": Case(link_out(FIRST), "is a link that leads out of the directory"),
    "an index behind a link out": Case(link_out(INDEX), "is a link that leads out of the directory"),
    "a tensorkey behind a link out": Case(link_out(TENSORKEY), "is a link that leads out of the directory"),
    "a merged manifest behind a link out": Case(
        link_out(MERGED), "is a link that leads out of the directory", inspect=0
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_base(tmp_path / "in")


CASES = {**SHARDS, **LAYOUT, **FILES}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_one_line(name, folder, tmp_path, capsys):
    case = CASES[name]
    case.damage(folder)
    found = run_all(capsys, tmp_path)
    inspected = found.pop("inspect")
    for outcome in found.values():
        assert_refused(outcome, case.said)
        assert str(folder) in outcome.lines[0], "the message says which file"
    if case.inspect == 2:
        assert_refused(inspected, case.said)
    assert inspected.code == case.inspect


def test_the_base_is_sound(folder, tmp_path, capsys):
    assert {outcome.code for outcome in run_all(capsys, tmp_path).values()} == {0}


def test_links_are_followed_where_the_user_says_so(folder, tmp_path, capsys):
    """Caches of downloads consist of links; whoever uses one says so."""
    for name in (FIRST, INDEX, TENSORKEY, MERGED):
        link_out(name)(folder)
    found = run_all(capsys, tmp_path, settings=("--follow_links", "true"))
    assert_refused(found.pop("inspect"), "follow_links: true")
    assert {outcome.code for outcome in found.values()} == {0}
    assert run(capsys, tmp_path, "inspect", folder, "--follow_links").code == 0
    assert run(capsys, tmp_path, "verify", tmp_path / "out2").code == 0
    in_place = ("--ckpt_dir", folder, "--export_dir", folder, "--follow_links", "true")
    assert_refused(run(capsys, tmp_path, *in_place), "a package holds its files itself")


def test_links_within_the_checkpoint_and_to_it_are_plain(folder, tmp_path, capsys):
    os.rename(folder / FIRST, folder / "data")
    (folder / FIRST).symlink_to("data")
    os.rename(folder, tmp_path / "real")
    folder.symlink_to("real")
    assert {outcome.code for outcome in run_all(capsys, tmp_path).values()} == {0}


@pytest.mark.parametrize("name", [FIRST, INDEX, TENSORKEY, MERGED, "model.pt"])
def test_a_file_that_may_not_be_read(name, folder, tmp_path, capsys, monkeypatch):
    """Root may read everything, so the system is asked to say no."""
    (folder / "model.pt").write_bytes(b"")
    real = os.open

    def refuse(path, *arguments, **more):
        if os.fspath(path) == str(folder / name):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refuse)
    found = run_all(capsys, tmp_path)
    inspected = found.pop("inspect")
    for outcome in found.values():
        if name != "model.pt" or outcome is not found["plan"]:  # a plan does not look at the dense arch
            assert_refused(outcome, f"{name} cannot be read: Permission denied")
    assert inspected.code == (0 if name in (MERGED, "model.pt") else 2)


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to(path.name), lambda _: None])
def test_a_checkpoint_that_is_no_directory(make, tmp_path, capsys):
    make(tmp_path / "in")
    for outcome in run_all(capsys, tmp_path).values():
        assert_refused(outcome, str(tmp_path / "in"))
    dense = (
        "--need_export_sparse",
        "false",
        "--model",
        tiny_model.MODEL,
        "--dataset",
        tiny_model.DATASET,
    )
    places = ("--ckpt_dir", tmp_path / "in", "--export_dir", tmp_path / "out")
    assert_refused(run(capsys, tmp_path, *places, *dense), str(tmp_path / "in"))


@pytest.mark.parametrize("name", ["file/x", "loop", "loop/x", "new/" + "y" * 300])
def test_a_target_that_cannot_be_one(name, folder, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    for command in ((), ("plan",)):
        outcome = run(capsys, tmp_path, *command, "--ckpt_dir", folder, "--export_dir", tmp_path / name)
        assert_refused(outcome, f"export_dir {tmp_path}/")
    assert sorted(path for path in tmp_path.iterdir() if path.name != "tmp") == before


@pytest.mark.parametrize("path", ["/" + "x" * 5000, "\0", "\udcff", "a\x1b[31m"])
def test_a_path_that_is_none(path, tmp_path, capsys):
    for command in ((), ("plan",)):
        outcome = run(capsys, tmp_path, *command, "--ckpt_dir", path, "--export_dir", tmp_path / "out")
        assert_refused(outcome, "")
    assert_refused(run(capsys, tmp_path, "inspect", path), "")


# ---- names that are odd and all the same names --------------------------------------------------------------------


@pytest.mark.parametrize(
    "new", [ESCAPE, "..", "/etc/passwd", "a\\b", "a\0b", "x" * 70_000, "e\u0301\u202e", "\ufeff", " "]
)
def test_an_odd_name_of_a_table_is_kept_and_shown_in_one_line(new, tmp_path, capsys):
    """No path is made of it. What a terminal would act on is shown as an escape, also in JSON."""
    write_checkpoint(tmp_path / "in", make_tables({"t": 5}, 2))
    rename_table(new, "t")(tmp_path / "in")
    assert {outcome.code for outcome in run_all(capsys, tmp_path).values()} == {0}
    for path in ("in", "out", "out2"):
        outcome = run(capsys, tmp_path, "inspect", tmp_path / path, "--json")
        assert [table["name"] for table in json.loads(outcome.out)["tables"]] == [new]
    outcome = run(capsys, tmp_path, "verify", tmp_path / "out2")
    assert (outcome.code, outcome.lines) == (0, [])


def test_names_that_look_alike_are_two_tables_and_told(tmp_path, capsys):
    """They differ in unicode normalisation alone; whoever compares normalised names would mix them."""
    tables = make_tables({"caf\u00e9": 12, "cafe\u0301": 9}, 2)
    write_checkpoint(tmp_path / "in", tables)
    found = run_all(capsys, tmp_path)
    assert {outcome.code for outcome in found.values()} == {0}
    assert r"'caf\xe9' and 'cafe\u0301'" in found["plan"].out
    assert_exact(tmp_path / "out2", truth_of(tables))


def test_rows_without_columns(tmp_path, capsys):
    ids, _ = make_rows(5)
    part = PartSpec(ids, {"embedding": np.zeros((5, 0), np.float32)}, (0, 65536, 65536))
    write_checkpoint(tmp_path / "in", {"t": [part]})
    assert {outcome.code for outcome in run_all(capsys, tmp_path).values()} == {0}
    assert run(capsys, tmp_path, "verify", tmp_path / "out2").code == 0


def test_tables_of_no_parts(tmp_path, capsys):
    write_checkpoint(tmp_path / "in", {}, dense={"w": np.ones(2)})
    assert {outcome.code for outcome in run_all(capsys, tmp_path).values()} == {0}
    many = ("--ckpt_dir", tmp_path / "in", "--export_dir", tmp_path / "out3", "--filter_sparse_opt", "true")
    assert_refused(run(capsys, tmp_path, *many, "--num_shards", 10**12), "num_shards")
