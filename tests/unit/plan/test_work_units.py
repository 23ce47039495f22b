from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from dist_export.formats.tuning import STANDARD
from dist_export.plan import work_units as plan_units_module
from dist_export.plan.work_units import Unit, assign, plan_hash_units, plan_units
from dist_export.storage.directory import digest_file
from dist_export.storage.urls import open_directory
from tests.support.recis_writer import make_tables, truth_of, write_checkpoint
from tests.support.sparse_cases import assert_exact, content, export, plan, run, tiny

UNIT_BYTES, CHUNK_BYTES = STANDARD.unit_bytes, STANDARD.chunk_bytes
TINY = tiny()


def cover(planned, units):
    found = [np.zeros(file.num_bytes, np.int8) for file in planned.files]
    for unit in units:
        found[unit.number][unit.begin : unit.end] += 1
    return found


@pytest.fixture
def split(tmp_path):
    """A plan with copies and gathers, cut into tiny pieces."""
    tables = make_tables({"a": 200, "b": 60}, 3)
    return plan(write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(40)}), num_shards=2, tuning=TINY).plan


def test_every_byte_is_hashed_once_and_written_before(split):
    writing, hashing = plan_units(split, tuning=TINY)
    hashed = cover(split, [unit for unit in writing + hashing if unit.is_hashed])
    assert all((column == 1).all() for column in hashed)
    copied = cover(split, [unit for unit in writing if unit.kind == "copy"])
    assert all((column <= 1).all() for column in copied)
    gathered = [number for unit in writing if unit.kind == "gather" for number in range(unit.begin, unit.end)]
    assert gathered == list(range(len(split.gathers)))
    assert {unit.kind for unit in hashing} == {"hash"}
    for unit in writing + hashing:
        if unit.kind != "gather":
            assert unit.begin % 64 == 0
            assert unit.end % 64 == 0 or unit.end == split.files[unit.number].num_bytes
            assert 0 < unit.end - unit.begin <= 128
        assert unit.num_bytes > 0


def test_the_work_adds_up_to_the_output(split):
    writing, _ = plan_units(split, tuning=TINY)
    assert sum(unit.num_bytes for unit in writing) == split.num_bytes
    whole = plan_units(split, skip=frozenset([0]), tuning=TINY)[0]
    assert {unit.number for unit in whole if unit.kind == "copy"} == {1}


def test_a_file_that_is_there_is_hashed_in_units_of_whole_chunks(split):
    units = plan_hash_units(split, [1], tuning=TINY)
    assert {unit.number for unit in units} == {1}
    assert (cover(split, units)[1] == 1).all()
    assert sum(unit.num_bytes for unit in units) == split.files[1].num_bytes


def test_units_of_a_large_file_hold_at_most_256_mib():
    assert UNIT_BYTES == 256 << 20
    size = 5 * UNIT_BYTES + 12345
    is_gathered = np.zeros(-(-size // CHUNK_BYTES), bool)
    is_gathered[[3, 4, 11]] = True
    runs = plan_units_module._runs(size, is_gathered, STANDARD)
    assert runs[0][0] == 0
    assert runs[-1][1] == size
    assert all(left[1] == right[0] for left, right in itertools.pairwise(runs))
    assert max(end - begin for begin, end, _ in runs) <= UNIT_BYTES
    assert all(begin % CHUNK_BYTES == 0 for begin, _, _ in runs)
    assert {begin // CHUNK_BYTES for begin, _, kind in runs if kind} == {3, 11}
    assert plan_units_module._runs(0, None, STANDARD) == [(0, 0, False)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_the_ranks_get_equal_bytes(world_size):
    random = np.random.default_rng(0)
    units = [Unit("copy", i, 0, n, True, n) for i, n in enumerate(random.integers(0, UNIT_BYTES, 400).tolist())]
    queues = assign(units, world_size)
    assert sorted(unit for queue in queues for unit in queue) == list(range(len(units)))
    loads = [sum(units[unit].num_bytes for unit in queue) for queue in queues]
    assert max(loads) - min(loads) <= 2 * UNIT_BYTES
    assert [unit for queue in queues for unit in queue] == sorted(range(len(units)))  # neighbours stay together


def test_one_giant_table_is_everyones(tmp_path):
    units = [Unit("copy", 0, i * UNIT_BYTES, (i + 1) * UNIT_BYTES, True, UNIT_BYTES) for i in range(64)]
    assert {len(queue) for queue in assign(units, 8)} == {8}
    assert assign([], 3) == [[], [], []]
    assert assign(units[:1], 3)[1] == [0]


def test_gathers_are_balanced_by_what_they_move(tmp_path):
    planned = plan(write_checkpoint(tmp_path / "in", make_tables({"a": 2000}, 1)), num_shards=2, tuning=TINY).plan
    writing, _ = plan_units(planned, tuning=TINY)
    queues = assign(writing, 2)
    moved = [sum(writing[unit].num_bytes for unit in queue if writing[unit].kind == "gather") for queue in queues]
    assert min(moved) > 0.4 * sum(moved)


CUTS = [
    {"chunk": 64, "unit": 64},
    {"chunk": 8, "unit": 16, "granule": 1, "buffer": 1},
    {"chunk": 1, "unit": 1},
    {"chunk": 100, "unit": 1000, "granule": 3, "buffer": 333},
    {"chunk": 10_000_000, "unit": 10_000_000, "granule": 50},
]


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: "-".join(map(str, cut.values())))
def test_neither_bytes_nor_digests_depend_on_the_cut(tmp_path, cut):
    tables = make_tables({"a": 90, "b": 20}, 3)
    write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(20)})
    export(tmp_path / "in", tmp_path / "whole", num_shards=2)
    whole = content(tmp_path / "whole")
    manifest = export(tmp_path / "in", tmp_path / "cut", num_shards=2, tuning=tiny(**cut))
    assert content(tmp_path / "cut") == whole
    assert_exact(tmp_path / "cut", truth_of(tables))
    for file in manifest.files:
        assert digest_file(open_directory(tmp_path / "cut"), file.path, chunk_bytes=cut["chunk"]) == file.digest


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_the_order_of_the_units_and_who_runs_them_change_nothing(tmp_path, world_size, seed):
    tables = make_tables({"a": 90, "b": 20}, 3)
    write_checkpoint(tmp_path / "in", tables, dense={"w": np.ones(20)})
    planned = plan(tmp_path / "in", num_shards=4).plan
    export(tmp_path / "in", tmp_path / "out", num_shards=4)
    cut = plan(tmp_path / "in", num_shards=4, tuning=TINY).plan
    files = run(cut, tmp_path / "run", world_size=world_size, seed=seed, tuning=TINY)
    assert set(files) == {file.name for file in planned.files}
    for name, data in files.items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_copied_bytes_within_a_range():
    copies = SimpleNamespace(
        file=np.array([0, 0, 1]), offset=np.array([10, 30, 8]), num_bytes=np.array([10, 5, 12]), source_file=None
    )
    files = [SimpleNamespace(header=b"x" * 10, num_bytes=40), SimpleNamespace(header=b"x" * 8, num_bytes=40)]
    copied = plan_units_module._CopiedBytes(SimpleNamespace(copies=copies, files=files))
    for number, edges in ((0, [(0, 20), (30, 35)]), (1, [(0, 20)])):
        covered = {byte for begin, end in edges for byte in range(begin, end)}
        for begin in range(40):
            for end in range(begin, 41):
                found = copied.within(*(np.array([value]) for value in (number, begin, end)))
                assert found.tolist() == [len(covered & set(range(begin, end)))]
