"""The columns of a checkpoint of some size, compared with what a plain reading of its json says."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from dist_export.checkpoint.recis.reader import RecisReader
from dist_export.commit.publish import render_indexes
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.safetensors import decode_header, encode_header
from dist_export.storage.urls import open_directory
from tests.support.recis_writer import INDEX, MERGED, TENSORKEY, make_tables, write_checkpoint
from tests.support.sparse_cases import copy, open_source, plan

NUM_SHARDS, NUM_TABLES = 64, 20


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    tables = make_tables({f"table_{i}": 3 * NUM_SHARDS for i in range(NUM_TABLES)}, NUM_SHARDS)
    return write_checkpoint(
        tmp_path_factory.mktemp("mid") / "in", tables, files_per_shard=4, manifest="v1", dense={"w": np.ones(3)}
    )


def read_plainly(folder: Path) -> dict:
    """Return {(table, slot, slice): (file, offset, dtype, shape, key)}."""
    internal = json.loads((folder / TENSORKEY).read_bytes())
    found = {}
    for file in json.loads((folder / INDEX).read_bytes())["file_index"]:
        with (folder / file).open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        for key, entry in header.items():
            if key in internal:
                stem, _, text = internal[key].rpartition("^")
                table, _, slot = stem.rpartition("@")
                part = tuple(int(number) for number in text.split("@"))
                offset = 8 + length + entry["data_offsets"][0]
                found[table, slot, part] = (file, offset, entry["dtype"], entry["shape"], key)
    return found


@pytest.mark.parametrize("piece_bytes", [1 << 22, 5000])
def test_the_columns_say_what_the_files_say(source, piece_bytes):
    reader = RecisReader(open_directory(source), json_bytes=piece_bytes)
    checkpoint = reader.assemble([reader.read_headers(range(len(reader.files)))])
    found = {}
    for number, table in enumerate(checkpoint.tables):
        assert [slot.name for slot in table.slots[:2]] == ["id", "embedding"]
        for part in checkpoint.parts.of_table(number):
            for slot in table.slots:
                file = checkpoint.files[checkpoint.blocks.file[part, slot.column]].name
                shape = [int(checkpoint.parts.rows[part]), *slot.inner_shape]
                offset, key = checkpoint.blocks.offset[part, slot.column], checkpoint.blocks.key[part, slot.column]
                place = table.name, slot.name, tuple(checkpoint.parts.slice_of(part))
                found[place] = (file, offset, DTYPES[slot.dtype].name, shape, key)
    assert found == read_plainly(source)
    assert [table.name for table in checkpoint.tables] == [f"table_{i}" for i in range(NUM_TABLES)]
    order = list(zip(checkpoint.parts.table, checkpoint.parts.begin, strict=True))
    assert order == sorted(order)


def test_headers_read_in_shares_make_the_same_checkpoint(source):
    whole, shared = RecisReader(open_directory(source)), RecisReader(open_directory(source))
    one = whole.assemble([whole.read_headers(range(len(whole.files)))])
    many = shared.assemble([shared.read_headers(files) for files in (range(3), range(3, 3), range(3, len(one.files)))])
    assert one.fingerprint == many.fingerprint
    assert one.tables == many.tables
    for name in ("file", "offset", "key"):
        assert (getattr(one.blocks, name) == getattr(many.blocks, name)).all()


def test_ranks_that_read_another_index_are_found_out(source):
    reader = RecisReader(open_directory(source))
    share = reader.read_headers(range(len(reader.files)))
    with pytest.raises(CheckpointError, match="index is not the same on all ranks"):
        reader.assemble([share._replace(index_digest=b"another")])


def test_the_headers_and_indexes_of_a_plan_are_what_json_itself_writes(source):
    planned = plan(source, num_shards="source").plan
    for file in planned.files:
        text = file.header[8:]
        plain = json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False).encode()
        assert text == plain + b" " * (8 - len(plain) % 8)
    rendered = render_indexes(planned, [("z", "float32", (2,)), ("a", "int64", ())])
    for name, indent in ((TENSORKEY, 4), (MERGED, 4), (INDEX, None)):
        document = json.loads(rendered[name])
        assert rendered[name] == json.dumps(document, indent=indent, separators=None if indent else (",", ":")).encode()
        sparse = list(document["block_index"] if name == INDEX else document)
        assert [key for key in sparse if key not in "za"] == sorted(key for key in sparse if key not in "za")
    assert list(json.loads(rendered[MERGED]))[-2:] == ["z", "a"]
    assert len(json.loads(rendered[TENSORKEY])) == 2 * NUM_SHARDS * NUM_TABLES == len(planned.blocks.key)


@pytest.mark.parametrize("name", ["".join(map(chr, range(1, 0x300))), "\u2028\u2029\ufeff\uffff\U0001f600", '"\\/\x7f'])
def test_any_name_is_written_as_json_writes_it(name):
    raw = encode_header([(name, 0, (1,), 8)])
    entry = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    assert raw[8:].rstrip() == json.dumps({name: entry}, separators=(",", ":"), ensure_ascii=False).encode()
    assert decode_header(raw[8:], path="f", file_size=len(raw) + 8).keys == (name,)


def test_an_index_that_changes_during_a_copy_is_refused(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "in", make_tables({"a": 10}, 2))
    checkpoint = open_source(tmp_path / "in")
    raw = (tmp_path / "in" / INDEX).read_bytes()
    assert dict(checkpoint.verbatim)[INDEX] == raw
    (tmp_path / "in" / INDEX).write_bytes(raw + b" ")
    with pytest.raises(CheckpointError, match="index has changed since it was read"):
        checkpoint.verbatim[INDEX]
    copy(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / INDEX).read_bytes() == raw + b" "
