from __future__ import annotations

import numpy as np
import pytest

from dist_export.errors import PlanError
from dist_export.formats.recis import Slice, hash_slots
from dist_export.plan.target_slices import plan_targets, resolve_num_shards
from tests.support.recis_writer import PartSpec, make_tables, write_checkpoint
from tests.support.sparse_cases import open_source


def checkpoint_with(tmp_path, slices):
    """A checkpoint of one table "t" whose empty parts carry these slices."""
    parts = [PartSpec(np.zeros(0, np.int64), {"embedding": np.zeros((0, 2))}, part) for part in slices]
    return open_source(write_checkpoint(tmp_path / "in", {"t": parts}))


def owners_by_hand(targets, ids):
    found = []
    for i in ids.tolist():
        place = (i % (1 << 64)) % targets.size
        found.append(next(k for k, s in enumerate(targets.slices) if s.begin <= place < s.end))
    return found


IDS = np.array([0, 1, 2, 5, 6, 7, -1, -2, 999, 1000, 65535, 65536, 1 << 40, -(1 << 63), (1 << 63) - 1], np.int64)


SIZES = (1, 7, 1000, 65536, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 62) - 1)


@pytest.mark.parametrize(("size", "num_shards"), [(s, n) for s in SIZES for n in (1, 2, 3, 7, 64) if n <= s])
def test_every_id_has_the_owner_of_recis_rule(tmp_path, size, num_shards):
    (targets,) = plan_targets(checkpoint_with(tmp_path, [(0, size, size)]), num_shards)
    assert len(targets.slices) == num_shards
    assert targets.slices[0].begin == 0
    assert targets.slices[-1].end == size
    assert all(left.end == right.begin for left, right in zip(targets.slices, targets.slices[1:], strict=False))
    ids = np.concatenate([IDS, np.random.default_rng(0).integers(-(1 << 63), (1 << 63) - 1, 500, np.int64)])
    assert targets.owners_of(hash_slots(ids, targets.size), own=None).tolist() == owners_by_hand(targets, ids)


def test_the_number_of_shards(tmp_path):
    checkpoint = checkpoint_with(tmp_path, [(0, 3, 7), (3, 7, 7)])
    assert resolve_num_shards(checkpoint, "world_size", world_size=5) == 5
    assert resolve_num_shards(checkpoint, 3, world_size=5) == 3
    assert resolve_num_shards(checkpoint, 7, world_size=5) == 7
    assert resolve_num_shards(checkpoint, "source", world_size=5) is None
    for wish in (8, "world_size"):
        with pytest.raises(PlanError, match="num_shards is 8, but the ids of table 't' fall into 7 slices"):
            resolve_num_shards(checkpoint, wish, world_size=8)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([(0, 7, 7)], [(0, 7)]),
        ([(0, 3, 7), (3, 7, 7)], [(0, 3), (3, 7)]),
        ([(3, 7, 7), (0, 3, 7)], [(0, 3), (3, 7)]),
        ([(0, 7, 7), (0, 7, 7)], [(0, 7)]),
        ([(0, 3, 7), (0, 3, 7), (3, 7, 7)], [(0, 3), (3, 7)]),
        ([(3, 5, 7)], [(0, 3), (3, 5), (5, 7)]),
        ([(0, 2, 7), (4, 7, 7)], [(0, 2), (2, 4), (4, 7)]),
        ([(0, 7, 7), (6, 7, 7)], [(0, 7), (6, 7)]),
        ([(2, 2, 7), (0, 7, 7)], [(0, 7), (2, 2)]),
        ([(2, 2, 7)], [(0, 2), (2, 2), (2, 7)]),
    ],
)
def test_source_takes_each_distinct_slice_and_fills_gaps(tmp_path, source, expected):
    (targets,) = plan_targets(checkpoint_with(tmp_path, source), None)
    assert targets.slices == tuple(Slice(begin, end, 7) for begin, end in expected)
    ids = np.arange(-30, 30)
    assert targets.owners_of(hash_slots(ids, targets.size), own=None).tolist() == owners_by_hand(targets, ids)


def test_with_overlapping_slices_a_row_stays_where_it_is(tmp_path):
    (targets,) = plan_targets(checkpoint_with(tmp_path, [(0, 7, 7), (5, 7, 7)]), None)
    ids = np.arange(7)
    assert targets.owners_of(hash_slots(ids, targets.size), own=None).tolist() == [0] * 7
    assert targets.owners_of(hash_slots(ids, targets.size), own=1).tolist() == [0] * 5 + [1, 1]
    assert targets.index_of(Slice(5, 7, 7)) == 1
    assert targets.index_of(Slice(5, 6, 7)) is None


def test_tables_have_targets_of_their_own(tmp_path):
    tables = make_tables({"a": 5}, 2) | {"b": make_tables({"b": 5}, 3, size=100)["b"]}
    checkpoint = open_source(write_checkpoint(tmp_path / "in", tables))
    assert [len(targets.slices) for targets in plan_targets(checkpoint, None)] == [2, 3]
    assert [targets.size for targets in plan_targets(checkpoint, 4)] == [65536, 100]
