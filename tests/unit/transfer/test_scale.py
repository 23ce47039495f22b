"""The fleet by simulation, small: scripts.scale does the same for thousands of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_export.transfer import work_stealing
from scripts.scale import balance, control, helping


@pytest.mark.parametrize(("num_parts", "num_shards"), [(256, 256), (192, 256), (256, 96)])
def test_ranks_move_alike(num_parts: int, num_shards: int) -> None:
    """One table has half of all bytes; files and parts are fewer than ranks, or more."""
    found = balance.measure(256, bytes_per_rank=2 << 30, num_parts=num_parts, num_shards=num_shards)
    assert found.is_even, found
    assert found.kept_bytes == pytest.approx(256 * 2 << 30, rel=0.01)
    assert found.num_units > 256 * 4


def test_an_uneven_fleet_would_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(balance, "assign", lambda units, n: [list(range(len(units))), *([] for _ in range(n - 1))])
    assert not balance.measure(8, bytes_per_rank=2 << 30, num_parts=8, num_shards=8).is_even


def test_control_messages_grow_with_the_ranks_and_no_faster(tmp_path: Path) -> None:
    """Whole exports, each rank a thread: the number of collectives is one, and nobody sends everybody a manifest."""
    small, large = (control.measure(world_size, tmp_path / str(world_size)) for world_size in (8, 32))
    assert (small.receipts, large.receipts) == (8, 32)
    assert (small.gathers, small.broadcasts) == (large.gathers, large.broadcasts)
    assert large.gathers < 60
    per_rank = [found.gather_bytes / found.world_size for found in (small, large)]
    assert per_rank[1] < 2 * per_rank[0] + 1000
    assert large.largest_own < 1.5 * small.largest_own + 1000
    assert large.store_calls_of_rank < small.store_calls_of_rank + 3
    assert small.beat_calls == large.beat_calls == 4


def test_helpers_look_at_few_queues_of_many() -> None:
    """Every unit is done once (measure sees to that), about as soon as with all queues in sight, for far fewer keys."""
    all_in_sight = helping.measure(200, units_each=6, in_sight=1000)
    found = helping.measure(200, units_each=6, in_sight=16)
    assert found.keys < all_in_sight.keys / 3
    assert found.makespan < 1.15 * all_in_sight.makespan
    assert all_in_sight.makespan < 0.7 * all_in_sight.alone


def test_places_to_look_at() -> None:
    (everything,) = work_stealing._rows_to_check(2, 4, 4)
    assert everything.tolist() == [0, 1, 2, 3]
    looks = list(work_stealing._rows_to_check(9, 11, 4))
    assert [look.tolist() for look in looks] == [[9, 10, 0, 1], [2, 3, 4, 5]]
    assert [len(look) for look in work_stealing._rows_to_check(0, 5, 4)] == [4, 1]
    seen = np.concatenate([np.concatenate(list(work_stealing._rows_to_check(worker, 50, 4))) for worker in range(50)])
    assert set(np.bincount(seen)) == {8}, "every queue is in sight of as many helpers"
