from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from dist_export.checkpoint.recis.header_columns import join_columns, to_columns
from dist_export.checkpoint.recis.merged_manifest import check_merged
from dist_export.errors import CheckpointError
from dist_export.formats.safetensors import decode_header
from tests.support.recis_writer import MERGED, make_tables, read_blocks, write_checkpoint
from tests.support.sparse_cases import copy, export

STATE = {
    "dense_arch.z.weight": torch.ones(2, 3),
    "dense_arch.a.bias": torch.zeros(3, dtype=torch.bfloat16),
    "dense_arch.mask": torch.tensor([True]),
    "dense_arch.step": torch.tensor(3),
}


def merged_of(folder):
    return json.loads((folder / MERGED).read_text())


@pytest.mark.parametrize("style", ["new", "v1", "null", None])
@pytest.mark.parametrize("settings", [{"num_shards": 3}, {"num_shards": "source"}, {"filter_sparse_opt": False}])
def test_it_is_in_the_new_style_whatever_the_source_had(tmp_path, style, settings):
    tables = make_tables({"user": 30, "item": 20}, 2)
    write_checkpoint(tmp_path / "in", tables, manifest=style, dense={"w": np.ones((2, 2))}, model_state=STATE)
    export(tmp_path / "in", tmp_path / "out", **settings)
    merged = merged_of(tmp_path / "out")
    blocks = {block.key: block for block in read_blocks(tmp_path / "out") if block.slot == "embedding"}
    assert set(merged) == set(blocks) | {"w^ "} | set(STATE)
    for key, block in blocks.items():
        assert merged[key] == {
            "name": key,
            "dense": False,
            "dtype": "float32",
            "dimension": 4,
            "shape": list(block.array.shape),
            "hashmap_key": key.replace(".embedding", ".id"),
            "hashmap_key_dtype": "int64",
            "hashmap_value": key,
            "is_hashmap": True,
        }
    dense = {"dense": True, "dimension": 0, "is_hashmap": False}
    assert merged["w^ "] == {**dense, "name": "w^ ", "dtype": "float64", "shape": [2, 2]}
    for name, tensor in STATE.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert merged[name] == {**dense, "name": name, "dtype": dtype, "shape": list(tensor.shape)}
    # as RecIS leaves it: the sparse files' entries sorted, then model.pt in its own order
    assert list(merged) == [*sorted(set(merged) - set(STATE)), *STATE]
    assert (tmp_path / "out" / MERGED).read_text().startswith('{\n    "')


@pytest.mark.parametrize("settings", [{"num_shards": 2}, {"filter_sparse_opt": False}])
def test_odd_names_get_an_entry_with_their_true_ids(tmp_path, settings):
    tables = make_tables({"x@y": 10, "u.embedding_x": 10, "a.embedding.b": 10}, 2)
    write_checkpoint(tmp_path / "in", tables)
    export(tmp_path / "in", tmp_path / "out", **settings)
    merged = merged_of(tmp_path / "out")
    for part in range(2):
        assert merged[f"x.y@embedding/part_{part}_2"]["hashmap_key"] == f"x.y@id/part_{part}_2"
        assert merged[f"u.embedding_x.embedding/part_{part}_2"]["hashmap_key"] == f"u.embedding_x.id/part_{part}_2"
        assert merged[f"a.embedding.b.embedding/part_{part}_2"]["hashmap_key"] == f"a.embedding.b.id/part_{part}_2"
    assert len(merged) == 6


def test_without_model_pt_there_are_no_entries_of_it(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 5}, 1), model_state=STATE)
    (tmp_path / "in" / "model.pt").unlink()
    export(tmp_path / "in", tmp_path / "out")
    assert list(merged_of(tmp_path / "out")) == ["a.embedding/part_0_1"]


def test_a_model_pt_that_cannot_be_read_is_found_first(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 5}, 1))
    (tmp_path / "in" / "model.pt").write_bytes(b"not a state dict")
    for kind in (export, copy):
        with pytest.raises(CheckpointError, match=r"model\.pt cannot be read"):
            kind(tmp_path / "in", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.fixtures
@pytest.mark.parametrize("case", ["small2", "small2_v1", "adam2_v1", "emptyshard", "fullckpt/ckpt_3"])
def test_a_copy_of_a_reference_checkpoint_has_recis_own_new_style(recis_fixtures, tmp_path, case):
    copy(recis_fixtures / case, tmp_path / "out")
    new = merged_of(tmp_path / "out")
    own = merged_of(recis_fixtures / case)
    if case.endswith("_v1"):  # the new style lists fewer blocks
        own = {key: entry for key, entry in own.items() if "is_hashmap" in entry}
    assert new == own
    assert list(new) == list(own)


HEADER = {
    "t.id/part_0_1": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16]},
    "t.embedding/part_0_1": {"dtype": "F32", "shape": [2, 1], "data_offsets": [16, 24]},
    "s^ ": {"dtype": "F32", "shape": [], "data_offsets": [24, 28]},
    "d.embedding/part_9": {"dtype": "F32", "shape": [1], "data_offsets": [28, 32]},
}
ENTRY = {"dense": False, "is_hashmap": True, "shape": [2, 1], "dimension": 1, "dtype": "float32"}


def check(entries):
    raw = json.dumps(HEADER).encode()
    header = decode_header(raw, path="f", file_size=8 + len(raw) + 32)
    is_bare = np.array([key.startswith("d.") for key in header.keys])  # what index calls "d.embedding/part_9^ "
    names = tuple(f"{key}^ " if bare else key for key, bare in zip(header.keys, is_bare, strict=True))
    columns = to_columns(header, file=0, place=np.arange(len(names)), is_row_indexed=is_bare)
    places = {name: place for place, name in enumerate(names)}
    for indent in (None, 4):  # as RecIS writes it, and in a spelling that is looked at entry by entry
        raw = json.dumps(entries, indent=indent).encode()
        check_merged(raw, columns, names, places, where="dir/merged")


SOUND = {"t.embedding/part_0_1": ENTRY, "d.embedding/part_9^ ": {"dense": True, "shape": [1], "dtype": "float32"}}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"s^ ": {"dense": True, "shape": [], "dtype": "float32"}},
        {"t.id/part_0_1": {"dense": False, "shape": [2], "dtype": "I64", "data_offsets": [0, 16]}},
        {"model.w": {"dense": True, "shape": [7], "dtype": "float16"}},
    ],
)
def test_a_sound_manifest_passes(more):
    check({**SOUND, **more})


def test_null_passes():
    check_merged(b" null\n", join_columns([]), (), {}, where="dir/merged")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"t.embedding/part_0_1": {**ENTRY, "shape": [3, 1]}}, "has shape"),
        ({"t.embedding/part_0_1": {**ENTRY, "dimension": 2}}, "has dimension"),
        ({"t.embedding/part_0_1": {**ENTRY, "dtype": "bool"}}, "is 'bool'"),
        ({"s^ ": {"dense": True, "is_hashmap": True, "shape": [], "dtype": "F32"}}, "has dimension"),
        ({"t.id/part_0_1": {"dense": False, "shape": [2], "dtype": "F32"}}, "is 'F32'"),
        ({"x.id/part_0_1": {"dense": False, "shape": [2]}}, "no file of the checkpoint holds"),
        ({"x^ ": {"dense": True, "shape": [2]}}, "no file of the checkpoint holds"),
        ({"t.embedding/part_0_1": None}, "should be an object"),
    ],
)
def test_one_that_disagrees_does_not(more, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        check({**SOUND, **more})
    assert str(caught.value).startswith("dir/merged")
    with pytest.raises(CheckpointError, match=r"does not name 't\.embedding/part_0_1'"):
        check({})
