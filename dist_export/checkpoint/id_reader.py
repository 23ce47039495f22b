"""Read the id column of a part in bounded runs, for the lookup of sample rows and the search for repeated ids."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from dist_export.checkpoint.metadata import FIRST_MADE, Checkpoint, MadeColumn
from dist_export.formats.tuning import STANDARD
from dist_export.ids.columns import IdRun, Readers, read_runs
from dist_export.ids.thread_cache import HeldValues
from dist_export.storage.range_reader import OpenReaders, RangeReader

_COLUMNS: HeldValues[np.ndarray] = HeldValues()
"""Columns of ids that are made."""


def open_sources(checkpoint: Checkpoint) -> OpenReaders:
    """Return the checkpoint's payload files by number, opened when asked for. One for each thread."""
    if checkpoint.memory is not None:
        return OpenReaders(checkpoint.memory.open)
    return OpenReaders(functools.partial(_open_source, checkpoint))


def _open_source(checkpoint: Checkpoint, number: int) -> RangeReader:
    if number <= FIRST_MADE:
        return _MadeReader(checkpoint, checkpoint.made[FIRST_MADE - number])
    return checkpoint.directory.open_reader(checkpoint.files[number].name)


class _MadeReader(RangeReader):
    """Reads a column of ids that is made, at positions as a file would be read. A thread holds one column at a time."""

    def __init__(self, checkpoint: Checkpoint, column: MadeColumn) -> None:
        self._checkpoint = checkpoint
        self._column = column
        self.where = column.name
        self._fd = -1
        self._file = None
        self._s3 = None

    def _fill(self, view: memoryview, offset: int) -> None:
        ids = _COLUMNS.get(self._column, self._load)
        view[:] = ids.view(np.uint8).data[offset : offset + len(view)]

    def _load(self) -> np.ndarray:
        with OpenReaders(functools.partial(_open_source, self._checkpoint), max_open=4) as readers:
            return self._column.load(readers.__getitem__)

    def close(self) -> None:
        _COLUMNS.let_go()


def made_column(checkpoint: Checkpoint, part: int) -> MadeColumn | None:
    """Return the ids of a part where they are made; None where a file holds them, or there are none."""
    number = int(checkpoint.blocks.file[part, 0])
    return checkpoint.made[FIRST_MADE - number] if number <= FIRST_MADE else None


def first_source_of(checkpoint: Checkpoint, part: int) -> str:
    """Return the place of a part's ids, for messages: a file, or what they are made of."""
    column = made_column(checkpoint, part)
    if column is not None:
        return column.name
    number = int(checkpoint.blocks.file[part, 0])
    return checkpoint.directory.describe(checkpoint.files[number].name)


def read_id_runs(
    checkpoint: Checkpoint, readers: Readers, parts: np.ndarray, *, run_rows: int = STANDARD.run_rows
) -> Iterator[IdRun]:
    """Yield the ids of parts (int64) in runs, whose ``blocks`` count in ``parts``.

    Where no ids are stored, these are the numbers of the rows.
    """
    has_ids = np.array([table.has_ids for table in checkpoint.tables], bool)[checkpoint.parts.table[parts]]
    stored = np.flatnonzero(has_ids)
    held = parts[stored]
    file, offset = checkpoint.blocks.file[held, 0], checkpoint.blocks.offset[held, 0]
    for run in read_runs(readers, file, offset, checkpoint.parts.rows[held], run_rows=run_rows):
        yield run._replace(blocks=stored[run.blocks])
    for place in np.flatnonzero(~has_ids).tolist():
        part = int(parts[place])
        rows, first_number = int(checkpoint.parts.rows[part]), checkpoint.parts.first_row_of(part)
        for first in range(0, rows, run_rows):
            ids = np.arange(first_number + first, first_number + min(first + run_rows, rows))
            yield IdRun(ids, np.array([place]), np.zeros(1, np.int64), first)


def read_ids(checkpoint: Checkpoint, part: int, *, run_rows: int = STANDARD.run_rows) -> Iterator[np.ndarray]:
    """Yield the ids of a part in runs, as int64 arrays over one reused buffer."""
    with open_sources(checkpoint) as readers:
        for run in read_id_runs(checkpoint, readers, np.array([part], np.int64), run_rows=run_rows):
            yield run.ids
