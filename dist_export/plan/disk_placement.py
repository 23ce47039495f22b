"""Deal files out to the disks that they are built on, where ranks of several machines share none. Pure.

A file that cannot go to its store as it comes (gathered rows fall into it, or the store takes whole files alone) is put
together on a disk first. Whatever writes into it runs on a rank that sees this disk, so a gather whose rows go to files of two
disks is run at both, each of which reads all of its rows and writes its own. Neighbouring slices get rows of the same parts,
and neighbouring files hold them: so disks get runs of neighbours, and few gathers are run twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dist_export.checkpoint.metadata import IN_STRIPS
from dist_export.errors import TransferError
from dist_export.plan.plan import Gather, SparsePlan


def find_homes(plan: SparsePlan, numbers: Sequence[int], disk_of_rank: Sequence[int]) -> dict[int, int]:
    """Return the disk on which each of the files ``numbers`` is built.

    Args:
        plan: of the export.
        numbers: of the files that are built on a disk, in order.
        disk_of_rank: for each rank the number of the disk that it sees, from 0 on.

    Raises:
        TransferError: a file gets rows from the memory of ranks that share no disk.
    """
    num_disks = max(disk_of_rank) + 1
    sizes = np.array([plan.files[number].num_bytes + 1 for number in numbers], np.int64)
    middles = np.cumsum(sizes) - sizes / 2
    until = np.cumsum(np.bincount(disk_of_rank, minlength=num_disks)) / len(disk_of_rank)
    disks = np.searchsorted(until, middles / max(int(sizes.sum()), 1), side="right").clip(max=num_disks - 1)
    homes = dict(zip(numbers, disks.tolist(), strict=True))
    if plan.checkpoint.memory is not None:
        homes |= _homes_of_memory(plan, frozenset(numbers), disk_of_rank)
    return homes


def files_of(plan: SparsePlan, gather: Gather) -> np.ndarray:
    """Return the files (int64) that the rows of a gather go to, by its targets; all slots of a target are in one file."""
    table = int(plan.checkpoint.parts.table[gather.part])
    files: np.ndarray = plan.blocks.file[plan.blocks_of(table, gather.columns[0])[gather.targets]]
    return files


def owners_of(plan: SparsePlan, gather: Gather) -> set[int]:
    """Return the ranks that hold the rows of a gather; of column shards there are several, and each moves its columns."""
    checkpoint = plan.checkpoint
    assert checkpoint.memory is not None
    files = []
    for column in gather.columns:
        file = int(checkpoint.blocks.file[gather.part, column])
        files += [file] if file >= 0 else []
        if file == IN_STRIPS:
            files += checkpoint.strips.file[checkpoint.strips.of(gather.part, column)].tolist()
    return {int(checkpoint.memory.owner[file]) for file in files}


def _homes_of_memory(plan: SparsePlan, numbers: frozenset[int], disk_of_rank: Sequence[int]) -> Mapping[int, int]:
    """Return the disks of files that get rows from memory: only its own rank reads that, so they are built on its disk."""
    homes: dict[int, int] = {}
    for gather in plan.gathers:
        disks = {disk_of_rank[owner] for owner in owners_of(plan, gather)}
        for number in numbers.intersection(files_of(plan, gather).tolist()):
            if len(disks | {homes.get(number, min(disks))}) > 1:
                raise TransferError(
                    f"{plan.files[number].name} gets rows from the memory of ranks on several machines, and is put together on "
                    "a disk before it goes to its store: set TMPDIR to a directory that all machines share, or save a "
                    "checkpoint and export that"
                )
            homes[number] = min(disks)
    return homes
