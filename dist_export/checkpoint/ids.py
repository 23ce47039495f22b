"""Read the id column of a part in bounded runs, for the lookup of sample rows and the search for repeated ids."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_export.checkpoint.reader import Checkpoint
from dist_export.id_columns import read_runs
from dist_export.readers import OpenReaders


def open_sources(checkpoint: Checkpoint) -> OpenReaders:
    """Return the checkpoint's payload files by number, opened when asked for. One for each thread."""
    return OpenReaders(lambda number: checkpoint.directory.open_reader(checkpoint.files[number].name))


def read_ids(checkpoint: Checkpoint, part: int) -> Iterator[np.ndarray]:
    """Yield the ids of a part in runs, as int64 arrays over one reused buffer."""
    with open_sources(checkpoint) as readers:
        block = slice(part, part + 1)
        file, offset = checkpoint.blocks.file[block, 0], checkpoint.blocks.offset[block, 0]
        for run in read_runs(readers, file, offset, checkpoint.parts.rows[block]):
            yield run.ids
