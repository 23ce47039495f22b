from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES
from dist_export.formats.safetensors import decode_header, decode_object, encode_header, header_length


def decode(header, data_size: int, *, raw: bytes | None = None):
    text = json.dumps(header).encode() if raw is None else raw
    return decode_header(text, path="dir/f.safetensors", file_size=8 + len(text) + data_size)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", [dtype.name for dtype in DTYPES])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0), (2, 3, 1)])
def test_a_header_comes_back_as_it_went(dtype, shape):
    size = int(np.prod(shape)) * DTYPES[CODE_BY_NAME[dtype]].itemsize
    raw = encode_header([("a^ ", CODE_BY_NAME["U8"], (5,), 5), ("bé/part_0_1", CODE_BY_NAME[dtype], shape, size)])
    (length,) = struct.unpack("<Q", raw[:8])
    found = decode_header(raw[8:], path="f", file_size=len(raw) + 5 + size)
    assert length == len(raw) - 8
    assert found.keys == ("a^ ", "bé/part_0_1")
    assert found.shapes == ((5,), shape)
    assert [DTYPES[code].name for code in found.dtypes] == ["U8", dtype]
    assert found.begins.tolist() == [len(raw), len(raw) + 5]
    assert found.ends.tolist() == [len(raw) + 5, len(raw) + 5 + size]


@pytest.mark.parametrize("name", ["k" * n for n in range(1, 10)])
def test_the_padding_is_recis_own_one_to_eight_spaces(name):
    raw = encode_header([(name, 0, (1,), 8)])
    text = raw[8:]
    spaces = len(text) - len(text.rstrip(b" "))
    assert len(text) % 8 == 0
    assert 1 <= spaces <= 8
    assert list(json.loads(text)[name]) == ["dtype", "shape", "data_offsets"]


def test_the_safetensors_library_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([True, False]), "c": np.array(7)}
    names = {"float32": "F32", "bool": "BOOL", "int64": "I64"}
    entries = [(key, CODE_BY_NAME[names[str(v.dtype)]], v.shape, v.nbytes) for key, v in values.items()]
    (tmp_path / "f").write_bytes(encode_header(entries) + b"".join(v.tobytes() for v in values.values()))
    found = library.load_file(tmp_path / "f")
    assert {key: found[key].tolist() for key in values} == {key: v.tolist() for key, v in values.items()}


def test_lower_case_bool_and_metadata_are_read_and_told():
    found = decode({"__metadata__": {"format": "pt"}, "a": entry("bool", (3,), (0, 3))}, 3)
    assert found.has_lower_bool
    assert found.has_metadata
    assert found.keys == ("a",)
    found = decode({"a": entry("BOOL", (3,), (0, 3))}, 3)
    assert not found.has_lower_bool
    assert not found.has_metadata


def test_no_padding_and_any_order_are_fine():
    found = decode({"b": entry(offsets=(8, 16)), "z": entry(shape=(0,), offsets=(8, 8)), "a": entry()}, 16)
    assert [int(begin - found.begins.min()) for begin in found.begins] == [8, 8, 0]


@pytest.mark.parametrize(
    ("header", "data_size", "said"),
    [
        ({"a": entry()}, 7, "truncated"),
        ({"a": entry()}, 9, "bytes that no entry names"),
        ({"a": entry(), "b": entry(offsets=(9, 17))}, 17, "hole"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, 12, "overlaps"),
        ({"a": entry(), "b": entry()}, 8, "overlaps"),
        ({"a": entry(offsets=(4, 12))}, 12, "hole"),
        ({"a": entry(shape=(3,))}, 8, "data_offsets span"),
        ({"a": entry(offsets=(8, 0))}, 8, "data_offsets"),
        ({"a": entry(offsets=(0, 8, 8))}, 8, "data_offsets"),
        ({"a": entry(offsets=(-8, 0))}, 0, "data_offsets"),
        ({"a": entry(offsets=(0.0, 8.0))}, 8, "data_offsets"),
        ({"a": entry(offsets=(False, True), shape=(1,), dtype="U8")}, 1, "data_offsets"),
        ({"a": entry(shape=(1 << 32, 1 << 32))}, 8, "data_offsets span"),
        ({"a": entry(shape=(1 << 62,))}, 8, "shape"),
        ({"a": entry(shape=(-1,))}, 8, "shape"),
        ({"a": entry(shape=(True, 2))}, 8, "shape"),
        ({"a": {**entry(), "shape": 2}}, 8, "shape"),
        ({"a": entry(dtype="U32", shape=(2,))}, 8, "dtype 'U32'"),
        ({"a": entry(dtype="f32")}, 8, "dtype 'f32'"),
        ({"a": {**entry(), "dtype": ["F32"]}}, 8, "dtype"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "data_offsets"),
        ({"a": 5}, 0, "object"),
        ([], 0, "object"),
    ],
)
def test_an_untrue_header_is_refused(header, data_size, said):
    with pytest.raises(CheckpointError) as caught:
        decode(header, data_size)
    assert said in str(caught.value)
    assert str(caught.value).startswith("dir/f.safetensors")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b'{"a": NaN}', "NaN"),
        (b'{"a": Infinity}', "Infinity"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' stands there twice"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 200_000, "nested too deeply"),
        (b"\xff{}", "not the JSON"),
        (b"{", "not the JSON"),
        (b"", "not the JSON"),
        (b'"text"', "found str"),
        (b'{"\\ud800": 1}', "not the JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not the JSON"),
    ],
)
def test_bad_json_is_refused_in_one_line(raw, said):
    with pytest.raises(CheckpointError) as caught:
        decode_object(raw, what="dir/x")
    assert said in str(caught.value)
    assert str(caught.value).startswith("dir/x")
    assert len(str(caught.value)) < 300


def test_escaped_text_is_text():
    assert decode_object(b'{"\\ud83d\\ude00\\u00e9": 1}', what="x") == {"\U0001f600é": 1}


@pytest.mark.parametrize("length", [17, 1 << 31, 1 << 60, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused_unread(length):
    with pytest.raises(CheckpointError, match="truncated or no safetensors"):
        header_length(struct.pack("<Q", length), path="f", file_size=24)
    assert header_length(struct.pack("<Q", 16), path="f", file_size=24) == 16


def test_a_file_too_short_for_a_length_is_refused():
    with pytest.raises(CheckpointError, match="truncated"):
        header_length(b"1234567", path="f", file_size=7)
