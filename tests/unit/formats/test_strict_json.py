from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.errors import CheckpointError
from dist_export.formats.strict_json import KeyTwiceError, decode_canonical, decode_object, read_members
from tests.support.properties import examples

ANY = msgspec.json.Decoder()
TEXTS = msgspec.json.Decoder(dict[str, str])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 70), 1 << 70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(document=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), VALUES, max_size=5))
@examples(200)
def test_every_spelling_of_a_document_gives_the_same_values(document):
    for spelling in (
        {"separators": (",", ":")},
        {"separators": (",", ":"), "ensure_ascii": False},
        {"indent": 4},
        {"indent": 4, "ensure_ascii": False},
        {},
    ):
        raw = json.dumps(document, **spelling).encode()
        assert decode_object(raw + b"  \n", what="x") == json.loads(raw)


@pytest.mark.parametrize(
    ("raw", "is_canonical"),
    [
        (b'{"a":1}', True),
        (b'{"a":1}   ', True),
        (b'{\n    "a": 1\n}\n', True),
        (b'{"a": 1}', False),
        (b'{"a":1,"a":1}', False),
        (b'{"a":{"b":1,"b":1}}', False),
        (b'{"a":1.50}', False),
        (b'{"a":-0}', False),
        (b'{"a":1e2}', False),
        (b'{"a":"\\u0041"}', False),
        (b'{"a":NaN}', False),
        (b'{"a":"\xff"}', False),
        (b'{"a":"\\ud800"}', False),
        (b'{"a":1}x', False),
        (b'{"a":' * 100_000, False),
        (b"", False),
    ],
)
def test_only_what_is_written_as_programs_write_it_takes_the_fast_way(raw, is_canonical):
    assert (decode_canonical(raw, ANY) is not None) == is_canonical


def read(raw, decoder=TEXTS, piece_bytes=10):
    """Read in tiny pieces; return the members and the number of pieces."""
    seen = []

    def take(pieces):
        seen.clear()
        found = {}
        for piece in pieces:
            seen.append(len(piece))
            if not found.keys().isdisjoint(piece):
                raise KeyTwiceError
            found.update(piece)
        return found

    return read_members(raw, decoder, take, what="dir/x", piece_bytes=piece_bytes), len(seen)


ODD = {f'k{i},\n    "': f'v",\n    "{i}é' for i in range(20)}


@pytest.mark.parametrize("indent", [None, 2, 4])
@pytest.mark.parametrize("document", [{}, {"a": "1"}, {f"k{i}": f"v{i}" for i in range(50)}, ODD])
def test_a_long_object_comes_in_pieces(document, indent):
    for is_ascii in (True, False):
        raw = json.dumps(document, indent=indent, ensure_ascii=is_ascii).encode()
        found, num_pieces = read(raw)
        assert found == document
        assert list(found) == list(document)
        assert (num_pieces > 1) == (indent == 4 and len(document) > 1)


def test_a_piece_in_another_spelling_comes_as_plain_values():
    document = {**{f"k{i}": "v" for i in range(9)}, "deep": {"z": [1, {"b": 2}], "a": {}}, "last": "x"}
    found, num_pieces = read(json.dumps(document, indent=4).encode())
    assert found == document
    assert num_pieces > 5


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (
            b'{\n    "aaaaaaaaaa": "1",\n    "bbbbbbbbbb": "2",\n    "aaaaaaaaaa": "3"\n}',
            "'aaaaaaaaaa' stands there twice",
        ),
        (b'{\n    "aaaaaaaaaa": "1",\n    "bbbbbbbbbb": NaN\n}', "NaN is no JSON"),
        (b'{\n    "aaaaaaaaaa": "1",\n    "bbbbbbbbbb": \n}', "line 4 column 1"),
        (b'{\n    "aaaaaaaaaa": "1"},\n    "bbbbbbbbbb": "2"\n}', "Extra data: line 2 column 23"),
        (b'{\n    "aaaaaaaaaa": [\n}', "not the JSON"),
    ],
)
def test_what_is_wrong_is_told_of_the_whole(raw, said):
    with pytest.raises(CheckpointError) as caught:
        read(raw)
    assert said in str(caught.value)
    assert str(caught.value).startswith("dir/x")


def test_a_cut_inside_a_value_does_no_harm():
    raw = b'{\n    "a": ["xxxxxxxxxxxx",\n    "y"],\n    "b": "z"\n}'
    assert read(raw) == ({"a": ["xxxxxxxxxxxx", "y"], "b": "z"}, 1)
    with pytest.raises(CheckpointError, match="found list"):
        read(b"[]")
