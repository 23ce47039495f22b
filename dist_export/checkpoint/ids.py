"""Read id columns in bounded runs. The census, gathers and the lookup of sample rows all go through here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dist_export.checkpoint.reader import Checkpoint

RUN_ROWS = 1 << 20
"""Ids that are held at once: 8 MiB."""


def read_ids(
    checkpoint: Checkpoint, part: int, *, first_row: int = 0, num_rows: int | None = None
) -> Iterator[np.ndarray]:
    """Yield the ids of a part in runs of up to RUN_ROWS, as int64 arrays over one reused buffer."""
    stop = int(checkpoint.parts.rows[part]) if num_rows is None else first_row + num_rows
    if stop == first_row:
        return
    name = checkpoint.files[checkpoint.blocks.file[part, 0]].name
    offset = int(checkpoint.blocks.offset[part, 0])
    buffer = np.empty(min(RUN_ROWS, stop - first_row), np.int64)
    with checkpoint.directory.open_reader(name) as reader:
        for row in range(first_row, stop, RUN_ROWS):
            ids = buffer[: min(RUN_ROWS, stop - row)]
            reader.read_into(ids.data.cast("B"), offset + row * 8)
            yield ids
