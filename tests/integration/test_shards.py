from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_export.errors import PlanError
from dist_export.formats.safetensors import decode_header
from tests.support.properties import examples
from tests.support.recis_writer import (
    PartSpec,
    make_rows,
    make_tables,
    owned_by,
    read_back,
    read_blocks,
    split_table,
    truth_of,
    write_checkpoint,
)
from tests.support.sparse_cases import ADAM, assert_exact, copy, export, open_source, plan, recorded_reads, run

PROPERTY = examples(60)


def tiles(planned):
    """Assert that header, copies and gathers cover each byte of each file exactly once."""
    written = [np.zeros(file.num_bytes, np.int8) for file in planned.files]
    for number, file in enumerate(planned.files):
        written[number][: len(file.header)] += 1
    copies = planned.copies
    for row in range(len(copies)):
        begin = int(copies.offset[row])
        written[int(copies.file[row])][begin : begin + int(copies.num_bytes[row])] += 1
        source = planned.checkpoint.files[int(copies.source_file[row])]
        assert 0 <= int(copies.source_offset[row]) <= source.size - int(copies.num_bytes[row])
    for gather in planned.gathers:
        table = int(planned.checkpoint.parts.table[gather.part])
        assert int(gather.counts.sum()) == gather.num_rows
        assert len(gather.targets) > 0
        for slot in planned.slots_of(table):
            blocks = planned.blocks_of(table, slot.column)[gather.targets]
            for block, count, first in zip(blocks, gather.counts, gather.first_target_rows, strict=True):
                begin = int(planned.blocks.offset[block]) + int(first) * slot.row_bytes
                assert first + count <= planned.blocks.rows[block]
                written[int(planned.blocks.file[block])][begin : begin + int(count) * slot.row_bytes] += 1
    for number, cover in enumerate(written):
        assert (cover == 1).all(), planned.files[number].name


@pytest.mark.parametrize("parts_and_shards", [(8, 4), (8, 2), (8, 1), (4, 4), (4, 2), (6, 3), (3, 1), (1, 1), (5, 5)])
def test_merging_shards_is_copying(tmp_path, parts_and_shards):
    num_parts, num_shards = parts_and_shards
    tables = make_tables({"a": 300, "b": 100}, num_parts)
    planned = plan(write_checkpoint(tmp_path / "in", tables), num_shards=num_shards).plan
    assert not planned.gathers
    tiles(planned)
    assert not plan(tmp_path / "in", num_shards="source").plan.gathers


@pytest.mark.parametrize("parts_and_shards", [(1, 2), (2, 3), (4, 8), (3, 2)])
def test_splitting_shards_gathers_rows(tmp_path, parts_and_shards):
    num_parts, num_shards = parts_and_shards
    planned = plan(write_checkpoint(tmp_path / "in", make_tables({"a": 300}, num_parts)), num_shards=num_shards).plan
    assert planned.gathers
    tiles(planned)


def test_only_the_parts_whose_rows_part_ways_are_gathered(tmp_path):
    planned = plan(write_checkpoint(tmp_path / "in", make_tables({"a": 300}, 3)), num_shards=2).plan
    assert {gather.part for gather in planned.gathers} == {1}  # 0:21846 and 43691:65536 fall into one half each


def test_what_decides_is_where_the_rows_are_not_what_the_slice_says(tmp_path):
    ids = np.arange(100)  # all in the first half, though the part claims the whole
    planned = plan(
        write_checkpoint(tmp_path / "in", {"t": [PartSpec(ids, {"embedding": np.zeros((100, 2))}, (0, 65536, 65536))]}),
        num_shards=2,
    ).plan
    assert not planned.gathers
    tiles(planned)


def test_neighbours_in_source_and_output_become_one_range(tmp_path):
    ids, rows = make_rows(50)
    write_checkpoint(tmp_path / "in", {"t": split_table(ids, rows, 1)})
    planned = plan(tmp_path / "in", num_shards=1).plan
    assert len(planned.copies) == 1
    assert int(planned.copies.num_bytes[0]) == 50 * (8 + 16)


def test_headers_say_what_the_plan_says(tmp_path):
    tables = make_tables({"a": 60, "b": 20}, 3)
    planned = plan(write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(3)}), num_shards=4).plan
    for number, file in enumerate(planned.files):
        header = decode_header(file.header[8:], path=file.name, file_size=file.num_bytes)
        mine = np.flatnonzero(planned.blocks.file == number)
        begins = dict(zip(header.keys, header.begins.tolist(), strict=True))
        for row in mine:
            assert begins[planned.blocks.key[row]] == planned.blocks.offset[row]
        dense = [key for key, its_file in planned.dense_files if its_file == number]
        assert set(header.keys) == {planned.blocks.key[row] for row in mine} | set(dense)
        assert dense == (["w^ "] if number == 0 else [])
        # ids first, then the embedding: the order that RecIS writes
        assert header.keys[0].startswith("a.id/")
        assert header.keys[1].startswith("a.embedding/")


def test_the_digest_tells_plans_apart(tmp_path):
    tables = make_tables({"a": 60, "b": 20}, 4)
    write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(3)})
    plans = [
        plan(tmp_path / "in", **kw).plan.digest
        for kw in (
            {"num_shards": 1},
            {"num_shards": 2},
            {"num_shards": 3},
            {"num_shards": 1, "keep_slots": ["a.*"]},
            {"num_shards": 1, "drop_slots": ["w"]},
            {"filter_sparse_opt": False},
        )
    ]
    assert len(set(plans)) == len(plans)
    assert plan(tmp_path / "in", num_shards=2, world_size=7).plan.digest == plans[1]
    write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(3)})  # new files, new times
    assert plan(tmp_path / "in", num_shards=1).plan.digest != plans[0]


def test_the_digest_tells_slices_apart_that_take_the_same_rows(tmp_path):
    parts = [
        PartSpec(np.array([i]), {"embedding": np.zeros((1, 2))}, part)
        for i, part in ((10, (0, 60, 100)), (70, (60, 100, 100)))
    ]
    write_checkpoint(tmp_path / "in", {"t": parts})
    source, even = (plan(tmp_path / "in", num_shards=shards).plan for shards in ("source", 2))
    assert [file.header for file in source.files] == [file.header for file in even.files]
    assert source.blocks.end.tolist() != even.blocks.end.tolist()
    assert source.digest != even.digest


def test_two_blocks_that_would_get_one_key_are_an_error(tmp_path):
    ids, _ = make_rows(3)
    rows = np.zeros((3, 2), np.float32)
    full = (0, 8, 8)
    tables = {
        "a": [PartSpec(ids, {"embedding": rows, "b.c": rows}, full, suffix="/x")],
        "a.b": [PartSpec(ids, {"embedding": rows, "c": rows}, full, suffix="/y")],
    }
    write_checkpoint(tmp_path / "in", tables)
    with pytest.raises(PlanError, match=r"two blocks would get the key 'a.b.c/part_0_1'"):
        export(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(tmp_path / "in", tmp_path / "out", drop_slots=["b.c"])
    assert set(read_back(tmp_path / "out")["a.b"]) == {"id", "embedding", "c"}


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8, "source"])
def test_no_byte_of_a_dropped_slot_is_read(tmp_path, monkeypatch, num_shards):
    tables = make_tables({"a": 300, "b": 100}, 2)
    write_checkpoint(tmp_path / "in", tables, files_per_shard=2, dense={"sparse_adam_beta1": np.ones(5)})
    checkpoint = open_source(tmp_path / "in")
    forbidden = []
    for number, table in enumerate(checkpoint.tables):
        for slot in table.slots:
            if slot.name not in ADAM:
                continue
            for part in checkpoint.parts.of_table(number):
                begin = int(checkpoint.blocks.offset[part, slot.column])
                file = checkpoint.files[int(checkpoint.blocks.file[part, slot.column])].name
                forbidden.append((file, begin, begin + int(checkpoint.parts.rows[part]) * slot.row_bytes))
    (beta,) = checkpoint.dense
    forbidden.append((checkpoint.files[beta.file].name, beta.offset, beta.offset + beta.num_bytes))
    assert len(forbidden) == 9
    with recorded_reads(monkeypatch) as reads:
        export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    source = [read for read in reads if read[0].startswith(str(tmp_path / "in"))]
    assert source
    for where, begin, end in source:
        for file, first, last in forbidden:
            assert not (where.endswith(f"/{file}") and begin < last and first < end), (where, begin, end)
    assert_exact(tmp_path / "out", truth_of(tables))


def test_a_table_with_fewer_slices_fills_the_first_shards(tmp_path):
    tables = {"a": make_tables({"a": 50}, 4)["a"], "b": make_tables({"b": 50}, 2)["b"]}
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards="source")
    assert manifest.num_shards == 4
    files = {table: {block.file for block in read_blocks(tmp_path / "out") if block.table == table} for table in "ab"}
    assert {table: len(names) for table, names in files.items()} == {"a": 4, "b": 2}
    assert_exact(tmp_path / "out", truth_of(tables))


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_files_and_indexes_of_an_export(tmp_path, num_shards):
    write_checkpoint(tmp_path / "in", make_tables({"a": 50}, 2))
    export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    names = [f"model-{i:06d}-of-{num_shards:06d}.safetensors" for i in range(num_shards)]
    small = ["index", "manifest.json", "tensorkey.json", "torch_rank_weights_embs_table_multi_shard.json"]
    indexes = [name.replace(".safetensors", ".row_index") for name in names]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted([*names, *indexes, *small])
    assert json.loads((tmp_path / "out" / "index").read_text())["file_index"] == {n: i for i, n in enumerate(names)}


def test_a_copy_takes_every_file_whole(tmp_path):
    write_checkpoint(tmp_path / "in", make_tables({"a": 50, "b": 3}, 3), files_per_shard=4)
    planned = plan(tmp_path / "in", filter_sparse_opt=False).plan
    assert planned.is_copy
    tiles(planned)
    copy(tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "in").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


# ---- any tables, any parts, any shards -----------------------------------------------------------------------------


@st.composite
def checkpoints(draw):
    """Tables whose rows lie in any part, of their slice or not."""
    tables = {}
    for name in draw(st.lists(st.sampled_from(["a", "b", "x@y"]), min_size=1, max_size=3, unique=True)):
        size = draw(st.sampled_from([1, 2, 7, 1000, 65536, (1 << 20) + 1, 1 << 40]))
        ids = draw(st.lists(st.integers(-(1 << 63), (1 << 63) - 1) | st.integers(-9, 9), unique=True, max_size=30))
        num_parts = draw(st.integers(1, min(4, size)))
        dim = draw(st.integers(1, 3))
        rows = np.array(ids, np.int64)
        values = np.arange(len(ids) * dim, dtype=np.float32).reshape(len(ids), dim)
        slots = {"embedding": values, "sparse_adam_exp_avg": values}
        parts = split_table(rows, slots, num_parts, size)
        if draw(st.booleans()) and len(ids):  # deal the rows out at random instead
            dealt = np.array(draw(st.lists(st.integers(0, num_parts - 1), min_size=len(ids), max_size=len(ids))))
            parts = [
                PartSpec(rows[dealt == i], {n: v[dealt == i] for n, v in slots.items()}, part.slice)
                for i, part in enumerate(parts)
            ]
        if draw(st.booleans()):  # slices that overlap, repeat or leave gaps
            for part in parts:
                begin, end = sorted(draw(st.tuples(*[st.integers(0, min(size, 9)) | st.just(size)] * 2)))
                part.slice = (begin, end, size)
        if draw(st.booleans()):
            parts = [part if len(part.ids) or i == 0 else None for i, part in enumerate(parts)]
        tables[name] = parts
    return tables


@given(
    tables=checkpoints(),
    num_shards=st.integers(1, 6) | st.just("source"),
    world_size=st.integers(1, 5),
    files_per_shard=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@PROPERTY
def test_every_kept_row_goes_to_exactly_one_place(
    tmp_path_factory, tables, num_shards, world_size, files_per_shard, seed
):
    folder = tmp_path_factory.mktemp("property")
    size = min(part.slice[2] for parts in tables.values() for part in parts if part is not None)
    if num_shards != "source":
        num_shards = min(num_shards, size)
    write_checkpoint(folder / "in", tables, files_per_shard=files_per_shard)
    planned = plan(folder / "in", num_shards=num_shards, world_size=world_size).plan
    tiles(planned)
    assert planned.digest == plan(folder / "in", num_shards=num_shards).plan.digest
    files = run(planned, folder / "run", world_size=world_size, seed=seed)
    manifest = export(folder / "in", folder / "out", num_shards=num_shards)
    assert_exact(folder / "out", truth_of(tables))
    for name, data in files.items():
        assert (folder / "out" / name).read_bytes() == data
    for table in manifest.tables:
        misplaced = sum(int((~owned_by(part.ids, part.slice)).sum()) for part in tables[table.name] if part is not None)
        assert table.misplaced == misplaced
        assert table.rows_in == table.rows_out
