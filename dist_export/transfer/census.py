"""Read the id columns: count rows by target, test slices, find ids that stand twice. Holds no more than a sort needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dist_export.checkpoint.ids import read_ids
from dist_export.checkpoint.reader import Checkpoint
from dist_export.errors import CheckpointError
from dist_export.layout.recis import is_in_slice, mix
from dist_export.plan.census import GRANULE_ROWS, MAX_SORTED_IDS, Census, UniqueTask
from dist_export.plan.targets import Targets


def take_census(checkpoint: Checkpoint, targets: Sequence[Targets], parts: list[int]) -> Census:
    """Count a share of the parts; each rank has its own share and issues no collective.

    Raises:
        CheckpointError: an id stands twice in one part.
    """
    runs: list[np.ndarray] = []
    misplaced = np.zeros(len(parts), np.int64)
    id_sum = np.zeros(len(parts), np.uint64)
    for row, part in enumerate(parts):
        target = targets[checkpoint.parts.table[part]]
        claimed = checkpoint.parts.slice_of(part)
        num_rows = int(checkpoint.parts.rows[part])
        held = np.empty(num_rows if num_rows <= MAX_SORTED_IDS else 0, np.int64)
        own = target.index_of(claimed)
        for granule, ids in enumerate(read_ids(checkpoint, part)):
            first = granule * GRANULE_ROWS
            if len(held):
                held[first : first + len(ids)] = ids
            misplaced[row] += len(ids) - int(np.count_nonzero(is_in_slice(ids, claimed)))
            id_sum[row : row + 1] += mix(ids).sum(dtype=np.uint64)  # as an array: a scalar would warn of the overflow
            counts = np.bincount(target.owners_of(ids, own=own), minlength=len(target.slices))
            present = np.flatnonzero(counts)
            runs.append(
                np.stack([np.full_like(present, part), np.full_like(present, granule), present, counts[present]])
            )
        _refuse_duplicates(held, checkpoint, (part,))
    columns = np.concatenate([np.zeros((4, 0), np.int64), *runs], axis=1)
    return Census(
        part=columns[0],
        granule=columns[1],
        target=columns[2],
        rows=columns[3],
        counted=np.array(parts, np.int64),
        misplaced=misplaced,
        id_sum=id_sum,
    )


def check_unique(checkpoint: Checkpoint, tasks: Sequence[UniqueTask]) -> None:
    """Search a share of the tasks for ids that stand twice in a table. CheckpointError where one is found."""
    for task in tasks:
        found = []
        for part in task.parts:
            for ids in read_ids(checkpoint, part):
                if task.bucket_bits:
                    chosen = (mix(ids) >> np.uint64(64 - task.bucket_bits)) == np.uint64(task.bucket)
                    found.append(ids[chosen])
                else:
                    found.append(ids.copy())
        _refuse_duplicates(np.concatenate([np.zeros(0, np.int64), *found]), checkpoint, task.parts)


def _refuse_duplicates(ids: np.ndarray, checkpoint: Checkpoint, parts: Sequence[int]) -> None:
    """Sort ``ids``, which come from these parts of one table, in place and raise if two neighbours are equal."""
    ids.sort()
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        table = checkpoint.tables[checkpoint.parts.table[parts[0]]].name
        files = sorted({int(checkpoint.blocks.file[part, 0]) for part in parts})
        more = f" (or another of {len(files)} files)" if len(files) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.directory.describe(checkpoint.files[files[0]].name)}{more}: table {table!r} holds the id "
            f"{int(ids[twice[0]])} twice ({len(twice):,} rows too many among those compared); a loader would keep either row. "
            "Save the checkpoint anew, or remove the duplicates"
        )
