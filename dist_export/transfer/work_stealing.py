"""Hand out units of work: a thread takes its own first, then from whoever has most left. Needs the job's store alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.plan.work_units import Unit, assign
from dist_export.runtime.ranks import Ranks

IN_SIGHT, LOOKS = 256, 2
"""A helper looks at so many queues at once, and so often finds nothing before it is done."""


def open_queues(ranks: Ranks, phase: str, threads: int) -> None:
    """Make the queues of this rank's threads known. All ranks, in a step before the phase begins.

    Units that are bound to a disk have queues of their own, those of ``<phase>/disk``.
    """
    for worker in range(ranks.rank * threads, (ranks.rank + 1) * threads):
        ranks.shared.open_queue(f"{phase}/{worker}")


def take_units(
    ranks: Ranks, phase: str, units: list[Unit], *, worker: int, threads: int, disk_of_rank: Sequence[int] = ()
) -> Iterator[tuple[Unit, bool]]:
    """Yield units that nobody else gets, each with whether it was another rank's; stop early once a rank has failed.

    Whoever has nothing left helps whoever has most left, of those in its sight. Helpers take from the end of a queue: its
    owner is at another file then, and two writers of one file wait for each other. Any rank, one iterator a thread.

    Args:
        ranks: the ranks of the export.
        phase: names the queues; each is used once.
        units: the same list on every rank.
        worker: the number of this thread among those of all ranks.
        threads: of each rank.
        disk_of_rank: the disk that each rank sees, where units are bound to one: those are taken first.
    """
    own = [unit for unit in units if unit.owner == ranks.rank]  # in this rank's memory, so nobody else can run them
    while own and not ranks.has_failure():
        place = ranks.shared.claim(f"{phase}/own/{ranks.rank}", len(own))
        if place is None:
            break
        yield own[place], False
    units = [unit for unit in units if unit.owner < 0]
    everybody = range(ranks.world_size * threads)
    if disk_of_rank:
        disk = disk_of_rank[ranks.rank]
        neighbours = [number for number in everybody if disk_of_rank[number // threads] == disk]
        bound = [unit for unit in units if unit.disk == disk]
        yield from _take(ranks, f"{phase}/disk", bound, neighbours, worker=worker, threads=threads)
    common = [unit for unit in units if unit.disk < 0]
    yield from _take(ranks, phase, common, everybody, worker=worker, threads=threads)


def _take(
    ranks: Ranks, phase: str, units: list[Unit], workers: Sequence[int], *, worker: int, threads: int
) -> Iterator[tuple[Unit, bool]]:
    """Yield units that these ``workers`` share, of whom ``worker`` is one."""
    mine = workers.index(worker)
    dealt = _deal(units, len(workers))
    queues, firsts, lengths = dealt.queues, dealt.firsts, dealt.lengths
    while not ranks.has_failure():
        place = ranks.shared.claim(f"{phase}/{worker}", len(queues[mine]))
        if place is None:
            break
        yield units[queues[mine][place]], False
    looks = _places_to_look_at(mine, len(queues))
    seen = next(looks)
    while not ranks.has_failure():
        taken = np.array(ranks.shared.count_taken([f"{phase}/{workers[number]}" for number in seen.tolist()]), np.int64)
        front = firsts[seen] + np.minimum(taken[:, 0], lengths[seen])
        back = np.maximum(firsts[seen] + lengths[seen] - taken[:, 1], front)
        left = dealt.bytes_until[back] - dealt.bytes_until[front]
        if not left.any():
            seen = next(looks, seen[:0])
            if not len(seen):
                return
            continue
        victim = int(seen[left.argmax()])
        place = ranks.shared.claim(f"{phase}/{workers[victim]}", len(queues[victim]), from_end=True)
        if place is not None:
            yield units[queues[victim][place]], workers[victim] // threads != ranks.rank


class _Dealt(NamedTuple):
    """The units by worker: queues are runs of neighbours, see assign."""

    queues: list[list[int]]
    firsts: np.ndarray
    lengths: np.ndarray
    bytes_until: np.ndarray
    """Of the units before each, and a byte for each so that an empty one counts."""


def _deal(units: list[Unit], num_workers: int) -> _Dealt:
    queues = assign(units, num_workers)
    lengths = np.array([len(queue) for queue in queues], np.int64)
    bytes_until = np.concatenate([[0], np.cumsum([unit.num_bytes + 1 for unit in units])])
    return _Dealt(queues, np.cumsum(lengths) - lengths, lengths, bytes_until)


def _places_to_look_at(worker: int, num_queues: int) -> Iterator[np.ndarray]:
    """Yield the queues that a helper looks at together: all of them, or of many the next ones after its own, LOOKS times.

    The job's store would have to read a counter for each queue and helper, 10^8 of them for 10,000 workers. Every queue is still
    in sight of hundreds of helpers.
    """
    if num_queues <= IN_SIGHT:
        yield np.arange(num_queues)
        return
    last = min(LOOKS * IN_SIGHT, num_queues)
    for first in range(0, last, IN_SIGHT):
        yield (worker + np.arange(first, min(first + IN_SIGHT, last))) % num_queues
