"""Rows of a dump, put by on this rank's disk: an export reads rows several times, at positions, which parquet does not allow."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.checkpoint.tzrec.files import DumpFile
from dist_export.checkpoint.tzrec.parquet import read_batches
from dist_export.errors import CheckpointError, ExportError, TransferError
from dist_export.formats.row_fingerprints import fingerprint_rows
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import RangeReader

_ID_BYTES = 8
_PIECE_ROWS = 1 << 16


class Kind(NamedTuple):
    """What the rows of a table are in one file."""

    kind: str
    """``FLOAT`` or ``QUANTIZED`` of ``parquet``."""
    row_bytes: int


class HeldRows(NamedTuple):
    """The rows of one table in one file of the dump, in the order of the file."""

    kind: Kind
    keys: np.ndarray
    """int64."""
    fingerprints: np.ndarray
    """uint64: by them two rows are told to be equal."""
    position: np.ndarray
    """int64: the byte of each row in the spool."""


NO_ROWS = HeldRows(Kind("", 1), np.zeros(0, np.int64), np.zeros(0, np.uint64), np.zeros(0, np.int64))
"""Of a table that a file has no rows of."""


class Spool:
    """A file without a name in the directory for temporary files (TMPDIR), so that nothing of a killed export stays."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(prefix="dist_export-") as file:
            self._fd = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._fd)
        self._end = 0

    def add_file(self, directory: Directory, file: DumpFile) -> dict[str, HeldRows]:
        """Put the rows of a file by, and return what they are by the table's name in the dump.

        Raises:
            CheckpointError: the file is damaged, or a table has rows of several widths.
            ExportError: there is no room.
        """
        pieces: dict[str, list[HeldRows]] = {}
        for table, kind, keys, rows in read_batches(directory, file):
            begin = self._write(rows)
            position = begin + np.arange(len(rows), dtype=np.int64) * rows.shape[1]
            its = HeldRows(Kind(kind, rows.shape[1]), keys, fingerprint_rows(len(rows), [rows]), position)
            pieces.setdefault(table, []).append(its)
        return {table: _join(its, table, directory.describe(file.path)) for table, its in pieces.items()}

    def _write(self, rows: np.ndarray) -> int:
        begin = self._end
        try:
            _write_all(self._fd, np.ascontiguousarray(rows).reshape(-1).data, begin)
        except OSError as error:
            raise ExportError(
                f"{tempfile.gettempdir()}: rows of the dump cannot be put by: {error.strerror or error}. They take "
                f"{begin + rows.nbytes:,} bytes and more; set TMPDIR to a directory with room"
            ) from error
        self._end += rows.nbytes
        return begin

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. Any thread."""
        done = 0
        while done < len(view):
            read = os.preadv(self._fd, [view[done:]], offset + done)
            if not read:
                raise TransferError(
                    f"{tempfile.gettempdir()}: rows that were put by there are gone; run the export again"
                )
            done += read


def _write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def _join(pieces: Sequence[HeldRows], table: str, where: str) -> HeldRows:
    kinds = sorted({piece.kind for piece in pieces})
    if len(kinds) > 1:
        raise CheckpointError(
            f"{where}: table {table!r} has rows of {kinds[0].row_bytes} and of {kinds[1].row_bytes} bytes; expected one "
            "width. Remove the dumps of another model"
        )
    columns = [np.concatenate([getattr(piece, name) for piece in pieces]) for name in HeldRows._fields[1:]]
    return HeldRows(kinds[0], *columns)


class ChosenRows:
    """The rows of one part: some of those that lie in the spool, and their keys, which are in memory."""

    def __init__(self, spool: Spool, held: HeldRows, chosen: np.ndarray) -> None:
        """``chosen`` (int64, sorted) are numbers of rows in ``held``."""
        self._spool = spool
        self._ids = np.ascontiguousarray(held.keys[chosen])
        self._position = held.position[chosen]
        self._row_bytes = held.kind.row_bytes

    def fill_ids(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with bytes of the ids from byte ``offset`` on. Any thread."""
        view[:] = self._ids.view(np.uint8).data[offset : offset + len(view)]

    def fill_rows(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with bytes of the rows from byte ``offset`` on. Any thread. Neighbours are read in one call."""
        width = self._row_bytes
        first, skipped = divmod(offset, width)
        done = 0
        while done < len(view):
            position = self._position[first : first + _PIECE_ROWS]
            breaks = np.flatnonzero(np.diff(position) != width) + 1
            for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(position)], strict=True):
                size = min((end - begin) * width - skipped, len(view) - done)
                self._spool.fill(view[done : done + size], int(position[begin]) + skipped)
                done, skipped = done + size, 0
                if done == len(view):
                    return
            first += len(position)

    @property
    def num_ids(self) -> int:
        """How many rows there are."""
        return len(self._ids)


class DumpReader(RangeReader):
    """Reads the ids or the rows of a part as a file would be read."""

    def __init__(self, rows: ChosenRows, where: str, *, is_ids: bool) -> None:
        self.where = where
        self._fill_it = rows.fill_ids if is_ids else rows.fill_rows

    def _fill(self, view: memoryview, offset: int) -> None:
        self._fill_it(view, offset)


class DumpMemory:
    """The chosen rows of this rank. See :class:`~dist_export.checkpoint.metadata.Memory`.

    Part i has its ids as file 2 * i, and its rows as the one after that.
    """

    def __init__(
        self, rank: int, world_size: int, owner: np.ndarray, names: Sequence[str], parts: Mapping[int, ChosenRows]
    ) -> None:
        """Take what is the same on all ranks, and the ``parts`` of this one by number."""
        self.rank = rank
        self.world_size = world_size
        self.owner = owner
        self._names = names
        self._parts = parts

    def holds(self, number: int) -> bool:
        """Whether this rank can read a file."""
        return number // 2 in self._parts

    def open(self, number: int) -> RangeReader:
        """Return a reader of a file that this rank holds."""
        return DumpReader(self._parts[number // 2], self._names[number], is_ids=number % 2 == 0)


def bytes_of(rows: int, row_bytes: int) -> tuple[int, int]:
    """Return the sizes of the ids and of the rows of a part."""
    return rows * _ID_BYTES, rows * row_bytes
