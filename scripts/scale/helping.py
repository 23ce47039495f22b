"""What the queues of units cost in the job's store: the real queues, workers in virtual time that are not equally fast."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass
from unittest import mock

from dist_export.formats.tuning import STANDARD
from dist_export.plan.work_units import Unit
from dist_export.runtime.ranks import Ranks
from dist_export.transfer import work_stealing
from scripts.scale import logical

SLOWEST, FASTEST = 0.8, 1.25
STRAGGLERS = 0.01
"""Of all workers this share has a third of the others' speed."""


@dataclass(frozen=True, kw_only=True)
class Helping:
    """One fleet's transfer."""

    num_workers: int
    num_units: int
    helped: int
    """Units that another worker did than the one whose they were."""
    makespan: float
    """Until the last worker is done, against the time that all would take if they shared the bytes in proportion to speed."""
    alone: float
    """The same had nobody helped anybody."""
    calls: Counter[str]
    keys: int
    """Counters that the store read or changed."""
    num_bytes: int


def measure(num_workers: int, units_each: int = 8, in_sight: int = work_stealing.IN_SIGHT) -> Helping:
    """Let the workers take all units. AssertionError where a unit is left or taken twice.

    ``in_sight``: how many queues a worker reads at once.
    """
    generator = random.Random(3)
    unit_bytes = STANDARD.unit_bytes
    units = [Unit("copy", n, 0, unit_bytes, True, unit_bytes) for n in range(num_workers * units_each)]
    speeds = [
        generator.uniform(SLOWEST, FASTEST) * (1 / 3 if generator.random() < STRAGGLERS else 1)
        for _ in range(num_workers)
    ]
    store = logical.Store()
    all_ranks = [
        Ranks(rank, num_workers, store.of(rank), None, owns_default_group=False, timeout_secs=60)
        for rank in range(num_workers)
    ]
    for ranks in all_ranks:
        work_stealing.open_queues(ranks, "write", 1)
    dealt = work_stealing._deal(units, num_workers)  # noqa: SLF001 -- the same for all, and each would compute it
    done: Counter[int] = Counter()
    helped, last = 0, 0.0
    with mock.patch.object(work_stealing, "_deal", return_value=dealt):
        takers = [
            work_stealing.take_units(ranks, "write", units, worker=number, threads=1, in_sight=in_sight)
            for number, ranks in enumerate(all_ranks)
        ]
        agenda = [(0.0, number) for number in range(num_workers)]
        heapq.heapify(agenda)
        while agenda:
            now, number = heapq.heappop(agenda)
            taken = next(takers[number], None)
            if taken is None:
                last = max(last, now)
                continue
            unit, is_others = taken
            done[unit.number] += 1
            helped += is_others
            heapq.heappush(agenda, (now + unit.num_bytes / unit_bytes / speeds[number], number))
    assert set(done.values()) == {1}, "a unit was taken twice"
    assert len(done) == len(units), "a unit was left"
    ideal = len(units) / sum(speeds)
    return Helping(
        num_workers=num_workers,
        num_units=len(units),
        helped=helped,
        makespan=last / ideal,
        alone=max(len(queue) / speed for queue, speed in zip(dealt.queues, speeds, strict=True)) / ideal,
        calls=store.calls,
        keys=store.keys_read,
        num_bytes=store.num_bytes,
    )
