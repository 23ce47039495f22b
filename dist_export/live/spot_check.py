"""Compare rows of the model in memory with the written ones, for tables whose rows go by number.

The sample's rows prove little of them: torchrec looks up rows of its own, and sharded weights take none. Each rank compares some
of what it has written, from the written files, so that a shard in the wrong place or on the wrong stride is found.
"""

from __future__ import annotations

import numpy as np

from dist_export.checkpoint.row_reader import RowReader
from dist_export.errors import CommitError
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders

_ROWS = 16
"""Of each part that a rank holds: its first, its last, and some between."""


def compare_rows(plan: SparsePlan, target: Directory) -> int:
    """Return how many rows of this rank's are found in ``target`` as they are in memory. Any rank, for itself; no collective.

    Raises:
        CommitError: one is not.
    """
    checkpoint = plan.checkpoint
    memory = checkpoint.memory
    assert memory is not None
    dropped = set(checkpoint.parts.table[plan.dropped.part].tolist())
    compared = 0
    with (
        RowReader(checkpoint) as reader,
        OpenReaders(lambda number: target.open_reader(plan.files[number].name)) as written,
    ):
        for part, table in enumerate(checkpoint.parts.table.tolist()):
            slot = next(slot for slot in plan.slots_of(table) if slot.name == EMBEDDING_SLOT)
            is_as_stored = slot == checkpoint.tables[table].slots[slot.column] and table not in dropped
            if checkpoint.tables[table].is_hashed or not is_as_stored or not slot.row_bytes:
                continue
            file = int(checkpoint.blocks.file[part, slot.column])
            pieces = reader.held_pieces(part, slot.column)
            if pieces is None:
                first_file = (
                    file if file >= 0 else int(checkpoint.strips.file[checkpoint.strips.of(part, slot.column)[0]])
                )
                pieces = [(0, slot.row_bytes)] if memory.owner[first_file] == memory.rank else []
            if not pieces:
                continue
            blocks = plan.blocks_of(table, slot.column)
            expected, found = np.zeros((2, slot.row_bytes), np.uint8)
            num_rows = int(checkpoint.parts.rows[part])
            for row in np.unique(np.linspace(0, num_rows - 1, _ROWS).astype(np.int64)).tolist() if num_rows else ():
                number = checkpoint.parts.first_row_of(part) + row
                reader.read_into(expected, part, slot.column, row, 1, held_only=True)
                block = int(blocks[np.searchsorted(plan.blocks.begin[blocks], number, side="right") - 1])
                where = int(plan.blocks.offset[block]) + (number - int(plan.blocks.begin[block])) * slot.row_bytes
                written[int(plan.blocks.file[block])].read_into(found.data, where)
                if any((expected[begin:end] != found[begin:end]).any() for begin, end in pieces):
                    raise CommitError(
                        f"{target.describe(plan.files[int(plan.blocks.file[block])].name)}: row {number:,} of table "
                        f"{checkpoint.tables[table].name!r} is not what the model has in memory. Either the model changed while "
                        "it was exported, or the disk did not keep the row. No manifest was written, so there is no package; "
                        "run the export again"
                    )
                compared += 1
    return compared
