"""Hand out units of work: a thread takes its own first, then from whoever has most left. Needs the job's store alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_export.collective import Ranks
from dist_export.plan.units import Unit, assign


def open_queues(ranks: Ranks, phase: str, threads: int) -> None:
    """Make the queues of this rank's threads known. All ranks, in a step before the phase begins."""
    for worker in range(ranks.rank * threads, (ranks.rank + 1) * threads):
        ranks.open_queue(f"{phase}/{worker}")


def take_units(
    ranks: Ranks, phase: str, units: list[Unit], *, worker: int, threads: int
) -> Iterator[tuple[Unit, bool]]:
    """Yield units that nobody else gets, each with whether it was another rank's; stop early once a rank has failed.

    Helpers take from the end of a queue: its owner is at another file then, and two writers of one file wait for each
    other. Any rank, one iterator a thread.

    Args:
        ranks: the ranks of the export.
        phase: names the queues; each is used once.
        units: the same list on every rank.
        worker: the number of this thread among those of all ranks.
        threads: of each rank.
    """
    own = [unit for unit in units if unit.owner == ranks.rank]  # in this rank's memory, so nobody else can run them
    while own and not ranks.has_failure():
        place = ranks.claim(f"{phase}/own/{ranks.rank}", len(own))
        if place is None:
            break
        yield own[place], False
    units = [unit for unit in units if unit.owner < 0]
    queues = assign(units, ranks.world_size * threads)
    names = [f"{phase}/{number}" for number in range(len(queues))]
    while not ranks.has_failure():
        place = ranks.claim(names[worker], len(queues[worker]))
        if place is None:
            break
        yield units[queues[worker][place]], False
    bytes_until = np.concatenate([[0], np.cumsum([unit.num_bytes + 1 for unit in units])])
    lengths = np.array([len(queue) for queue in queues], np.int64)
    firsts = np.cumsum(lengths) - lengths  # queues are runs of neighbours, see assign
    while not ranks.has_failure():
        taken = np.array(ranks.taken(names), np.int64)
        front = firsts + np.minimum(taken[:, 0], lengths)
        back = np.maximum(firsts + lengths - taken[:, 1], front)
        left = bytes_until[back] - bytes_until[front]
        victim = int(left.argmax())
        if not left[victim]:
            return
        place = ranks.claim(names[victim], len(queues[victim]), from_end=True)
        if place is not None:
            yield units[queues[victim][place]], victim // threads != ranks.rank
