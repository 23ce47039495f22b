from __future__ import annotations

import numpy as np
import pytest

from dist_export.errors import CheckpointError, UserError
from dist_export.formats.recis import mix
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.ids import duplicates
from dist_export.ids.duplicates import HeldIds
from dist_export.plan.census import count_rows_by_target, merge_censuses, plan_unique_tasks, share_parts
from dist_export.plan.target_slices import plan_targets
from dist_export.storage.range_reader import LocalReader, RangeReader
from dist_export.transfer.id_scan import check_unique, take_census
from tests.support.kernels import open_best
from tests.support.recis_writer import (
    PartSpec,
    make_rows,
    make_tables,
    owned_by,
    split_table,
    truth_of,
    write_checkpoint,
)
from tests.support.sparse_cases import assert_exact, copy, export, open_source, plan, tiny


def take(checkpoint, targets, world_size=1, held_ids=1000, tuning=STANDARD):
    shares = share_parts(checkpoint, world_size)
    found = [take_census(checkpoint, targets, share, held_ids=held_ids, tuning=tuning) for share in shares]
    return merge_censuses(found[::-1])


def columns(census):
    columns = {name: getattr(census, name) for name in census.__dataclass_fields__}
    return {name: np.asarray(column).tolist() for name, column in columns.items() if column is not None}


@pytest.mark.parametrize("granule", [None, 7])
@pytest.mark.parametrize("num_shards", [1, 3, None])
def test_the_counts_are_those_of_the_ids_whoever_counts(tmp_path, num_shards, granule):
    tuning = tiny(granule=granule) if granule else STANDARD
    tables = make_tables({"a": 100, "b": 3, "c": 0, "d": 50}, 4)
    checkpoint = open_source(write_checkpoint(tmp_path / "in", tables))
    targets = plan_targets(checkpoint, num_shards)
    census = take(checkpoint, targets, tuning=tuning)
    for world_size in (2, 3, 16, 40):
        assert columns(take(checkpoint, targets, world_size, tuning=tuning)) == columns(census)
    for table, counts in enumerate(count_rows_by_target(checkpoint, targets, census)):
        ids = truth_of(tables)[checkpoint.tables[table].name]["id"]
        assert counts.tolist() == [int(owned_by(ids, part).sum()) for part in targets[table].slices]
        parts = checkpoint.parts.of_table(table)
        assert int(census.id_sum[parts].sum(dtype=np.uint64)) == int(mix(ids).sum(dtype=np.uint64))
    assert census.misplaced.tolist() == [0] * len(checkpoint.parts)
    if granule:
        assert census.granule.max() > 0


def test_mixing_is_one_to_one():
    inverse = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
    alike = (np.uint64(0xABCDEF01 << 32) + np.arange(5000, dtype=np.uint64)) * inverse  # one upper half, once spread
    ids = np.concatenate([np.arange(-5000, 5000), np.arange(1, 5000) << 40, alike.view(np.int64)])
    assert len(np.unique(ids)) == len(ids)
    assert len(np.unique(mix(ids))) == len(ids)


def test_parts_are_shared_out_by_rows(tmp_path):
    tables = {"a": make_tables({"a": 900}, 3)["a"], "b": make_tables({"b": 30}, 6)["b"]}
    checkpoint = open_source(write_checkpoint(tmp_path / "in", tables))
    shares = share_parts(checkpoint, 3)
    assert sorted(part for share in shares for part in share) == list(range(9))
    loads = [int(checkpoint.parts.rows[share].sum()) for share in shares]
    assert max(loads) < 1.3 * min(loads)


# ---- misplaced rows ----------------------------------------------------------------------------------------------


def misplace(tables, table, count, *, source=0, target=1):
    """Move the first rows of one part to the end of another, where they do not belong."""
    left, right = tables[table][source], tables[table][target]
    right.ids = np.concatenate([right.ids, left.ids[:count]])
    left.ids = left.ids[count:]
    for slot, rows in left.slots.items():
        right.slots[slot] = np.concatenate([right.slots[slot], rows[:count]])
        left.slots[slot] = rows[count:]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 8, "source"])
def test_misplaced_rows_go_home_and_are_counted(tmp_path, num_shards):
    tables = make_tables({"a": 90, "b": 40}, 3)
    misplace(tables, "a", 5)
    write_checkpoint(tmp_path / "in", tables)
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of(tables))
    assert [table.misplaced for table in manifest.tables] == [5, 0]
    with pytest.raises(UserError, match=r"5 rows of table 'a' lie in another part's slice.*filter_sparse_opt: true"):
        copy(tmp_path / "in", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_misplaced_rows_of_a_slice_whose_part_was_left_out(tmp_path):
    ids, rows = make_rows(40)
    parts = split_table(ids, rows, 4)
    stranger = parts[2].ids[:1]
    parts[1].ids = np.concatenate([parts[1].ids, stranger])
    parts[1].slots["embedding"] = np.concatenate([parts[1].slots["embedding"], parts[2].slots["embedding"][:1]])
    parts[2] = None
    write_checkpoint(tmp_path / "in", {"t": parts})
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards="source")
    assert_exact(tmp_path / "out", truth_of({"t": parts}))
    assert manifest.tables[0].misplaced == 1
    assert [part.rows for part in manifest.tables[0].parts][2] == 1


@pytest.mark.parametrize("num_shards", ["source", 2])
def test_a_row_in_two_slices_stays_though_its_neighbour_moves(tmp_path, num_shards):
    random = np.random.default_rng(0)
    slices = [(0, 100, 100), (90, 100, 100), (95, 100, 100)]
    ids = [np.arange(0, 80), np.array([91, 5000 + 7, 95, 92, 98, 6000 + 8]), np.array([299, 7000 + 92, 296])]
    parts = [PartSpec(i, {"embedding": random.random((len(i), 3))}, part) for i, part in zip(ids, slices, strict=True)]
    write_checkpoint(tmp_path / "in", {"t": parts})
    manifest = export(tmp_path / "in", tmp_path / "out", num_shards=num_shards)
    assert_exact(tmp_path / "out", truth_of({"t": parts}))
    assert manifest.tables[0].misplaced == 3
    if num_shards == "source":
        assert [part.rows for part in manifest.tables[0].parts] == [83, 4, 2]


# ---- ids that stand twice ------------------------------------------------------------------------------------------


def twice(kind):
    ids, rows = make_rows(200)
    if kind == "same slice":
        full = (0, 65536, 65536)
        return [
            PartSpec(ids[:100], {"embedding": rows["embedding"][:100]}, full),
            PartSpec(ids[99:], {"embedding": rows["embedding"][99:]}, full),
        ]
    parts = split_table(ids, rows, 3)
    giver, taker = {"within a part": (1, 1), "misplaced": (0, 2)}[kind]
    parts[taker].ids = np.concatenate([parts[taker].ids, parts[giver].ids[:1]])
    values = parts[taker].slots["embedding"]
    parts[taker].slots["embedding"] = np.concatenate([values, parts[giver].slots["embedding"][:1]])
    return parts


@pytest.mark.parametrize("budget", [None, "runs", 1000, 64, 8])
@pytest.mark.parametrize("kind", ["within a part", "same slice", "misplaced"])
@pytest.mark.parametrize("filter_sparse_opt", [True, False])
def test_an_id_that_stands_twice_is_an_error(tmp_path, monkeypatch, kind, budget, filter_sparse_opt):
    tuning = tuning_for(monkeypatch, budget)
    parts = twice(kind)
    write_checkpoint(tmp_path / "in", {"ok": make_tables({"ok": 50}, 3)["ok"], "t": parts})
    expected = "filter_sparse_opt" if kind == "same slice" and not filter_sparse_opt else "table 't' holds the id"
    with pytest.raises(UserError, match=expected) as caught:
        export(tmp_path / "in", tmp_path / "out", filter_sparse_opt=filter_sparse_opt, tuning=tuning)
    if expected.startswith("table"):
        assert isinstance(caught.value, CheckpointError)
        assert " twice " in str(caught.value)
        assert str(tmp_path / "in") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def tuning_for(monkeypatch, budget):
    if budget == "runs":  # every part comes in several runs and is held until the last
        return tiny(granule=20)
    if budget is None:
        return STANDARD
    kernels = open_best(direct_ids=budget // 4, bucket_ids=max(1, budget // 8))
    monkeypatch.setattr(duplicates, "select_kernels", lambda: kernels)
    return Tuning(held_ids=budget, run_rows=min(budget, STANDARD.run_rows))


@pytest.mark.parametrize("budget", [64, 8])
def test_large_tables_are_searched_in_buckets_that_keep_to_the_budget(tmp_path, monkeypatch, budget):
    tuning = tuning_for(monkeypatch, budget)
    sizes = []
    original = HeldIds.has_duplicates
    monkeypatch.setattr(HeldIds, "has_duplicates", lambda held: (sizes.append(held._count), original(held))[1])
    ids, rows = make_rows(400)
    full = (0, 65536, 65536)
    parts = [PartSpec(ids[i::2], {"embedding": rows["embedding"][i::2]}, full) for i in range(2)]
    checkpoint = open_source(write_checkpoint(tmp_path / "in", {"t": parts}))
    census = take(checkpoint, plan_targets(checkpoint, 2), held_ids=budget, tuning=tuning)
    tasks = plan_unique_tasks(checkpoint, census, held_ids=budget)
    assert len(tasks) == 1 << tasks[0].bucket_bits >= 400 / budget
    assert {task.parts for task in tasks} == {(0, 1)}
    assert not any(sizes)
    check_unique(checkpoint, tasks, held_ids=budget, run_rows=tuning.run_rows)
    assert sum(sizes) == 400
    assert max(sizes) <= budget
    export(tmp_path / "in", tmp_path / "out", tuning=tuning)
    assert_exact(tmp_path / "out", truth_of({"t": parts}))


def test_a_part_too_large_for_one_sort_is_searched_even_where_slices_prove_the_rest(tmp_path, monkeypatch):
    tuning = tuning_for(monkeypatch, 40)
    tables = make_tables({"big": 100, "small": 20}, 2)
    planned = plan(write_checkpoint(tmp_path / "in", tables), tuning=tuning)
    checkpoint = planned.plan.checkpoint
    tasks = plan_unique_tasks(checkpoint, planned.census, held_ids=40)
    large = {part for part in range(4) if checkpoint.parts.rows[part] > 40}
    assert {task.parts for task in tasks} == {(part,) for part in large}
    assert large


def test_sound_slices_need_no_search(tmp_path):
    planned = plan(write_checkpoint(tmp_path / "in", make_tables({"a": 100}, 4)))
    assert plan_unique_tasks(planned.plan.checkpoint, planned.census, held_ids=100) == []


def test_id_columns_are_read_once(tmp_path, monkeypatch):
    tables = make_tables({"a": 100}, 4)
    checkpoint = open_source(write_checkpoint(tmp_path / "in", tables))
    read = []
    original = RangeReader.read_into

    def read_into(self, view, offset):
        read.append(len(view))
        original(self, view, offset)

    monkeypatch.setattr(RangeReader, "read_into", read_into)
    monkeypatch.setattr(LocalReader, "read_many", RangeReader.read_many)  # one by one
    take(checkpoint, plan_targets(checkpoint, 3))
    assert sum(read) == 800
