from __future__ import annotations

import threading

import numpy as np
import pytest

from dist_export.errors import PlanError
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.work_units import Unit, assign
from dist_export.runtime.joining import join
from dist_export.runtime.ranks import Ranks
from dist_export.transfer.work_stealing import open_queues, take_units


class Shared:
    """The store of a job whose ranks are threads of this process."""

    def __init__(self):
        self._values = {}
        self._lock = threading.Lock()

    def add(self, key, amount):
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount
            return self._values[key]

    def multi_get(self, keys):
        return [str(self._values[key]).encode() for key in keys]


def ranks_of(world_size):
    store = Shared()
    return [
        Ranks(rank, world_size, store, None, owns_default_group=False, timeout_secs=9) for rank in range(world_size)
    ]


def units_of(sizes):
    return [Unit("copy", number, 0, size, True, size) for number, size in enumerate(sizes)]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_each_unit_is_taken_once(world_size, threads):
    units = units_of(np.random.default_rng(0).integers(0, 1000, 300).tolist())
    ranks = ranks_of(world_size)
    for rank in ranks:
        open_queues(rank, "write", threads)
    taken = {}

    def work(worker):
        mine = take_units(ranks[worker // threads], "write", units, worker=worker, threads=threads)
        taken[worker] = [unit.number for unit, _ in mine]

    workers = [threading.Thread(target=work, args=(worker,)) for worker in range(world_size * threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(number for mine in taken.values() for number in mine) == list(range(300))


def test_a_rank_takes_its_own_from_the_front_and_others_from_the_end_of_who_has_most_left():
    units = units_of([n * 1_000_000 for n in [10] * 4 + [50] * 4 + [10] * 4])
    assert [len(queue) for queue in assign(units, 3)] == [5, 2, 5]
    ranks = ranks_of(3)
    for rank in ranks:
        open_queues(rank, "w", 1)
    mine = take_units(ranks[0], "w", units, worker=0, threads=1)
    assert [next(mine) for _ in range(5)] == [(units[n], False) for n in range(5)]
    theirs = take_units(ranks[2], "w", units, worker=2, threads=1)
    assert next(theirs) == (units[7], False)
    assert [unit.number for unit, is_others in mine if is_others] == [6, 5, 11, 10, 9, 8]
    assert list(theirs) == []


def test_nothing_more_is_taken_once_a_rank_has_failed():
    ranks = ranks_of(2)
    for rank in ranks:
        open_queues(rank, "w", 1)
    units = units_of([1] * 10)
    mine = take_units(ranks[0], "w", units, worker=0, threads=1)
    next(mine)
    ranks[1].announce_failure()
    assert list(mine) == []


def test_one_process_takes_all():
    with join(timeout_secs=1) as ranks:
        open_queues(ranks, "w", 2)
        units = units_of([5_000_000] * 7)
        taken = [unit.number for unit, is_others in take_units(ranks, "w", units, worker=1, threads=2) if not is_others]
        assert taken == [3, 4, 5, 6, 2, 1, 0]


def test_limits_share_the_memory_over_the_threads():
    one, four = MemoryBudget(512 << 20, 1), MemoryBudget(512 << 20, 4)
    assert one.held_ids == 4 * four.held_ids == 32 << 20
    for limits in (one, four, MemoryBudget(64 << 20, 8)):
        for row_bytes in (1, 4, 32, 256, 4096, 1 << 30):
            for num_targets in (1, 8, 1024, 65536):
                rows = limits.gather_rows(row_bytes, num_targets)
                assert rows >= 1
                if rows > 1:
                    assert rows * (2 * row_bytes + 24) <= limits.max_memory / limits.threads / 2
    assert one.gather_rows(256, 64) > one.gather_rows(256, 2), "chunks grow with the number of targets"
    with pytest.raises(PlanError, match=r"max_memory leaves 4 MiB to each of 16 threads, which need 8 MiB"):
        MemoryBudget(64 << 20, 16)
