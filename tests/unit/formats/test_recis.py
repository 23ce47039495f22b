from __future__ import annotations

import json

import numpy as np
import pytest

from dist_export.errors import CheckpointError
from dist_export.formats.recis import (
    Slice,
    encode_index,
    format_slice,
    is_in_slice,
    is_payload_name,
    is_plain_name,
    key_stem,
    parse_slice,
    split_evenly,
)
from dist_export.formats.recis_index import decode_indexes, split_internal

FILE = "model-000000-of-000001.safetensors"


def decode(index, tensorkey=None):
    raw = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in (index, tensorkey or {})]
    return decode_indexes(*raw, where="dir")


def test_files_come_in_the_order_of_their_numbers_and_extra_keys_are_ignored():
    found = decode(
        {"block_index": {"a": 1}, "file_index": {"x.safetensors": 1, "y.safetensors": 0}, "more": 1},
        {"a": "t@id^0@1@1"},
    )
    assert found.files == ("y.safetensors", "x.safetensors")
    assert (tuple(found.keys), found.file.tolist()) == (("a",), [1])
    assert found.internal_of(0) == "t@id^0@1@1"


def test_a_checkpoint_without_blocks_has_empty_maps():
    assert decode({"block_index": {}, "file_index": {}}).files == ()


@pytest.mark.parametrize(
    ("index", "tensorkey", "said"),
    [
        ({"block_index": {}}, {}, "index: file_index"),
        ({"file_index": {}}, {}, "index: block_index"),
        ({"block_index": [], "file_index": {}}, {}, "index: block_index"),
        ({"block_index": {"a": "0"}, "file_index": {FILE: 0}}, {}, "index: block_index"),
        ({"block_index": {"a": True}, "file_index": {FILE: 0}}, {}, "index: block_index"),
        ({"block_index": {}, "file_index": {FILE: 1}}, {}, "index: the numbers in file_index"),
        ({"block_index": {}, "file_index": {"a": 0, "b": 2}}, {}, "index: the numbers in file_index"),
        ({"block_index": {}, "file_index": {"a": 0, "b": 0}}, {}, "index: the numbers in file_index"),
        ({"block_index": {"k": 1}, "file_index": {FILE: 0}}, {}, "index: 'k' is in file 1"),
        ({"block_index": {"k": -1}, "file_index": {FILE: 0}}, {}, "index: 'k' is in file -1"),
        *(
            ({"block_index": {}, "file_index": {name: 0}}, {}, "no name of a data file")
            for name in ("../x", "/etc/passwd", "..", "", "a/b", "a\\b", "a\0b", "a\nb", "manifest.json", ".x", "index")
        ),
        (b"[]", {}, "index should be"),
        (b'{"block_index": {}, "file_index": {}, "x": NaN}', {}, "index is not"),
        (b'{"block_index": {"a": 0, "a": 0}, "file_index": {}}', {}, "index is not"),
        ({"block_index": {}, "file_index": {}}, b"null", "tensorkey.json should be"),
        ({"block_index": {}, "file_index": {}}, b'{"a": "t@id^0@1@1", "a": "t@id^0@1@1"}', "tensorkey.json is not"),
        *(
            ({"block_index": {}, "file_index": {}}, {"a": name}, "tensorkey.json: 'a'")
            for name in (
                7,
                None,
                "t@id",
                "t^0@1@1",
                "@id^0@1@1",
                "t@^0@1@1",
                "t@id^0@1",
                "t@id^1@0@1",
                "t@id^0@2@1",
                "t@id^0@0@0",
                "t@id^-1@1@1",
                "t@id^0@1@x",
                "t@id^0@1@" + "9" * 5000,
                f"t@id^0@1@{1 << 62}",
            )
        ),
    ],
)
def test_a_bad_index_is_refused_and_named(index, tensorkey, said):
    with pytest.raises(CheckpointError) as caught:
        decode(index, tensorkey)
    assert f"dir/{said}" in str(caught.value) or (said in str(caught.value) and "dir/index" in str(caught.value))
    assert "\n" not in str(caught.value)


def test_internal_names_are_taken_apart_from_the_right():
    assert split_internal("x@y@id^0@1@1") == ("x@y", "id", Slice(0, 1, 1))
    assert split_internal("a^b@embedding^000@128@128") == ("a^b", "embedding", Slice(0, 128, 128))
    assert split_internal("u.embedding_x/part_ü @id^0@1@1") == ("u.embedding_x/part_ü ", "id", Slice(0, 1, 1))


@pytest.mark.parametrize("size", [1, 7, 1000, 65536, (1 << 20) + 1, 1 << 40, (1 << 62) - 1])
def test_slices_go_through_text_and_split_by_recis_rule(size):
    for count in {1, 2, 3, 7, min(size, 64)}:
        if count > size:
            continue
        edges = split_evenly(size, count).tolist()
        widths = np.diff(edges)
        assert edges[0] == 0
        assert edges[-1] == size
        assert widths.max() - widths.min() <= 1
        assert list(widths) == sorted(widths, reverse=True)  # the first shards take the rest
        part = Slice(edges[0], edges[1], size)
        assert parse_slice(format_slice(part)) == part
        assert parse_slice("@".join(map(str, part))) == part


def test_slices_are_padded_as_recis_pads():
    assert format_slice(Slice(0, 32768, 65536)) == "00000@32768@65536"
    assert split_evenly(65536, 3).tolist() == [0, 21846, 43691, 65536]


@pytest.mark.parametrize("size", [1, 7, 65536, (1 << 20) + 1, 1 << 40, (1 << 61) + 5])
def test_ids_belong_to_slices_as_unsigned_numbers(size):
    ids = np.array([0, 1, -1, -2, 65535, 65536, -(1 << 63), (1 << 63) - 1, 123456789012345], np.int64)
    part = Slice(size // 3, size, size)
    expected = [part.begin <= (int(i) % (1 << 64)) % size < part.end for i in ids]
    assert is_in_slice(ids, part).tolist() == expected


def test_only_the_first_at_becomes_a_dot():
    assert key_stem("user_emb", "embedding") == "user_emb.embedding"
    assert key_stem("x@y", "id") == "x.y@id"
    assert key_stem("u.embedding_x", "id") == "u.embedding_x.id"


def test_file_numbers_of_a_written_index_have_no_gaps():
    found = json.loads(encode_index({"b": "model-2", "a": "model-0", "c": "model-2"}))
    assert found == {"block_index": {"a": 0, "b": 1, "c": 1}, "file_index": {"model-0": 0, "model-2": 1}}


def test_names():
    assert is_plain_name("model-000000-of-000001.safetensors")
    assert is_payload_name("weights.bin")
    assert not any(is_plain_name(name) for name in ("", ".", "..", "a/b", "a\\b", "a\n"))
    assert not any(is_payload_name(name) for name in ("index", "fg.json", "model.pt", ".hidden"))
