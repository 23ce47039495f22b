"""Hand out work units: a thread takes its own first, then steals from the thread with most left. Only needs the job's store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.plan.work_units import Unit, assign
from dist_export.runtime.ranks import Ranks

IN_SIGHT, LOOKS = 256, 2
"""A helper reads IN_SIGHT queues at once. It is done after it finds LOOKS such sets empty."""


def open_queues(ranks: Ranks, phase: str, threads: int) -> None:
    """Open the queues of this rank's threads. All ranks, in a step before the phase begins.

    Units that are bound to a disk have separate queues, those of ``<phase>/disk``.
    """
    for worker in range(ranks.rank * threads, (ranks.rank + 1) * threads):
        ranks.shared.open_queue(f"{phase}/{worker}")


def take_units(
    ranks: Ranks,
    phase: str,
    units: list[Unit],
    *,
    worker: int,
    threads: int,
    disk_of_rank: Sequence[int] = (),
    in_sight: int = IN_SIGHT,
) -> Iterator[tuple[Unit, bool]]:
    """Yield units that no other thread gets, each with whether it was assigned to another rank. Stop if a rank fails.

    A thread without units of its own takes from the thread with most left, among the queues that it reads. It takes from
    the end of the queue, where the owner is not writing: two writers of one file wait for each other. Any rank, one
    iterator for each thread.

    Args:
        ranks: the ranks of the export.
        phase: the name of the queues. Each name is used once.
        units: the same list on every rank.
        worker: the number of this thread among those of all ranks.
        threads: the number of threads of each rank.
        disk_of_rank: the disk that each rank sees, if units are bound to disks. Those units are taken first.
        in_sight: how many queues a helper reads at once.
    """
    own = [
        unit for unit in units if unit.owner == ranks.rank
    ]  # rows in this rank's memory, which no other rank can read
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
        yield from _take(ranks, f"{phase}/disk", bound, neighbours, worker=worker, threads=threads, in_sight=in_sight)
    common = [unit for unit in units if unit.disk < 0]
    yield from _take(ranks, phase, common, everybody, worker=worker, threads=threads, in_sight=in_sight)


def _take(
    ranks: Ranks,
    phase: str,
    units: list[Unit],
    workers: Sequence[int],
    *,
    worker: int,
    threads: int,
    in_sight: int,
) -> Iterator[tuple[Unit, bool]]:
    """Yield units of a list that ``workers`` share. ``worker`` is one of them."""
    mine = workers.index(worker)
    dealt = _deal(units, len(workers))
    queues, firsts, lengths = dealt.queues, dealt.firsts, dealt.lengths
    while not ranks.has_failure():
        place = ranks.shared.claim(f"{phase}/{worker}", len(queues[mine]))
        if place is None:
            break
        yield units[queues[mine][place]], False
    looks = _rows_to_check(mine, len(queues), in_sight)
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
    """The units by worker. Queues are runs of neighbouring units, see ``assign``."""

    queues: list[list[int]]
    firsts: np.ndarray
    lengths: np.ndarray
    bytes_until: np.ndarray
    """The bytes of all units before each unit, plus one byte for each of them, so that an empty unit counts."""


def _deal(units: list[Unit], num_workers: int) -> _Dealt:
    queues = assign(units, num_workers)
    lengths = np.array([len(queue) for queue in queues], np.int64)
    bytes_until = np.concatenate([[0], np.cumsum([unit.num_bytes + 1 for unit in units])])
    return _Dealt(queues, np.cumsum(lengths) - lengths, lengths, bytes_until)


def _rows_to_check(worker: int, num_queues: int, in_sight: int) -> Iterator[np.ndarray]:
    """Yield the sets of queues that a helper reads together: all of them, or LOOKS sets of the next ones after its own.

    If every helper read every queue, the job's store would read 10^8 counters for 10,000 workers. Hundreds of helpers still
    read every queue.
    """
    if num_queues <= in_sight:
        yield np.arange(num_queues)
        return
    last = min(LOOKS * in_sight, num_queues)
    for first in range(0, last, in_sight):
        yield (worker + np.arange(first, min(first + in_sight, last))) % num_queues
