"""Read the id column of a part in bounded runs, for the lookup of sample rows and the search for repeated ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_export.checkpoint.reader import Checkpoint
from dist_export.id_columns import RUN_ROWS, IdRun, Readers, read_runs
from dist_export.readers import OpenReaders


def open_sources(checkpoint: Checkpoint) -> OpenReaders:
    """Return the checkpoint's payload files by number, opened when asked for. One for each thread."""
    if checkpoint.memory is not None:
        return OpenReaders(checkpoint.memory.open)
    return OpenReaders(lambda number: checkpoint.directory.open_reader(checkpoint.files[number].name))


def read_id_runs(checkpoint: Checkpoint, readers: Readers, parts: np.ndarray) -> Iterator[IdRun]:
    """Yield the ids of parts (int64) in runs, whose ``blocks`` count in ``parts``.

    Where no ids are stored, these are the numbers of the rows.
    """
    has_ids = np.array([table.has_ids for table in checkpoint.tables], bool)[checkpoint.parts.table[parts]]
    stored = np.flatnonzero(has_ids)
    held = parts[stored]
    file, offset = checkpoint.blocks.file[held, 0], checkpoint.blocks.offset[held, 0]
    for run in read_runs(readers, file, offset, checkpoint.parts.rows[held]):
        yield run._replace(blocks=stored[run.blocks])
    for place in np.flatnonzero(~has_ids).tolist():
        part = int(parts[place])
        rows, first_number = int(checkpoint.parts.rows[part]), checkpoint.parts.first_row_of(part)
        for first in range(0, rows, RUN_ROWS):
            ids = np.arange(first_number + first, first_number + min(first + RUN_ROWS, rows))
            yield IdRun(ids, np.array([place]), np.zeros(1, np.int64), first)


def read_ids(checkpoint: Checkpoint, part: int) -> Iterator[np.ndarray]:
    """Yield the ids of a part in runs, as int64 arrays over one reused buffer."""
    with open_sources(checkpoint) as readers:
        for run in read_id_runs(checkpoint, readers, np.array([part], np.int64)):
            yield run.ids
