"""Choose the disk on which each file is built, when ranks of several machines share no disk. Pure.

Some files cannot be sent to their store piece by piece: rows are gathered into them, or the store only takes whole files.
Such a file is built on a disk first, and only ranks that see this disk write into it. A gather for files on two disks runs
once at each disk. Each run reads all rows and writes those for its disk. Neighbouring files often get rows of the same
parts. Each disk therefore gets a run of neighbouring files, so that few gathers run twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dist_export.checkpoint.metadata import IN_STRIPS
from dist_export.errors import TransferError
from dist_export.plan.gathers import Gather
from dist_export.plan.plan import SparsePlan


def find_placements(plan: SparsePlan, numbers: Sequence[int], disk_of_rank: Sequence[int]) -> dict[int, int]:
    """Return the disk on which each of the files ``numbers`` is built.

    Args:
        plan: the plan of the export.
        numbers: the files that are built on a disk, in order.
        disk_of_rank: for each rank the number of the disk that it sees, counted from 0.

    Raises:
        TransferError: a file gets rows from the memory of ranks that share no disk.
    """
    num_disks = max(disk_of_rank) + 1
    sizes = np.array([plan.files[number].num_bytes + 1 for number in numbers], np.int64)
    middles = np.cumsum(sizes) - sizes / 2
    until = np.cumsum(np.bincount(disk_of_rank, minlength=num_disks)) / len(disk_of_rank)
    disks = np.searchsorted(until, middles / max(int(sizes.sum()), 1), side="right").clip(max=num_disks - 1)
    placements = dict(zip(numbers, disks.tolist(), strict=True))
    if plan.checkpoint.memory is not None:
        placements |= _placements_in_memory(plan, frozenset(numbers), disk_of_rank)
    return placements


def files_of(plan: SparsePlan, gather: Gather) -> np.ndarray:
    """Return the file (int64) of each target of a gather. All slots of a target are in one file."""
    table = int(plan.checkpoint.parts.table[gather.part])
    files: np.ndarray = plan.blocks.file[plan.blocks_of(table, gather.columns[0])[gather.targets]]
    return files


def owners_of(plan: SparsePlan, gather: Gather) -> set[int]:
    """Return the ranks that hold the rows of a gather in memory. With column shards, several ranks each move their columns."""
    checkpoint = plan.checkpoint
    assert checkpoint.memory is not None
    files = []
    for column in gather.columns:
        file = int(checkpoint.blocks.file[gather.part, column])
        files += [file] if file >= 0 else []
        if file == IN_STRIPS:
            files += checkpoint.strips.file[checkpoint.strips.of(gather.part, column)].tolist()
    return {int(checkpoint.memory.owner[file]) for file in files}


def _placements_in_memory(plan: SparsePlan, numbers: frozenset[int], disk_of_rank: Sequence[int]) -> Mapping[int, int]:
    """Return the disk of each file that gets rows from memory: the disk of the rank that holds the rows."""
    placements: dict[int, int] = {}
    for gather in plan.gathers:
        disks = {disk_of_rank[owner] for owner in owners_of(plan, gather)}
        for number in numbers.intersection(files_of(plan, gather).tolist()):
            if len(disks | {placements.get(number, min(disks))}) > 1:
                raise TransferError(
                    f"{plan.files[number].name} gets rows from the memory of ranks on several machines, and is put together on "
                    "a disk before it goes to its store: set TMPDIR to a directory that all machines share, or save a "
                    "checkpoint and export that"
                )
            placements[number] = min(disks)
    return placements
